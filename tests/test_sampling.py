"""Sampling: parameters and their complaints, and the choices of CPU kernels against Transformers' processors."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_checkpoint as rc
import torch
from safetensors.torch import load_file, save_file
from sampling_reference import choice, noise, philox, processed
from test_cpu_numerics import make_program

import kogc
from kogc.build import BuildOptions, build
from kogc.checkpoint import open_checkpoint
from kogc.errors import KogcError
from kogc.packing import write_weights
from kogc.plan.exchange import BINS, CANDIDATES, LEVELS, MOST_LISTED
from kogc.resources import data_dir
from kogc.runtime import Request, Runtime, open_runtime
from kogc.runtime.args import kernel_args
from kogc.sampling import GREEDY, MAX_BIAS, MAX_LOGPROBS, Sampling, sampling_from_config
from kogc.targets.cpu_features import cpu_features
from kogc.targets.detect import detect_cpu_profile

cpu = pytest.mark.skipif("avx2" not in cpu_features(), reason="needs x86-64 with AVX2")

# --- parameters -------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
HOSTILE: list[tuple[str, Any]] = [
    ("temperature", NAN), ("temperature", -0.1), ("temperature", INF), ("temperature", 1e-9), ("temperature", "hot"),
    ("temperature", True), ("top_k", -1), ("top_k", 1.5), ("top_k", 1 << 31), ("top_k", None), ("top_p", 0.0),
    ("top_p", 1.01), ("top_p", NAN), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0),
    ("repetition_penalty", -1.0), ("repetition_penalty", 1e-9), ("presence_penalty", INF), ("frequency_penalty", NAN),
    ("seed", -1), ("seed", 1 << 64), ("seed", 0.5), ("logprobs", 21), ("logprobs", -1), ("logprobs", True),
    ("logit_bias", ((1, NAN),)), ("logit_bias", ((-1, 1.0),)), ("logit_bias", ((1, 1.0), (1, 2.0))),
    ("logit_bias", 7), ("logit_bias", ((1, 2, 3),)), ("logit_bias", {"a": 1.0}), ("logit_bias", ((2, 1e9),)),
    ("logit_bias", tuple((i, 1.0) for i in range(MAX_BIAS + 1))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), HOSTILE)
def test_a_parameter_outside_its_range_is_named_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(KogcError, match=rf"^{name}: [^\n]+$"):
        Sampling(**{name: value})


def test_limits_themselves_are_allowed() -> None:
    Sampling(temperature=0, top_p=1, min_p=1, top_k=0, seed=(1 << 64) - 1, logprobs=MAX_LOGPROBS)
    assert Sampling(logit_bias={3: 1}).logit_bias == ((3, 1.0),)  # type: ignore[arg-type]
    with pytest.raises(KogcError, match=r"^logit_bias: token 9 is outside the vocabulary \(0 to 8\)$"):
        Sampling(logit_bias=((9, 1.0),)).check_tokens(9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", GREEDY),
        ('{"temperature": 0.6, "top_p": 0.9}', GREEDY),  # nothing is drawn unless do_sample says so
        ('{"do_sample": true}', Sampling(top_k=50)),  # as generate() takes where nothing names another
        ('{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": null}', Sampling(temperature=0.6, top_k=20)),
        ('{"do_sample": false, "repetition_penalty": 1.1}', replace(GREEDY, repetition_penalty=1.1)),
        ('{"do_sample": true, "min_p": 0.1, "eos_token_id": 3}', Sampling(top_k=50, min_p=0.1)),
    ],
)
def test_what_a_model_asks_for(tmp_path: Path, text: str, expected: Sampling) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert sampling_from_config(tmp_path / "generation_config.json") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"do_sample": 1}', ": do_sample: 1 is neither"),
        ('{"do_sample": true, "top_p": 7}', ": top_p: 7 is not above 0"),
        ('{"do_sample": true, "temperature": "hot"}', ": temperature: 'hot' is not a number"),
        ("[]", ": expected a JSON object"),
        ("{", ":1: not JSON: Expecting"),
    ],
)
def test_a_model_that_asks_for_nonsense_is_refused_by_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    with pytest.raises(KogcError, match=rf"generation_config\.json{words}[^\n]*$"):
        sampling_from_config(path)


def test_arguments_of_a_launch() -> None:
    plain = kernel_args({}, 0, 1, 1)
    assert (plain.choice, plain.top_k, plain.top_p, plain.n_bias, plain.seed) == (0, 0, 0, 0, 0)
    args = kernel_args({}, 0, 1, 1, (), Sampling(temperature=0.5, top_p=0.25, top_k=7, min_p=0.5, seed=1 << 63), 4)
    assert (args.choice, args.top_k, args.top_p, args.n_history) == (1 | 2, 7, 1 << 30, 4)
    assert (args.seed, args.inverse_temperature, args.reach) == (1 << 63, 2.0, pytest.approx(math.log(2)))
    assert kernel_args({}, 0, 1, 1, (), Sampling(top_p=1e-30, seed=0)).top_p == 1
    assert kernel_args({}, 0, 1, 1, (), Sampling(top_p=1 - 1e-12, seed=0)).top_p == (1 << 32) - 1
    assert kernel_args({}, 0, 1, 1, (), replace(GREEDY, presence_penalty=1, logprobs=0)).choice == 4 | 16
    with pytest.raises(ValueError, match="needs a seed"):
        kernel_args({}, 0, 1, 1, (), Sampling())


def test_sizes_are_those_of_the_headers() -> None:
    headers = (data_dir("templates") / "common" / f"{name}.h" for name in ("threshold", "logprobs", "shortlist"))
    threshold, logprobs, shortlist = (path.read_text() for path in headers)
    assert f"MOST_LISTED = {MOST_LISTED};" in shortlist
    assert f"LEVELS = {LEVELS}, LEVEL_BITS = {BINS.bit_length() - 1}, BINS = 1 << LEVEL_BITS" in threshold
    assert f"MAX_LOGPROBS = {MAX_LOGPROBS};" in logprobs
    assert CANDIDATES == 2 + MAX_LOGPROBS


# --- randomness -------------------------------------------------------------------------------------------------------


def test_philox_gives_the_published_numbers() -> None:
    """Known answers of the authors' Random123 library."""
    full = 0xFFFFFFFF
    assert [int(w) for w in philox((0, 0), (0, 0, 0, 0))] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in philox((full, full), (full,) * 4)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_the_largest_of_noisy_logits_is_a_draw_from_their_softmax() -> None:
    logits = np.random.default_rng(5).normal(0, 1.5, 24)
    draws = [int((logits + noise(seed, 11, 24)).argmax()) for seed in range(6000)]
    check_frequencies(draws, np.exp(logits))


