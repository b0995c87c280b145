"""The argument of a launch, as the kernel sees it. Field order and types are the ABI of every target."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..sampling import GREEDY, Sampling

STOP_TOKENS = 16  # stop tokens that one launch can watch for
REPORT_WORDS = 16

POINTERS = (
    "slabs", "embedding", "norms", "qk_norms", "qkv_bias", "rope", "kv", "exchange", "prompt", "tokens", "logits",
    "stop_word", "report",
)  # fmt: skip


LATE_POINTERS = ("trace", "bias", "records", "scratch")
SAMPLE_POINTERS = ("pages", "stop_words", "choices", "logits_log")
DRAW, FILTER, PENALISE, BIAS, LOGPROBS = 1, 2, 4, 8, 16  # templates/common/args.h: Choice
BIAS_BYTES = 8  # a token's bias: its id, and FP32
FRACTIONS = 1 << 32  # top_p is told in such parts
NO_REACH = float(np.finfo(np.float32).max)


class KernelArgs(ctypes.Structure):
    """Natural C alignment. Pointers are addresses in the memory of the device; 0 stands for null."""

    _fields_ = [
        *[(name, ctypes.c_uint64) for name in POINTERS],
        ("start", ctypes.c_int32),
        ("n_prompt", ctypes.c_int32),
        ("max_new", ctypes.c_int32),
        ("n_stop", ctypes.c_int32),
        ("stop", ctypes.c_int32 * STOP_TOKENS),
        *[(name, ctypes.c_uint64) for name in LATE_POINTERS],
        ("seed", ctypes.c_uint64),
        ("choice", ctypes.c_uint32),
        ("top_p", ctypes.c_uint32),
        *[(name, ctypes.c_int32) for name in ("top_k", "n_history", "n_bias", "n_logprobs")],
        *[(name, ctypes.c_float) for name in ("inverse_temperature", "reach", "repetition", "inverse_repetition")],
        *[(name, ctypes.c_float) for name in ("presence", "frequency")],
    ]


class SampleArgs(KernelArgs):
    """The argument of kogc_samples (templates/cuda/sample_layout.cuh): what all launches have, and the samples' own."""

    _fields_ = [
        *[(name, ctypes.c_uint64) for name in SAMPLE_POINTERS],
        ("n_samples", ctypes.c_int32),
        ("n_pages", ctypes.c_int32),
    ]


Args = TypeVar("Args", bound=KernelArgs)


def kernel_args(
    pointers: dict[str, int],
    start: int,
    n_prompt: int,
    max_new: int,
    stop: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    n_history: int = 0,
) -> KernelArgs:
    """Fill the structure; a pointer not in `pointers` is null. ValueError for an unknown name or too many stops."""
    return _fill(KernelArgs, pointers, start, n_prompt, max_new, stop, sampling, n_history)


def sample_args(
    pointers: dict[str, int],
    n_samples: int,
    n_pages: int,
    start: int,
    max_new: int,
    stop: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    n_history: int = 0,
) -> SampleArgs:
    """The same for samples, whose prompt is one token; n_pages: chunks of the KV cache that each has for itself."""
    args = _fill(SampleArgs, pointers, start, 1, max_new, stop, sampling, n_history)
    args.n_samples, args.n_pages = n_samples, n_pages
    return args


def _fill(
    kind: type[Args],
    pointers: dict[str, int],
    start: int,
    n_prompt: int,
    max_new: int,
    stop: Sequence[int],
    sampling: Sampling,
    n_history: int,
) -> Args:
    known = [*POINTERS, *LATE_POINTERS, *(SAMPLE_POINTERS if kind is SampleArgs else ())]
    if unknown := set(pointers) - set(known):
        raise ValueError(f"no such kernel argument: {', '.join(sorted(unknown))}")
    if len(stop) > STOP_TOKENS:
        raise ValueError(f"{len(stop)} stop tokens: the kernel watches for at most {STOP_TOKENS}")
    args = kind(**pointers)
    args.start, args.n_prompt, args.max_new, args.n_stop = start, n_prompt, max_new, len(stop)
    args.stop[: len(stop)] = list(stop)
    args.n_history = n_history
    _fill_sampling(args, sampling)
    return args


def split_prompt(args: KernelArgs, vocab: int) -> KernelArgs:
    """Arguments of the passes over all of the prompt but its last token; `args` keep that one, and what follows it."""
    first = KernelArgs.from_buffer_copy(args)
    first.n_prompt, first.max_new, first.choice = args.n_prompt - 1, 0, 0
    args.start += first.n_prompt
    args.n_history += first.n_prompt
    args.prompt += 4 * first.n_prompt
    args.logits += 4 * vocab * first.n_prompt if args.logits else 0
    args.n_prompt = 1
    return first


def _fill_sampling(args: KernelArgs, s: Sampling) -> None:
    """ValueError for a draw without a seed: whoever launches has chosen one."""
    flags = {
        DRAW: not s.greedy,
        FILTER: s.filters,
        PENALISE: s.penalises,
        BIAS: bool(s.logit_bias),
        LOGPROBS: s.logprobs is not None,
    }
    args.choice = sum(flag for flag, wanted in flags.items() if wanted)
    args.n_bias, args.n_logprobs = len(s.logit_bias), s.logprobs or 0
    args.repetition, args.inverse_repetition = s.repetition_penalty, 1 / s.repetition_penalty
    args.presence, args.frequency = s.presence_penalty, s.frequency_penalty
    if s.greedy:
        return
    if s.seed is None:
        raise ValueError("a draw needs a seed")
    args.seed = s.seed
    args.inverse_temperature = 1 / s.temperature
    args.top_k = s.top_k
    args.top_p = min(max(round(s.top_p * FRACTIONS), 1), FRACTIONS - 1) if s.top_p < 1 else 0
    args.reach = -math.log(s.min_p) if s.min_p > 0 else NO_REACH


def bias_words(sampling: Sampling) -> NDArray[np.int32]:
    """The biases as the kernel reads them: int32[n][2], the second word holding FP32."""
    out = np.zeros((len(sampling.logit_bias), 2), np.int32)
    if sampling.logit_bias:
        tokens, values = zip(*sampling.logit_bias, strict=True)
        out[:, 0] = tokens
        out[:, 1] = np.array(values, np.float32).view(np.int32)
    return out


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities under the model's own distribution: the token's, and the likeliest tokens'.

    top: (token, log-probability), likeliest first; as many as were asked for, or as the vocabulary has.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def record_words(sampling: Sampling) -> int:
    """Words of one token's record; 0 where none is asked for."""
    return 0 if sampling.logprobs is None else 1 + 2 * sampling.logprobs


def read_record(words: NDArray[np.int32]) -> Logprobs:
    """From int32[1 + 2 n], as templates/common/logprobs.h writes it."""
    n = len(words) // 2
    numbers = words.view(np.float32)
    pairs = zip(words[1 : 1 + n].tolist(), numbers[1 + n :].tolist(), strict=True)
    return Logprobs(float(numbers[0]), tuple((token, value) for token, value in pairs if token >= 0))
