"""What the kernel should choose: Transformers' own processors on the logits, then the noise that a seed stands for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kogc.sampling import Sampling

F64 = NDArray[np.float64]


def philox(key: tuple[int, int], counter: Sequence[NDArray[np.uint64] | int]) -> list[NDArray[np.uint64]]:
    """Philox4x32-10: four words of 32 bits from a counter of four."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, np.uint64) for word in counter]
    k = list(key)
    for _ in range(10):
        p, q = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [q >> shift ^ c[1] ^ np.uint64(k[0]), q & mask, p >> shift ^ c[3] ^ np.uint64(k[1]), p & mask]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def noise(seed: int, position: int, vocab: int) -> F64:
    """Gumbel noise of every row of the vocabulary: four rows share a counter."""
    groups = np.arange(-(-vocab // 4), dtype=np.uint64)
    words = philox((seed & 0xFFFFFFFF, seed >> 32), (groups, np.uint64(position), np.uint64(0), np.uint64(0)))
    bits = np.stack(words, axis=1).reshape(-1)[:vocab].astype(np.float64)
    return -np.log(-np.log1p(-(bits + 0.5) / 2**32))


def processed(logits: NDArray[np.float32], sampling: Sampling, prompt: list[int], made: list[int]) -> F64:
    """The scores that a token is drawn from; -inf: not admitted."""
    scores = torch.tensor(logits)[None]
    ids = torch.tensor([prompt + made])
    if sampling.logit_bias:
        scores = SequenceBiasLogitsProcessor([[[t], b] for t, b in sampling.logit_bias])(ids, scores)
    scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(made, dtype=torch.int64), minlength=len(logits))
    scores = scores - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    for warper in warpers(sampling):
        scores = warper(ids, scores)
    return scores[0].double().numpy()


def warpers(s: Sampling) -> list[LogitsProcessor]:
    """In the order of generate()."""
    if s.greedy:
        return []
    out: list[LogitsProcessor] = [TemperatureLogitsWarper(s.temperature)]
    out += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    out += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    return out + ([MinPLogitsWarper(s.min_p)] if s.min_p else [])


def choice(scores: F64, sampling: Sampling, position: int) -> tuple[int, float]:
    """The token, and by how much it is ahead of the next best."""
    noisy = scores if sampling.greedy else scores + noise(sampling.seed or 0, position, len(scores))
    best, second = np.argsort(noisy)[::-1][:2]
    return int(best), float(noisy[best] - noisy[second])
