"""What a kernel with an FP8 cache must compute: the model over the very keys and values that it has stored.

A key that is a little different may round to the neighbour in E4M3, so logits are compared with a reference that sees
the stored ones, and the stored ones with those that the reference computes itself.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kogc.checkpoint import open_checkpoint
from kogc.kv_layout import unpack_kv
from kogc.plan.plan import Plan
from kogc.reference import KeyValue, Reference

USUAL = 0.035  # of a vector of numbers of all sizes: 0.026 by rounding to nearest, twice that by cutting off
MOST = 2.0**-4 + 1e-2  # of a vector's length: rounding to E4M3, and what a kernel in BF16 may be off


def stored(plan: Plan, cache: np.ndarray, count: int) -> list[KeyValue]:
    """Keys and values of the first `count` positions, per layer."""
    s = plan.spec
    heads = cache.reshape(s.layers, s.kv_heads, plan.chunks, plan.chunk_bytes)
    pairs = [[unpack_kv(plan, plan.target, head, count) for head in layer] for layer in heads]
    return [(np.stack([k for k, _ in layer]), np.stack([v for _, v in layer])) for layer in pairs]


def over_cache(plan: Plan, checkpoint: Path, tokens: list[int], cache: np.ndarray) -> np.ndarray:
    """FP32 logits [len(tokens), vocab] over the cache, whose keys and values are checked."""
    kept = stored(plan, cache, len(tokens))
    with open_checkpoint(checkpoint, plan.spec) as weights:
        logits, computed = Reference(plan.spec, weights).forward(tokens, stored=kept)
    for layer, (ours, own) in enumerate(zip(kept, computed, strict=True)):
        for name, a, b in zip(("key", "value"), ours, own, strict=True):
            error = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)
            assert error.max() <= MOST, f"a {name} of layer {layer} is off by {error.max():.2f}"
            assert error.mean() <= USUAL, f"{name}s of layer {layer} are off by {error.mean():.3f}"
            assert error.max() > 2.0**-9, f"the {name}s of layer {layer} are not rounded"
    return logits
