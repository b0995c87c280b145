"""The choice of a token in the CUDA kernel, run without a GPU: as Transformers' processors choose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from emulated_cases import emulated, patched, prompt
from emulator import Emulated
from sampling_reference import choice, processed

from kogc.sampling import Sampling

# What of sampling takes different ways through the kernel.
SAMPLED = {
    "plain": Sampling(temperature=1.3, seed=5),
    "top-k": Sampling(temperature=9.0, top_k=2, seed=6),
    "all-filters": Sampling(temperature=5.0, top_k=90, top_p=0.7, min_p=0.01, seed=7),
    "everything": Sampling(
        temperature=1.5, top_k=60, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2,
        logit_bias=((7, 9.0), (30, -2.0)), seed=8, logprobs=4,
    ),
    "wide": Sampling(temperature=40.0, top_k=900, top_p=0.5, seed=9),
    # The best rows lie in one block, more than it lists.
    "crowded": Sampling(temperature=4.0, top_k=50, logit_bias=tuple((t, 30.0) for t in range(4, 58)), seed=10),
    "frozen": Sampling(temperature=0.01, top_k=40, top_p=0.9, seed=11),
    "greedy": Sampling(temperature=0, repetition_penalty=0.2, frequency_penalty=1.0, logprobs=0),
}  # fmt: skip


def sampled_as_the_reference(model: Emulated, sampling: Sampling, order: int) -> None:
    """Six tokens, each what Transformers' processors and the seed's noise choose from the kernel's own logits."""
    tokens = prompt(model.plan.spec.vocab, 5)
    made = model.generate(tokens, 6, seed=order, sampling=sampling)
    logprobs = model.logprobs
    assert len(made) == 6
    logits = model.logits(tokens + made)[len(tokens) - 1 : -1]
    for i, token in enumerate(made):
        scores = processed(logits[i], sampling, tokens, made[:i])
        expected, lead = choice(scores, sampling, len(tokens) - 1 + i)
        assert token == expected or (lead < 1e-3 and np.isfinite(scores[token]))
    if sampling.logprobs is not None:
        expected_logprobs = torch.log_softmax(torch.tensor(logits), dim=-1)
        for row, token, got in zip(expected_logprobs, made, logprobs, strict=True):
            assert got.chosen == pytest.approx(float(row[token]), abs=2e-5)
            assert [t for t, _ in got.top] == row.topk(sampling.logprobs).indices.tolist()


def differs_from_the_reference(model: Emulated, samplings: dict[str, Sampling]) -> bool:
    """Whether some choice does, or the machine stops, in one of twelve orders of threads."""
    for order in range(1, 13):
        for sampling in samplings.values():
            try:
                sampled_as_the_reference(model, replace(sampling, seed=order), order)
            except AssertionError:  # an EmulatorError is one too
                return True
    return False


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("case", ["sampled", "listed", "more-blocks-than-units", "one-block"])
def test_sampled_tokens_are_those_of_the_reference(case: str, name: str) -> None:
    for order in (1, 2):
        sampled_as_the_reference(emulated(case)[0], SAMPLED[name], order)


LIST_CASES = ("sampled", "listed", "more-blocks-than-units", "one-block")


@pytest.mark.parametrize("case", LIST_CASES)
def test_short_lists_choose_what_a_search_chooses(case: str) -> None:
    listing = emulated(case)[0]
    searching = patched(case, "common/shortlist.h", "MOST_LISTED = 64;", "MOST_LISTED = 0;")
    tokens = prompt(listing.plan.spec.vocab, 4)
    filters = [(k, p, m) for k in (1, 2, 7, 40, 63, 64) for p, m in ((1.0, 0.0), (0.9, 0.0), (0.6, 0.03), (1.0, 0.1))]
    for i, (top_k, top_p, min_p) in enumerate(filters):
        for temperature in (0.02, 0.8, 6.0):
            sampling = Sampling(temperature, top_k, top_p, min_p, 1.2, logit_bias=((5, 3.0),), seed=i)
            made = [model.generate(tokens, 2, sampling=sampling) for model in (listing, searching)]
            assert made[0] == made[1], sampling


def test_a_search_follows_only_where_a_list_is_too_short() -> None:
    """A search that admits the best row alone changes nothing else."""
    sound = emulated("listed")[0]
    blind = patched("listed", "common/sampling.h", "end = threshold.find((u32)args.top_k, args.top_p);", "end = 1;")
    tokens = prompt(sound.plan.spec.vocab, 4)
    for name in ("top-k", "everything", "frozen"):
        assert blind.generate(tokens, 4, sampling=SAMPLED[name]) == sound.generate(tokens, 4, sampling=SAMPLED[name])
    crowded = SAMPLED["crowded"]
    assert blind.generate(tokens, 4, sampling=crowded) != sound.generate(tokens, 4, sampling=crowded)


