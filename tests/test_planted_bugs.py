"""Bugs planted in the CUDA kernel show on the emulated machine: what it relies on, left out, is noticed."""

from __future__ import annotations

import pytest
import random_checkpoint as rc
import torch
from emulated_cases import CASES, emulated, error, patched, planned, prompt
from emulator import EmulatorError
from fp8_cache import over_cache

WAIT_HIDDEN = 6  # site of a stall report

# Each is one small change of the kernel that its tests must notice.
BUGS = {
    "a stage used before it has arrived": (
        "cuda/matvec.cuh",
        "if (!all_lanes(taken_ != 0 || full_)) wait_full<P>(stream, where);",
        "",
    ),
    "a stage overwritten while it is read": ("cuda/stream.cuh", "if (!wait_empty(next)) return false;", ""),
    "a stage released before it is read": ("cuda/stream.cuh", "if (lane() == 0) barrier_arrive", "barrier_arrive"),
    "a tile used before it has arrived": (
        "cuda/attention.cuh",
        "wait_full<P>(stream, stages(chunk, position), where);",
        "",
    ),
    "a key copied before it is written": (
        "cuda/stream.cuh",
        "if (where_.layer == 0 && !wait_written()) return false;",
        "",
    ),
    "a value taken before it is ready": ("common/exchange.h", "(u32)ready<BIT>(v[i], parity) << i", "1u << i"),
    "a value with the parity of its last use": (
        "common/exchange.h",
        "(as_word(v[0]) & ~1u) | parity",
        "(as_word(v[0]) & ~1u) | (parity ^ 1)",
    ),
    "a vector taken from another's slot": ("common/decoder.h", "P::X_DOWN", "P::X_O"),
    "a value that lanes do not share": (
        "cuda/matvec.cuh",
        "const int warp_ = scalar(warp());",
        "const int warp_ = scalar(thread());",
    ),
    "stages of the cache that are never given back": (
        "cuda/attention.cuh",
        "give_back(stream, held_);",
        "stream.advance(held_);",
    ),
    "a new value in another's place": (
        "cuda/attention.cuh",
        "new_value()[d % 8 * (DIM / 8) + d / 8]",
        "new_value()[d]",
    ),
    "a word of a pair's other head": (
        "cuda/attention.cuh",
        "put(2 * pair + 1, o.b, extra.b);",
        "put(2 * pair + 1, o.a, extra.b);",
    ),
    "a gathered vector used before the barrier": (
        "common/residual.h",
        "sync();\n}\n\n}  // namespace",
        "}\n\n}  // namespace",
    ),
    "one byte count for two copies": (
        "cuda/stream.cuh",
        "barrier_expect(Ring<P>::full(head_.slot), bytes)",
        "barrier_expect(Ring<P>::full(head_.slot), 2 * bytes)",
    ),
    "a new key that only its cache sees": ("cuda/attention.cuh", "insert_key(scales[n], position - bases[n]);", "{}"),
    "a stage of a chunk used before it has arrived": (
        "cuda/attention.cuh",
        "wait_full<P>(stream, where);\n        if (seen",
        "if (seen",
    ),
}
# What copies of 16 bytes a lane can get wrong; the last one they alone can.
ASYNC_BUGS = {
    **{
        bug: BUGS[bug]
        for bug in (
            "a stage used before it has arrived",
            "a stage overwritten while it is read",
            "a key copied before it is written",
            "a stage of a chunk used before it has arrived",
        )
    },
    "a stage that is full when one lane has copied": (
        "cuda/stream.cuh",
        "barrier_init(full(i), COPIERS);",
        "barrier_init(full(i), 1);",
    ),
}
# What an FP8 cache adds, told from the model over the cache as stored: these are wrong in every order.
FP8_BUGS = {
    "a key with another's scale": ("fp8-pairs", "cuda/tiles.cuh", "bytes >> i / 2 * 8 & 0xff", "bytes & 0xff"),
    "a value without its scale": ("fp8-pairs", "cuda/attention.cuh", "scales[n].values(p[n]);", ""),
    "a new key with an old scale": (
        "fp8-pairs",
        "cuda/attention.cuh",
        "const u32 both = *",
        "return; const u32 both = *",
    ),
    "a new key in its neighbour's bytes": ("fp8-pairs", "cuda/attention.cuh", "key.low, r / 8 * 8,", "key.low, 0,"),
    "a new value in its neighbour's byte": ("fp8-pairs", "cuda/attention.cuh", "r % 2 * 16 + r / 8 * 8", "r % 2 * 16"),
    "the second chunk of a pair left out": ("fp8-pairs", "cuda/attention.cuh", "if (n) load_tile_keys(tiles[n]);", ""),
    "codes in the order of BF16": ("fp8", "common/fp8.h", "element % 2 * 2 + element / 2 % 2", "element % 4"),
    "numbers cut off, not rounded": ("fp8", "common/fp8.h", "(w + 0x7ffff + (w >> 20 & 1)) >> 20", "w >> 20"),
    "a sign that is lost": ("fp8", "common/fp8.h", "(w << 8 & 0x80008000u) | ", ""),
    "a vector that saturates": ("fp8", "common/fp8.h", "FP8_TOP = 7", "FP8_TOP = 11"),
    "the largest of one lane": ("fp8", "common/attention.h", "m = other > m ? other : m;", ""),
}
NEEDS = {  # what a bug needs besides the case `planted`, to show
    "a key copied before it is written": "step-in-ring",
    "a stage of a chunk used before it has arrived": "chunk-over-ring",
}
PLANTED = [*(("", bug, *BUGS[bug]) for bug in BUGS), *(("async-", bug, *ASYNC_BUGS[bug]) for bug in ASYNC_BUGS)]


@pytest.mark.parametrize(
    ("copies", "bug", "file", "old", "new"), PLANTED, ids=[kind + bug for kind, bug, *_ in PLANTED]
)
def test_a_planted_bug_is_noticed(copies: str, bug: str, file: str, old: str, new: str) -> None:
    case = copies + NEEDS.get(bug, "planted")
    sound, broken = emulated(case)[0], patched(case, file, old, new)
    tokens = prompt(sound.plan.spec.vocab, max(6, CASES[case].tokens))
    assert broken.differs(tokens, sound.logits(tokens), orders=40)


@pytest.mark.parametrize("bug", FP8_BUGS)
def test_a_planted_bug_of_an_fp8_cache_is_noticed(bug: str) -> None:
    case, file, old, new = FP8_BUGS[bug]
    broken, checkpoint = patched(case, file, old, new), planned(case)[1]
    tokens = prompt(broken.plan.spec.vocab, CASES[case].tokens)
    logits = broken.logits(tokens)
    half = rc.reference_logits(checkpoint, tokens, torch.bfloat16)
    try:
        over = over_cache(broken.plan, checkpoint, tokens, broken.buffers["kv"].bytes)
    except AssertionError:
        return
    assert error(logits, over) > error(half, rc.reference_logits(checkpoint, tokens))


@pytest.mark.parametrize("name", ["planted", "async-planted"])
def test_a_stall_is_reported_with_its_place(name: str) -> None:
    silent = "if (phase_ == GATE_UP && where_.layer == 1) return;\n"
    row = "if (phase_ == GATE_UP) {  // rows alternate"
    broken = patched(name, "common/decoder.h", row, silent + row)
    with pytest.raises(EmulatorError, match="stalled"):
        broken.logits(prompt(broken.plan.spec.vocab, 2))
    stalled, _block, _thread, site, layer, step, *_ = broken.report
    assert (stalled, site, layer, step) == (1, WAIT_HIDDEN, 1, 0)
