"""Proof that no word of an exchange is rewritten before all its readers are done, for the blocks of one plan.

The kernel has no fence and no counter: a slot is used again one layer later, and what must have kept its readers from
being late are the other exchanges in between. Here the blocks' reads and writes are listed in program order, and a
clock per block pair follows what each block can know of each other: a read of a word brings what its writer knew when
it wrote. A write is sound if its block knows that every reader of the word's last use has finished.

Inside a block the barriers before each put order all its threads, so a block counts as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import KogcError
from .exchange import BINS, CANDIDATES, KEY, LEVELS, MEASURES, PRIVATE, bins_owned, rows_listed

if TYPE_CHECKING:
    from .matvec import MatVec
    from .plan import Plan

Blocks = NDArray[np.bool_]  # [blocks]
Pairs = NDArray[np.bool_]  # [reader][writer]
Owners = NDArray[np.int64]  # [words]: the block that writes each word, -1: none, -2: several


@dataclass(frozen=True)
class Action:
    """All blocks write their words of a slot (`reads` None), or each reads the words of the marked writers."""

    slot: str
    writers: Blocks
    reads: Pairs | None = None


def check_order(blocks: int, actions: Iterable[Action], where: str) -> None:
    """KogcError naming the slot that a block may rewrite while another still reads it."""
    knows = np.zeros((blocks, blocks), np.int64)  # [block][other]: the other's last action known to be finished
    written: dict[str, NDArray[np.int64]] = {}
    read: dict[str, NDArray[np.int64]] = {}
    for time, action in enumerate(actions, 1):
        if action.reads is None:
            late = (read.pop(action.slot, knows.T * 0) > knows.T) & action.writers
            if late.any():
                reader, writer = (int(i) for i in np.argwhere(late)[0])
                raise KogcError(
                    f"{where}: exchange {action.slot}: block {writer} may rewrite it before block {reader} has read it"
                )
        else:
            _learn(knows, action.reads, written[action.slot])
            read[action.slot] = np.maximum(read.get(action.slot, 0), np.where(action.reads, time, 0))
        np.fill_diagonal(knows, time)
        if action.reads is None:
            written[action.slot] = knows.copy()


def _learn(knows: NDArray[np.int64], reads: Pairs, written: NDArray[np.int64]) -> None:
    whole = reads.all(axis=1)
    if whole.any():
        knows[whole] = np.maximum(knows[whole], written.max(axis=0))
    for block in np.flatnonzero(~whole & reads.any(axis=1)):
        knows[block] = np.maximum(knows[block], written[reads[block]].max(axis=0))


def owners(plan: Plan, slot: str) -> Owners:
    """The writer of each word of a slot."""
    count = plan.exchanges[slot].words
    out = np.full(count, -1, np.int64)
    for block in range(plan.blocks):
        for first, stop in _written(plan, slot, block):
            part = out[first:stop]
            part[:] = np.where(part == -1, block, -2)
    return out


def _written(plan: Plan, slot: str, block: int) -> Iterator[tuple[int, int]]:
    """Runs of words that a block writes."""
    s = plan.spec
    if slot in ("qkv", "o", "down"):
        rows = _phase(plan, slot).rows_of(block)
        yield rows.start, rows.stop
    elif slot == "hidden":  # gate and up rows alternate
        rows = _phase(plan, "gate_up").rows_of(block)
        yield rows.start // 2, rows.stop // 2
    elif slot == "partial":
        size = plan.exchanges["partial"].words // (s.heads * plan.splits)
        for unit in units_of(plan, block):
            for head in heads_of(plan, unit):
                first = (head * plan.splits + block % plan.splits) * size
                yield first, first + size
    elif slot == "attention":
        for head in range(block, s.heads, plan.blocks):
            yield head * s.head_dim, (head + 1) * s.head_dim
    elif slot in ("keys", "maxima", "shortlist", "candidates", "histogram"):
        keys = {"shortlist": rows_listed(plan.blocks), "candidates": CANDIDATES, "histogram": BINS * MEASURES}
        each = KEY * keys.get(slot, 1)
        yield each * block, each * (block + 1)
    elif slot == "totals":
        first, bin_ = bins_owned(plan.blocks) * block, KEY * MEASURES
        for level in range(LEVELS if first < BINS else 0):
            start = level * BINS + first
            yield bin_ * start, bin_ * (start + min(bins_owned(plan.blocks), BINS - first))
    elif slot in PRIVATE:
        rows = plan.head.rows_of(block)
        yield rows.start, rows.stop
    else:
        raise KogcError(f"exchange {slot}: no phase writes it")


def units_of(plan: Plan, block: int) -> range:
    """Attention units (a KV head, one tile of its query heads) that a block takes part in."""
    return range(block // plan.splits, plan.spec.kv_heads * plan.head_tiles, plan.blocks // plan.splits)


def heads_of(plan: Plan, unit: int) -> range:
    """Query heads of an attention unit."""
    kv_head, tile = divmod(unit, plan.head_tiles)
    first = kv_head * plan.spec.group + tile * plan.heads_per_block
    return range(first, min(first + plan.heads_per_block, (kv_head + 1) * plan.spec.group))


def scenarios(plan: Plan) -> Iterator[tuple[str, list[Action]]]:
    """Three consecutive layers with a step's end before the last: every way attention may differ between them.

    And two tokens chosen one after the other, in every way that a token may be chosen; and tokens of a prompt, of which
    only the last has logits: the others' last vector is put, and read by nobody.
    """
    graph = Graph(plan)
    gather = min(plan.knobs.gather_splits, plan.splits)
    counts = sorted({1, gather, min(gather + 1, plan.splits), plan.splits})
    for first, second in product(counts, counts):
        for choose in (False, True):
            actions = [*graph.layer(first), *graph.layer(second)]
            actions += graph.choice() if choose else []
            actions += graph.layer(first)
            yield f"{first} then {second} attention splits", actions
    for active in counts:
        layer = graph.layer(active)
        yield f"a prompt with {active} attention splits", [*layer, *layer[:-1], *layer, *layer]
    for rounds, logprobs, listed in product((0, 1, 2 * LEVELS), (False, True), (False, True)):
        token = [*graph.layer(gather), *graph.sampled(rounds, logprobs, listed)]
        yield f"sampling in {rounds} rounds{' after short lists' if listed else ''}", [*token, *token]


class Graph:
    """The reads and writes of a layer, in the order of templates/common/decoder.h."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.owners = {slot.name: owners(plan, slot.name) for slot in plan.exchanges.slots}
        self.everyone = np.ones(plan.blocks, bool)

    def layer(self, active: int) -> list[Action]:
        """A layer where the first `active` splits of each attention unit hold context, the last of them the token's."""
        out = [self._write("qkv"), self._read("qkv", self._queries(active)), self._write("partial")]
        if active <= self.plan.knobs.gather_splits:
            out.append(self._read("partial", self._partials(active, combine=False)))
        else:
            out += [self._read("partial", self._partials(active, combine=True)), *self._all_gather("attention")]
        return [*out, *self._all_gather("o"), *self._all_gather("hidden"), *self._all_gather("down")]

    def choice(self) -> list[Action]:
        """The greedy choice at a step's end."""
        return self._all_gather("keys")

    def sampled(self, rounds: int, logprobs: bool, listed: bool = False) -> list[Action]:
        """A choice by sampling with so many rounds of search, totals of an earlier round read again before each.

        listed: short lists come first; where they suffice no search follows, and only the first block may read keys.
        """
        out = [self._write("candidates")] if logprobs else []
        if listed or rounds:
            out += self._all_gather("shortlist" if listed else "maxima")
        for number in range(rounds):
            out += [self._all_gather("totals")[1]] if number else []
            out += [self._write("histogram"), self._read("histogram", self._adders())]
            out += self._all_gather("totals")
        out += [self._write("keys")] if listed and not rounds else self.choice()
        out += [self._read(slot, self._first_reads_all()) for slot in ("candidates", "keys") if logprobs]
        return out

    def _adders(self) -> Pairs:
        """Blocks that own bins read the histograms of all."""
        return np.broadcast_to(self._writers("totals")[:, None], (self.plan.blocks, self.plan.blocks))

    def _first_reads_all(self) -> Pairs:
        out = np.zeros((self.plan.blocks, self.plan.blocks), bool)
        out[0] = True
        return out

    def _all_gather(self, slot: str) -> list[Action]:
        every = np.broadcast_to(self._writers(slot), (self.plan.blocks, self.plan.blocks))
        return [self._write(slot), self._read(slot, every)]

    def _write(self, slot: str) -> Action:
        return Action(slot, self._writers(slot))

    def _read(self, slot: str, reads: Pairs) -> Action:
        return Action(slot, self._writers(slot), reads)

    def _writers(self, slot: str) -> Blocks:
        out = np.zeros(self.plan.blocks, bool)
        out[self.owners[slot]] = True
        return out

    def _queries(self, active: int) -> Pairs:
        """Blocks with context read their unit's queries; the newest split also reads the new key and value."""
        plan, s = self.plan, self.plan.spec
        out = np.zeros((plan.blocks, plan.blocks), bool)
        for block in range(plan.blocks):
            split = block % plan.splits
            for unit in units_of(plan, block) if split < active else ():
                heads = heads_of(plan, unit)
                runs = [(heads.start * s.head_dim, heads.stop * s.head_dim)]
                if split == active - 1:
                    key = s.q_rows + unit // plan.head_tiles * s.head_dim
                    runs += [(key, key + s.head_dim), (key + s.kv_rows, key + s.kv_rows + s.head_dim)]
                for first, stop in runs:
                    out[block, self.owners["qkv"][first:stop]] = True
        return out

    def _partials(self, active: int, combine: bool) -> Pairs:
        plan, heads = self.plan, self.plan.spec.heads
        by_split = self.owners["partial"].reshape(heads, plan.splits, -1)[:, :active]
        out = np.zeros((plan.blocks, plan.blocks), bool)
        for block in range(plan.blocks):
            mine = by_split[block :: plan.blocks] if combine else by_split
            out[block, mine.reshape(-1)] = True
        return out


def _phase(plan: Plan, name: str) -> MatVec:
    return next(p for p in plan.phases if p.name == name)