def check_frequencies(draws: list[int], weights: np.ndarray) -> None:
    """Pearson's chi-squared, rare tokens taken together, at six standard deviations of its own distribution."""
    expected = weights / weights.sum() * len(draws)
    seen = np.bincount(draws, minlength=len(weights)).astype(float)
    assert (seen[weights == 0] == 0).all()
    rare = expected < 8
    seen, expected = (np.append(x[~rare], x[rare].sum()) for x in (seen, expected))
    keep = expected > 0
    chi, degrees = float(((seen - expected)[keep] ** 2 / expected[keep]).sum()), keep.sum() - 1
    assert chi < degrees + 6 * math.sqrt(2 * max(degrees, 1)), f"chi-squared {chi:.1f} at {degrees} degrees"


# --- CPU kernels ------------------------------------------------------------------------------------------------------

PROMPT = [7, 3, 3, 200, 41, 7]
WIDE = 6007  # rows enough that bins of the first level hold many
OPTIONS = {
    "plain": Sampling(),
    "hot": Sampling(temperature=2.5),
    "cold": Sampling(temperature=0.05, top_k=3),
    "top-k-1": Sampling(top_k=1),
    "top-k-40": Sampling(top_k=40),
    "top-k-2500": Sampling(temperature=4.0, top_k=2500),
    "top-k-most": Sampling(temperature=9.0, top_k=WIDE - 5),
    "top-p-tiny": Sampling(top_p=1e-6),
    "top-p": Sampling(temperature=2.0, top_p=0.9),
    "top-p-nearly-all": Sampling(temperature=3.0, top_p=0.999),
    "min-p": Sampling(temperature=1.5, min_p=0.05),
    "min-p-1": Sampling(min_p=1.0),
    "all-filters": Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02),
    "wide-filters": Sampling(temperature=3.0, top_k=3000, top_p=0.7),
    "penalties": Sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, top_k=50),
    "rewards": Sampling(temperature=0.7, repetition_penalty=0.8, presence_penalty=-1.0, frequency_penalty=-0.5),
    "bias": Sampling(top_p=0.8, logit_bias=tuple((t, (-1) ** t * 3.0) for t in range(0, 600, 2))),
    "everything": Sampling(
        temperature=0.8, top_k=100, top_p=0.95, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.2,
        frequency_penalty=0.1, logit_bias=((7, 4.0), (8, -4.0)), logprobs=3,
    ),
    "top-k-64": Sampling(temperature=3.0, top_k=64, top_p=0.97, min_p=0.01),
    "frozen": Sampling(temperature=0.01, top_k=40, top_p=0.9),  # all but a few are further away than limits tell apart
    "crowded": Sampling(temperature=3.0, top_k=60, top_p=0.99, logit_bias=tuple((t, 30.0) for t in range(100, 180))),
    "greedy-penalised": replace(GREEDY, repetition_penalty=1.5, frequency_penalty=0.2),
    "greedy-biased": replace(GREEDY, logit_bias=((5, 6.0), (9, 6.5))),
}  # fmt: skip


