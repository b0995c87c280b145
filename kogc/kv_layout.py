"""The inner layout of the KV cache: chunks of 128 positions, K plain and V as the target's attention reads it.

A chunk is 2 * 128 * head_dim BF16 patterns, K first. K is [128][head_dim] everywhere. V is the same on `cpu`; on `cuda`
it is stored in the order of tensor-core fragments, [8 blocks of 16 positions][head_dim / 16][32 lanes][8 elements]:
position r and dimension d (both below 16) belong to lane (d % 8) * 4 + (r % 8) // 2 as element
d // 8 * 4 + r // 8 * 2 + r % 2.
"""

from __future__ import annotations

import numpy as np

from .checkpoint import F32, Bits, to_bf16, to_float32
from .plan.plan import CHUNK, Plan

TARGETS = ("cuda", "cpu")
# Axes of V in a cuda chunk, outermost first: chunk, block of 16, tile of 16 dims, d % 8, r % 8 // 2, d // 8, r // 8,
# r % 2; and the order that makes them chunk, position (4 axes), dimension (3 axes). TO_CUDA is the inverse.
TO_PLAIN = (0, 1, 6, 4, 7, 2, 5, 3)
TO_CUDA = (0, 1, 5, 7, 3, 6, 2, 4)


def unpack_kv(plan: Plan, target: str, raw: Bits, positions: int) -> tuple[F32, F32]:
    """(K, V), float32 [positions, head_dim] each, of one layer and KV head.

    raw: uint16 [chunks, 2 * 128 * head_dim] as the device holds it, with at least `positions` positions.
    """
    _check(target)
    dim = plan.spec.head_dim
    halves = np.ascontiguousarray(raw).reshape(-1, 2, CHUNK * dim)
    if not 0 <= positions <= len(halves) * CHUNK:
        raise ValueError(f"{positions} positions from {len(halves)} chunks of {CHUNK}")
    keys, values = halves[:, 0], halves[:, 1]
    if target == "cuda":
        values = values.reshape(-1, 8, dim // 16, 8, 4, 2, 2, 2).transpose(TO_PLAIN)
    return tuple(to_float32(x.reshape(-1, dim)[:positions], "bf16") for x in (keys, values))  # type: ignore[return-value]


def pack_kv(plan: Plan, target: str, keys: F32, values: F32) -> Bits:
    """The inverse: float32 [positions, head_dim] twice -> uint16 [chunks, 2 * 128 * head_dim], zeros after the end."""
    _check(target)
    dim = plan.spec.head_dim
    chunks = -(-len(keys) // CHUNK)
    out = np.zeros((chunks, 2, CHUNK * dim), np.uint16)
    for half, vectors in enumerate((keys, values)):
        plain = np.zeros((chunks * CHUNK, dim), np.uint16)
        plain[: len(vectors)] = to_bf16(np.ascontiguousarray(vectors, np.float32))
        if half == 1 and target == "cuda":
            plain = plain.reshape(chunks, 8, 2, 4, 2, dim // 16, 2, 8).transpose(TO_CUDA)
        out[:, half] = plain.reshape(chunks, CHUNK * dim)
    return out.reshape(chunks, 2 * CHUNK * dim)


def _check(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"target {target!r}: one of {', '.join(TARGETS)}")
