"""Models, plans and texts for tests/fuzz.py, drawn at random: a case follows from its seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import random_checkpoint as rc
from emulated_cases import profile_with

from kogc.errors import KogcError
from kogc.importer import spec_from_dir
from kogc.plan.check import check
from kogc.plan.plan import CHUNK, Knobs, Options, Plan, make_plan
from kogc.profile import CPU_ARCHS, CUDA_ARCHS, load_profile
from kogc.sampling import SEEDS, Sampling

CPUS = [f"cpu-{arch}" for arch in CPU_ARCHS]
MACHINES = (*CUDA_ARCHS, *CUDA_ARCHS, "mi300x", "mi355x", "rx-9070-xt", "rx-9070-xt", *CPUS)
ENDS = [n * CHUNK + d for n in (1, 2, 3) for d in (-1, 0, 1)]  # of chunks of the cache, and beside them
Q_ROWS = 600
WINDOWS = (1, 7, 31, 127, 128, 129, 140, 255, 256)
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """machine: a profile, or an architecture of CUDA. stages: of the ring on CUDA, 0 for the default knobs.

    overrides: of the checkpoint's configuration. tokens: length of the text. max_context: None for the model's own.
    """

    machine: str
    family: str
    overrides: dict[str, Any]
    blocks: int
    stages: int
    knobs: Knobs
    kv_dtype: str
    tokens: int
    max_context: int | None


@dataclass
class Size:
    """Most that a case may have of each; what is not set is small, so that a case takes seconds."""

    layers: int
    hidden: int
    ffn: int
    vocab: int
    blocks: int
    tokens: int
    q_rows: int = Q_ROWS


def drawn(seed: int) -> Case:
    rng = random.Random(seed)
    machine, family = rng.choice(MACHINES), rng.choice(rc.FAMILIES)
    size = _size(rng, machine, family)
    head_dim, kv_heads = rng.choice((32, 64, 96, 128)), rng.choice((1, 1, 2, 3))
    group = rng.choice((1, 2, 3, 4, 5, 7, 8, 9, 12, 17) if size.q_rows <= Q_ROWS else (12, 17, 34))
    heads = kv_heads * min(group, max(1, size.q_rows // (head_dim * kv_heads)))
    step = math.lcm(4, heads)
    context = size.tokens + rng.choice((0, 1, 2, 9, 128))
    overrides = {
        "num_hidden_layers": size.layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "intermediate_size": size.ffn, "vocab_size": size.vocab, "seed": seed,
        "hidden_size": heads * head_dim if family == "qwen2" else -(-size.hidden // step) * step,
        "max_position_embeddings": context + rng.choice((0, 100)), "tie_word_embeddings": rng.random() < 0.5,
        "dtype": rng.choice(("bfloat16", "bfloat16", "float16")),
        "rope_parameters": {"rope_theta": rng.choice((500.0, 1e4, 1e6)), **rng.choice(ROPES)},
        **_window(rng, family, size.layers),
    }  # fmt: skip
    stages = rng.choice((0, 2, 3, 4, 6, 9, 24))
    kv_dtype, limit = rng.choice(("bf16", "bf16", "fp8")), rng.choice((None, context))
    return Case(
        machine, family, overrides, size.blocks, stages, _knobs(rng, stages, head_dim), kv_dtype, size.tokens, limit
    )


def _size(rng: random.Random, machine: str, family: str) -> Size:
    """Small in all, but for a text of several chunks, one size of which threads have several rounds, or the blocks."""
    upto = rng.randrange
    size = Size(
        upto(1, 4), 4 * upto(4, 80), 4 * upto(2, 90), upto(6, rng.choice((40, 300, 1500))), upto(1, 19), upto(1, 18)
    )
    large = rng.choice((*[""] * 5, "tokens", "tokens", "tokens", "q_rows", "hidden", "ffn", "vocab", "blocks"))
    if large == "tokens":  # two layers: in a pass nothing reads what the last one attends to
        size.layers, size.hidden, size.blocks, size.q_rows = 2, 4 * upto(4, 20), upto(1, 9), 256
        size.tokens = rng.choice(ENDS) if rng.random() < 0.7 else upto(30, 400)
    elif large == "q_rows" and family != "qwen2":  # whose hidden vector is as long: slow
        size.layers, size.hidden, size.blocks, size.q_rows = 1, 4 * upto(4, 20), upto(1, 9), 2200
        size.tokens = rng.choice((upto(1, 18), 130, 140))
    elif large and large != "q_rows":
        size.layers, size.ffn, size.vocab, size.tokens = 1, 24, 99, upto(1, 4)
    if large == "hidden":
        size.hidden = 4 * upto(250, 2100)
    elif large == "ffn":
        size.ffn = 4 * upto(200, 4400)
    elif large == "vocab":
        size.vocab = upto(1500, 20000)
    elif large == "blocks":
        size.blocks = 16 if machine in CPUS else rng.choice((19, 33, 64, 90))
        size.hidden = 8 * size.blocks + 4 * upto(9)
    return size


def _window(rng: random.Random, family: str, layers: int) -> dict[str, Any]:
    window = rng.choice(WINDOWS)
    if family == "mistral":
        return {"sliding_window": rng.choice((None, window))}
    types = [rng.choice(("full_attention", "sliding_attention")) for _ in range(layers)]
    if family == "llama" or "sliding_attention" not in types:
        return {}
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": types}


def _knobs(rng: random.Random, stages: int, head_dim: int) -> Knobs:
    sizes = [n for n in (4096, 8192, 8192, 12288, 16384, 32768) if n >= 64 * head_dim]
    in_flight = [rng.randrange(1, max(2, stages)) for _ in range(3)]
    splits, turn = rng.choice((1, 1, 2, 3, 8)), rng.choice((1, 1, 2, 3))
    return Knobs(rng.choice(sizes), *in_flight, splits, turn, rng.choice((0, 1, 8)), rng.choice((0, 1, 900)))


def planned(case: Case, checkpoint: Path) -> Plan:
    """The plan for as many of the blocks as have work; KogcError where no number will do."""
    spec, _ = spec_from_dir(checkpoint)
    for blocks in range(case.blocks, 1, -1):
        try:
            return _plan(case, spec, blocks)
        except KogcError:
            continue
    return _plan(case, spec, 1)


def _plan(case: Case, spec: Any, blocks: int) -> Plan:
    options = Options(case.max_context, blocks, case.knobs if case.stages else None, case.kv_dtype)
    if case.machine in CUDA_ARCHS:
        profile = replace(load_profile("h200-sxm"), arch=case.machine)
        if case.stages:
            profile = profile_with(case.stages, spec, options, case.machine)
    else:
        profile = load_profile(case.machine)
        if case.stages:  # a stage is what one load of all lanes brings
            options = replace(options, knobs=replace(case.knobs, stage_bytes=16 * profile.threads))
    plan = make_plan(spec, profile, options)
    check(plan)
    return plan


def sampling_of(rng: random.Random, vocab: int) -> Sampling:
    """Any way to choose a token, edges of the ranges included."""
    biased = rng.sample(range(vocab), rng.choice((0, 0, 1, min(vocab, 60))))
    return Sampling(
        temperature=rng.choice((0.0, 0.001, 0.7, 1.0, 4.0, 1000.0)),
        top_k=rng.choice((0, 0, 1, 2, 40, 64, 65, 900)),
        top_p=rng.choice((1.0, 1.0, 0.9, 0.3, 1e-9)),
        min_p=rng.choice((0.0, 0.0, 0.02, 1.0)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.3, 0.2, 1000.0)),
        presence_penalty=rng.choice((0.0, 0.4, -2.0)),
        frequency_penalty=rng.choice((0.0, 0.7)),
        logit_bias=tuple((token, rng.choice((-1000.0, 2.5, 9.0))) for token in biased),
        seed=rng.choice((0, rng.randrange(1 << 40), SEEDS - 1)),
        logprobs=rng.choice((None, 0, 5, 20)),
    )