BLOCKS = (1, 5)  # of five, one has no bins to add up


@pytest.fixture(scope="module")
def runtimes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Runtime]]:
    """The same model on one thread and on five."""
    tmp_path = tmp_path_factory.mktemp("sampling")
    checkpoint = rc.make(tmp_path, "llama", vocab_size=WIDE, num_hidden_layers=1)
    with contextlib.ExitStack() as stack:
        out = {}
        for blocks in BLOCKS:
            (tmp_path / str(blocks)).mkdir()
            program = make_program(checkpoint, "cpu-avx2", blocks, tmp_path / str(blocks))
            out[blocks] = stack.enter_context(open_runtime(program, oversubscribe=True))
        yield out


@pytest.fixture
def runtime(runtimes: dict[int, Runtime]) -> Runtime:
    return runtimes[5]


def follow(runtime: Runtime, sampling: Sampling, prompt: list[int], made: list[int]) -> int:
    """How many tokens are beyond doubt; each of these must be what the reference chooses."""
    logits = runtime.run(Request(tuple(prompt + made), logits=True)).logits
    assert logits is not None
    clear = 0
    for i, token in enumerate(made):
        at = len(prompt) + i - 1
        scores = processed(logits[at], sampling, prompt, made[:i])
        assert np.isfinite(scores[token]), f"token {i}, {token}, was not admitted"
        expected, lead = choice(scores, sampling, at)
        if lead > 1e-3:
            clear += 1
            assert token == expected, f"token {i} of {made}"
    return clear


@cpu
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_those_of_the_reference(runtimes: dict[int, Runtime], name: str, blocks: int) -> None:
    count, runtime = 24, runtimes[blocks]
    for seed in (1, 0x1234567890ABCDEF):
        sampling = replace(OPTIONS[name], seed=seed)
        made = runtime.run(Request(tuple(PROMPT), max_new=count, sampling=sampling)).tokens
        assert len(made) == count
        assert follow(runtime, sampling, PROMPT, made) >= count - 2


@cpu
def test_tokens_do_not_depend_on_the_number_of_blocks(runtimes: dict[int, Runtime]) -> None:
    requests = [Request(tuple(PROMPT), max_new=30, sampling=replace(s, seed=9)) for s in OPTIONS.values()]
    runs = [[runtimes[blocks].run(request).tokens for request in requests] for blocks in BLOCKS]
    assert runs[1] == runs[0]


@cpu
def test_tokens_do_not_depend_on_where_a_launch_begins(runtime: Runtime) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.2, seed=8)
    made = runtime.run(Request(tuple(PROMPT), max_new=30, sampling=sampling)).tokens
    head = (*PROMPT, *made[:10])
    rest = Request(head[-1:], len(head) - 1, 20, sampling=sampling, history=head[:-1])
    assert runtime.run(rest).tokens == made[10:]


@cpu
def test_penalties_know_what_lies_before_the_prompt(runtime: Runtime) -> None:
    sampling = replace(GREEDY, repetition_penalty=3.0)
    best = runtime.run(Request(tuple(PROMPT), max_new=1)).tokens
    last, start = (PROMPT[-1],), len(PROMPT) - 1
    assert runtime.run(Request(last, start, 1, sampling=sampling)).tokens == best
    assert runtime.run(Request(last, start, 1, sampling=sampling, history=tuple(best))).tokens != best


@cpu
@pytest.mark.parametrize("name", ["plain", "all-filters", "top-p", "penalties"])
def test_frequencies_over_many_seeds(runtime: Runtime, name: str) -> None:
    sampling = OPTIONS[name]
    logits = runtime.run(Request(tuple(PROMPT), logits=True)).logits
    assert logits is not None
    scores = processed(logits[-1], sampling, PROMPT, [])
    last = Request((PROMPT[-1],), len(PROMPT) - 1, 1, history=tuple(PROMPT[:-1]))
    draws = [runtime.run(replace(last, sampling=replace(sampling, seed=seed))).tokens[0] for seed in range(700)]
    check_frequencies(draws, np.exp(scores - scores.max()))


