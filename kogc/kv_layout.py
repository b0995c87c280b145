"""The inner layout of the KV cache: chunks of 128 positions, in the order in which the target's attention reads them.

A chunk is 2 * 128 * head_dim BF16 patterns. On `cpu` it is K [128][head_dim], then V the same. On GPUs it is eight
tiles of 16 positions, each K and then V in the order in which operands of matrix instructions lie in lanes. On `cuda`:

K [head_dim / 16][32 lanes][8 elements]: position r and dimension d of 16 belong to lane (r % 8) * 4 + d // 4 as element
d % 4 // 2 * 4 + r // 8 * 2 + d % 2.
V [head_dim / 16][32 lanes][8 elements]: position r and dimension d of 16 belong to lane (d % 8) * 4 + (r % 8) // 2 as
element d // 8 * 4 + r // 8 * 2 + r % 2.

On `hip`, where a lane of 64 (of 32) holds n = 4 (8) positions of the operand in 8 / n groups of 16 dimensions:

K [head_dim / 8][16 positions][8 dimensions].
V [head_dim / 16 * n / 8][16 / n][16 dimensions of a group][8 / n groups][n positions].
"""

from __future__ import annotations

import numpy as np

from .checkpoint import F32, Bits, to_bf16, to_float32
from .plan.plan import CHUNK, Plan

TARGETS = ("cuda", "hip", "cpu")
TILE = 16  # positions
# Axes of a cuda tile, outermost first, and the order that makes them position axes, then dimension axes.
# K: chunk, tile, d // 16, r % 8, d % 16 // 4, d % 4 // 2, r // 8, d % 2.
K_TO_PLAIN = (0, 1, 6, 3, 2, 4, 5, 7)
K_TO_CUDA = (0, 1, 4, 3, 5, 6, 2, 7)
# V: chunk, tile, d // 16, d % 8, r % 8 // 2, d % 16 // 8, r // 8, r % 2.
V_TO_PLAIN = (0, 1, 6, 4, 7, 2, 5, 3)
V_TO_CUDA = (0, 1, 5, 7, 3, 6, 2, 4)
# The same of a hip tile. K: chunk, tile, d // 8, r, d % 8: its own inverse.
K_TO_HIP = (0, 1, 3, 2, 4)
# V: chunk, tile, d // 16 // groups, r // n, d % 16, d // 16 % groups, r % n.
V_TO_PLAIN_FROM_HIP = (0, 1, 3, 6, 2, 5, 4)
V_TO_HIP = (0, 1, 4, 2, 6, 5, 3)


def unpack_kv(plan: Plan, target: str, raw: Bits, positions: int) -> tuple[F32, F32]:
    """(K, V), float32 [positions, head_dim] each, of one layer and KV head.

    raw: uint16 [chunks, 2 * 128 * head_dim] as the device holds it, with at least `positions` positions.
    """
    _check(target)
    dim = plan.spec.head_dim
    tiles = 1 if target == "cpu" else CHUNK // TILE
    halves = np.ascontiguousarray(raw).reshape(-1, tiles, 2, CHUNK // tiles * dim)
    if not 0 <= positions <= len(halves) * CHUNK:
        raise ValueError(f"{positions} positions from {len(halves)} chunks of {CHUNK}")
    keys, values = halves[:, :, 0], halves[:, :, 1]
    if target == "cuda":
        keys = keys.reshape(-1, tiles, dim // 16, 8, 4, 2, 2, 2).transpose(K_TO_PLAIN)
        values = values.reshape(-1, tiles, dim // 16, 8, 4, 2, 2, 2).transpose(V_TO_PLAIN)
    elif target == "hip":
        n, groups = _held(plan)
        keys = keys.reshape(-1, tiles, dim // 8, TILE, 8).transpose(K_TO_HIP)
        shape = (-1, tiles, dim // 16 // groups, TILE // n, 16, groups, n)
        values = values.reshape(shape).transpose(V_TO_PLAIN_FROM_HIP)
    return tuple(to_float32(x.reshape(-1, dim)[:positions], "bf16") for x in (keys, values))  # type: ignore[return-value]


def pack_kv(plan: Plan, target: str, keys: F32, values: F32) -> Bits:
    """The inverse: float32 [positions, head_dim] twice -> uint16 [chunks, 2 * 128 * head_dim], zeros after the end."""
    _check(target)
    dim = plan.spec.head_dim
    chunks, tiles = -(-len(keys) // CHUNK), 1 if target == "cpu" else CHUNK // TILE
    plain = np.zeros((2, chunks * CHUNK, dim), np.uint16)
    for half, vectors in zip(plain, (keys, values), strict=True):
        half[: len(vectors)] = to_bf16(np.ascontiguousarray(vectors, np.float32))
    k, v = plain
    if target == "cuda":
        k = k.reshape(chunks, tiles, 2, 8, dim // 16, 4, 2, 2).transpose(K_TO_CUDA)
        v = v.reshape(chunks, tiles, 2, 4, 2, dim // 16, 2, 8).transpose(V_TO_CUDA)
    elif target == "hip":
        n, groups = _held(plan)
        k = k.reshape(chunks, tiles, TILE, dim // 8, 8).transpose(K_TO_HIP)
        v = v.reshape(chunks, tiles, TILE // n, n, dim // 16 // groups, groups, 16).transpose(V_TO_HIP)
    out = np.stack([x.reshape(chunks, tiles, CHUNK // tiles * dim) for x in (k, v)], axis=2)
    return out.reshape(chunks, 2 * CHUNK * dim)


def _held(plan: Plan) -> tuple[int, int]:
    """Positions that a lane holds of values, and of how many groups of dimensions it holds so many in 16 bytes."""
    n = 256 // plan.profile.lanes
    return n, 8 // n


def _check(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"target {target!r}: one of {', '.join(TARGETS)}")