def test_the_host_can_end_a_choice_by_short_lists() -> None:
    model = emulated("listed")[0]
    tokens = prompt(model.plan.spec.vocab, 5)
    free = model.generate(tokens, 4, sampling=SAMPLED["top-k"])
    assert model.generate(tokens, 4, sampling=SAMPLED["top-k"], halt=True) == free[:1]


def test_searches_beyond_what_a_tag_can_count() -> None:
    sound = emulated("sampled")[0]
    model = patched("sampled", "common/words.h", "w.level_searches[2] = 0;", "w.level_searches[2] = 2044;")
    tokens = prompt(sound.plan.spec.vocab, 2)
    made = sound.generate(tokens, 12, sampling=SAMPLED["all-filters"])
    assert model.generate(tokens, 12, sampling=SAMPLED["all-filters"]) == made


# The same for sampling: what would go wrong on a GPU now and then, or always.
SAMPLING_BUGS = {
    "a word taken whatever its tag": ("common/choice.h", "((u32)v[i] & TAG_MASK) == tag", "(u32)v[i] != 0"),
    "logits read before the barrier": ("common/sampling.h", "sync();  // the rows' logits are in memory", ""),
    "bins filled before they are cleared": (
        "common/threshold.h",
        "all[i] = 0;\n    sync();",
        "all[i] = 0;",
    ),
    "a block whose rows nobody counts": ("common/threshold.h", "b0 = way + i / ITEMS,", "b0 = way + i / ITEMS + 1,"),
    "one more than top-k": ("common/sampling.h", "find((u32)args.top_k,", "find((u32)args.top_k + 1,"),
    "top-p of all, not of what top-k admits": ("common/threshold.h", "top_k ? top_k : ~0ull", "~0ull"),
    "totals of another prefix": ("common/threshold.h", "area_prefix(level) != prefix", "area_prefix(level) == ~0u"),
    "noise by the row within the block": ("common/sampling.h", "const int row = rows.first + i;", "const int row = i;"),
    "noise that ignores the position": ("common/sampling.h", "(u32)(args.start + step)", "0"),
    "a penalty that forgets the prompt": ("common/sampling.h", "= IN_PROMPT;  //", "= 0;  //"),
    "tokens that are not counted": ("common/sampling.h", "rows.seen[token - rows.first]++", "(void)token"),
    "a bias that is lost": ("common/sampling.h", "from = rows.scores;", ""),
    "a block's largest logit in place of all blocks'": (
        "common/sampling.h",
        "largest = value_of(largest_of_blocks<P>(maxima, tag, where, WAIT_MAXIMA));",
        "largest = value_of(best);",
    ),
    "the log-probability of another block's candidate": (
        "common/logprobs.h",
        "is && without_tag(own) == key",
        "b == 0",
    ),
    "likeliest tokens out of order": ("common/logprobs.h", "if (key < best) next", "next"),
}


@pytest.mark.parametrize("bug", SAMPLING_BUGS)
def test_a_planted_bug_of_sampling_is_noticed(bug: str) -> None:
    broken = patched("sampled", *SAMPLING_BUGS[bug])
    assert differs_from_the_reference(broken, SAMPLED)


# The same for short lists, where a block may have more good rows than it lists.
LIST_BUGS = {
    "a list that is too short, and trusted": ("| (own.last ? DOUBTFUL : 0)", ""),
    "a block whose rows nobody considers": ("store(larger, a.keys[i])", "store(larger, block() == 1 ? 0 : a.keys[i])"),
    "a list of the rows found so far": ("    sync();\n    const int found", "    const int found"),
    "rows kept after those of another stage": ("if (thread() == 0) area().count = 0;", ""),
    "one more than top-k": ("closer < args_.top_k;", "closer <= args_.top_k;"),
    "top-p that admits all": ("own.closer_mass >= wanted", "false"),
    "min-p that admits all": (" || own.distance > args_.reach", ""),
    "noise of a neighbouring row": ("own.row % 2 * 32", "0"),
    "distances before the barrier": ("    sync();\n    u32 farthest", "    u32 farthest"),
}
LISTED = {
    "hot": Sampling(temperature=8.0, top_k=64),
    "top-p": Sampling(temperature=6.0, top_k=50, top_p=0.3),
    "min-p": Sampling(temperature=3.0, top_k=50, min_p=0.5),
    "two": Sampling(temperature=20.0, top_k=2),
    "crowded": SAMPLED["crowded"],
}


@pytest.mark.parametrize("bug", LIST_BUGS)
def test_a_planted_bug_of_short_lists_is_noticed(bug: str) -> None:
    broken = patched("listed", "common/shortlist.h", *LIST_BUGS[bug])
    assert differs_from_the_reference(broken, LISTED)