@cpu
def test_logprobs_are_those_of_the_models_own_distribution(runtime: Runtime) -> None:
    for n in (0, 1, 5, MAX_LOGPROBS):
        sampling = replace(OPTIONS["everything"], seed=n, logprobs=n)
        result = runtime.run(Request(tuple(PROMPT), max_new=12, sampling=sampling))
        logits = runtime.run(Request((*PROMPT, *result.tokens), logits=True)).logits
        assert len(result.logprobs) == 12
        expected = torch.log_softmax(torch.tensor(logits), dim=-1)[len(PROMPT) - 1 : -1]
        for row, token, got in zip(expected, result.tokens, result.logprobs, strict=True):
            assert got.chosen == pytest.approx(float(row[token]), abs=2e-5)
            values, tokens = row.topk(n)
            assert [t for t, _ in got.top] == tokens.tolist()
            assert [v for _, v in got.top] == pytest.approx(values.tolist(), abs=2e-5)


@cpu
def test_logprobs_change_no_token(runtime: Runtime) -> None:
    for sampling in (GREEDY, replace(OPTIONS["all-filters"], seed=3)):
        request = Request(tuple(PROMPT), max_new=10, sampling=sampling)
        with_logprobs = replace(request, sampling=replace(sampling, logprobs=2))
        assert runtime.run(with_logprobs).tokens == runtime.run(request).tokens


@cpu
def test_stop_tokens_end_a_drawn_continuation(runtime: Runtime) -> None:
    request = Request(tuple(PROMPT), max_new=20, sampling=replace(OPTIONS["hot"], seed=4))
    made = runtime.run(request).tokens
    stops = (*range(WIDE - 15, WIDE), made[7])
    assert not set(made) & set(stops[:-1])
    assert runtime.run(replace(request, stop=stops)).tokens == made[: made.index(made[7]) + 1]


@cpu
def test_without_a_seed_runs_differ(runtime: Runtime) -> None:
    request = Request(tuple(PROMPT), max_new=20, sampling=OPTIONS["hot"])
    assert runtime.run(request).tokens != runtime.run(request).tokens


@cpu
def test_tokens_that_tie_are_admitted_together(runtime: Runtime, tmp_path: Path) -> None:
    """Rows 100 to 109 of the head are one row: the best that there is, or so low that filters cut among them."""
    path = rc.make(tmp_path, "llama", vocab_size=WIDE, num_hidden_layers=1)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][100:110] = weights["lm_head.weight"][100].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    program = replace(runtime.program, weights=tmp_path / "weights.bin")
    with open_checkpoint(path, program.plan.spec) as opened:
        write_weights(program.plan, opened, tmp_path / "weights.bin")
    tied = tuple((token, 60.0) for token in range(100, 110))
    above = ((5, 90.0),)
    cases: list[tuple[dict[str, float], Any, set[int]]] = [
        ({"top_k": 2}, tied, {*range(100, 110)}),
        ({"top_k": 2, "temperature": 30.0}, tied + above, {5, *range(100, 110)}),
        ({"top_p": 0.01}, tied, {*range(100, 110)}),
        ({"top_p": 0.006, "temperature": 30.0}, tied + above, {5, *range(100, 110)}),
        ({"top_k": 1}, tied + above, {5}),
    ]
    with open_runtime(program, oversubscribe=True) as changed:
        for filters, bias, admitted in cases:
            draws = [Sampling(**filters, logit_bias=bias, seed=seed) for seed in range(90)]  # type: ignore[arg-type]
            tokens = {changed.run(Request(tuple(PROMPT[:1]), max_new=1, sampling=s)).tokens[0] for s in draws}
            assert tokens == admitted


@cpu
def test_a_session_samples_as_the_model_asks(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama", num_hidden_layers=1)
    settings = json.loads((path / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 0.7, "top_k": 20}
    (path / "generation_config.json").write_text(json.dumps(settings))
    build(str(path), detect_cpu_profile(), tmp_path / "artifact", BuildOptions(max_context=64, blocks=1))
    with kogc.load(tmp_path / "artifact") as session:
        assert session.sampling == Sampling(temperature=0.7, top_k=20)
        greedy = session.generate([1, 5], 20, stop=(), sampling=GREEDY)
        assert session.generate([1, 5], 20, stop=()).tokens != greedy.tokens
        wanted = Sampling(seed=1, logprobs=2)
        pieces = list(session.stream([1, 5], 20, stop=(), sampling=wanted))
        made = session.generate([1, 5], 20, stop=(), sampling=wanted)
        assert [piece.token for piece in pieces] == made.tokens
        assert [piece.logprobs for piece in pieces] == made.logprobs
        assert greedy.logprobs == []
        with pytest.raises(KogcError, match="^logit_bias: token 331 is outside"):
            session.generate([1], 2, sampling=Sampling(logit_bias=((331, 1.0),)))
    with kogc.load(tmp_path / "artifact", sampling=GREEDY) as session:
        assert session.generate([1, 5], 20, stop=()).tokens == greedy.tokens
