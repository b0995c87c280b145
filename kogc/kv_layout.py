"""The inner layout of the KV cache: chunks of 128 positions, in the order in which the target's attention reads them.

A chunk is 2 * 128 * head_dim BF16 patterns, or as many E4M3 codes and 2 * 128 exponents (`kv_numbers`). On `cpu` it is
K [128][head_dim], then V the same. On GPUs it is eight tiles of 16 positions, each K and then V in the order in which
operands of matrix instructions lie in lanes. On `cuda`:

K [head_dim / 16][32 lanes][8 elements]: position r and dimension d of 16 belong to lane (r % 8) * 4 + d // 4 as element
d % 4 // 2 * 4 + r // 8 * 2 + d % 2.
V [head_dim / 16][32 lanes][8 elements]: position r and dimension d of 16 belong to lane (d % 8) * 4 + (r % 8) // 2 as
element d // 8 * 4 + r // 8 * 2 + r % 2.

On `hip`, where a lane of 64 (of 32) holds n = 4 (8) positions of the operand in 8 / n groups of 16 dimensions:

K [head_dim / 8][16 positions][8 dimensions].
V [head_dim / 16 * n / 8][16 / n][16 dimensions of a group][8 / n groups][n positions].

In FP8 the same, but on GPUs the middle two of every four codes change places, so that a word's even and odd bytes are
two pairs of neighbours; and exponents follow the values: on `cpu` those of 128 keys, then of the values, on GPUs behind
each tile. There, on `hip`, [16 keys][16 values]; on `cuda` [r % 8][key, value][r // 8]: four bytes for a lane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .checkpoint import F32, to_bf16, to_float32
from .kv_numbers import Bytes, from_fp8, to_fp8
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
# Exponents of a cuda tile: chunk, tile, r % 8, key or value, r // 8; plain: key or value first, then positions.
SCALES_TO_PLAIN = (3, 0, 1, 4, 2)
SCALES_TO_CUDA = (1, 2, 4, 0, 3)


def unpack_kv(plan: Plan, target: str, raw: Bytes, positions: int) -> tuple[F32, F32]:
    """(K, V), float32 [positions, head_dim] each, of one layer and KV head.

    raw: uint8 [chunks, plan.chunk_bytes] as the device holds it, with at least `positions` positions.
    """
    tiles, dim, fp8 = _tiles(target), plan.spec.head_dim, plan.kv_dtype == "fp8"
    raw = np.ascontiguousarray(raw).reshape(-1, plan.chunk_bytes)
    if not 0 <= positions <= len(raw) * CHUNK:
        raise ValueError(f"{positions} positions from {len(raw)} chunks of {CHUNK}")
    numbers = CHUNK // tiles * dim * (1 if fp8 else 2)  # bytes of the keys of a tile, and of its values
    parts = raw.reshape(len(raw), tiles, -1)
    plain = [
        _plain(plan, target, which, np.ascontiguousarray(parts[:, :, which * numbers :][:, :, :numbers]))
        for which in range(2)
    ]
    if not fp8:
        return tuple(to_float32(x[:positions], "bf16") for x in plain)  # type: ignore[return-value]
    scales = parts[:, :, 2 * numbers :]
    if target == "cuda":
        scales = scales.reshape(-1, tiles, 8, 2, 2).transpose(SCALES_TO_PLAIN)
    else:
        scales = scales.reshape(-1, tiles, 2, CHUNK // tiles).transpose(2, 0, 1, 3)
    both = zip(plain, scales.reshape(2, -1), strict=True)
    return tuple(from_fp8(codes[:positions], s[:positions]) for codes, s in both)  # type: ignore[return-value]


def pack_kv(plan: Plan, target: str, keys: F32, values: F32) -> Bytes:
    """The inverse: float32 [positions, head_dim] twice -> uint8 [chunks, plan.chunk_bytes], zeros after the end."""
    tiles, dim, fp8 = _tiles(target), plan.spec.head_dim, plan.kv_dtype == "fp8"
    chunks = -(-len(keys) // CHUNK)
    plain = np.zeros((2, chunks * CHUNK, dim), np.uint8 if fp8 else np.uint16)
    exponents = np.zeros((2, chunks * CHUNK), np.uint8)
    for which, vectors in enumerate((keys, values)):
        vectors = np.ascontiguousarray(vectors, np.float32)
        if fp8:
            plain[which, : len(vectors)], exponents[which, : len(vectors)] = to_fp8(vectors)
        else:
            plain[which, : len(vectors)] = to_bf16(vectors)
    parts = [
        _ordered(plan, target, which, half).reshape(chunks, tiles, -1).view(np.uint8)
        for which, half in enumerate(plain)
    ]
    if fp8:
        if target == "cuda":
            scales = exponents.reshape(2, chunks, tiles, 2, 8).transpose(SCALES_TO_CUDA)
        else:
            scales = exponents.reshape(2, chunks, tiles, CHUNK // tiles).transpose(1, 2, 0, 3)
        parts.append(scales.reshape(chunks, tiles, -1))
    return np.concatenate(parts, axis=2).reshape(chunks, plan.chunk_bytes)


def _plain(plan: Plan, target: str, which: int, part: Bytes) -> npt.NDArray[Any]:
    """Keys (0) or values (1) of all tiles, as patterns [positions, head_dim]."""
    dim, tiles, fp8 = plan.spec.head_dim, part.shape[1], plan.kv_dtype == "fp8"
    patterns: npt.NDArray[Any] = part if fp8 else part.view(np.uint16)
    if fp8 and target != "cpu":
        patterns = _swap_middle(patterns)
    if target == "cuda":
        patterns = patterns.reshape(-1, tiles, dim // 16, 8, 4, 2, 2, 2).transpose((K_TO_PLAIN, V_TO_PLAIN)[which])
    elif target == "hip":
        n, groups = _held(plan)
        if which == 0:
            patterns = patterns.reshape(-1, tiles, dim // 8, TILE, 8).transpose(K_TO_HIP)
        else:
            shape = (-1, tiles, dim // 16 // groups, TILE // n, 16, groups, n)
            patterns = patterns.reshape(shape).transpose(V_TO_PLAIN_FROM_HIP)
    return patterns.reshape(-1, dim)


def _ordered(plan: Plan, target: str, which: int, plain: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The inverse of `_plain`, flat."""
    dim, tiles = plan.spec.head_dim, _tiles(target)
    if target == "cuda":
        shape = (-1, tiles, 2, 8, dim // 16, 4, 2, 2) if which == 0 else (-1, tiles, 2, 4, 2, dim // 16, 2, 8)
        plain = plain.reshape(shape).transpose((K_TO_CUDA, V_TO_CUDA)[which])
    elif target == "hip":
        n, groups = _held(plan)
        if which == 0:
            plain = plain.reshape(-1, tiles, TILE, dim // 8, 8).transpose(K_TO_HIP)
        else:
            plain = plain.reshape(-1, tiles, TILE // n, n, dim // 16 // groups, groups, 16).transpose(V_TO_HIP)
    plain = np.ascontiguousarray(plain).reshape(-1)
    return _swap_middle(plain) if plan.kv_dtype == "fp8" and target != "cpu" else plain


def _swap_middle(codes: Bytes) -> Bytes:
    """The middle two of every four: its own inverse."""
    return np.ascontiguousarray(codes.reshape(-1, 2, 2).swapaxes(1, 2)).reshape(codes.shape)


def _held(plan: Plan) -> tuple[int, int]:
    """Positions that a lane holds of values, and of how many groups of dimensions it holds so many in 16 bytes."""
    n = 256 // plan.profile.lanes
    return n, 8 // n


def _tiles(target: str) -> int:
    """Tiles of a chunk."""
    if target not in TARGETS:
        raise ValueError(f"target {target!r}: one of {', '.join(TARGETS)}")
    return 1 if target == "cpu" else CHUNK // TILE
