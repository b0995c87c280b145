"""The numbers of the KV cache, in numpy: BF16, or E4M3 with a power of two for each key and each value.

templates/common/fp8.h does the same on the device. A vector is divided by the power of two that brings its largest
number to 128 .. 256, and rounded to E4M3 (finite; 8 bits with 3 of mantissa; to nearest, ties to even). The power is
kept as a byte, E8M0: a number is worth E4M3 * 2^(byte - 127). So nothing saturates and only what is 2^13 times smaller
than the vector's largest number is subnormal, whatever the range of a model's keys.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .checkpoint import F32, to_bf16, to_float32

Bytes = npt.NDArray[np.uint8]

TOP = 7  # log2 of what the largest number of a vector becomes at least
MOST_EXPONENT = 194
BIAS = 127
POWERS = np.exp2(np.minimum(np.arange(256) - BIAS, BIAS)).astype(np.float32)  # what an exponent stands for
LARGEST = np.float32(448)
SMALLEST_NORMAL = np.float32(2.0**-6)
SUBNORMAL_SHIFT = np.float32(2.0**14)  # beside it FP32 keeps multiples of 2^-9
DECODED = np.array(
    [
        (-1.0 if code & 0x80 else 1.0)
        * ((code & 7) * 2.0**-9 if not code & 0x78 else (8 + (code & 7)) * 2.0 ** ((code >> 3 & 15) - 10))
        for code in range(256)
    ],
    np.float32,
)  # the two NaNs of E4M3, which are never written, read as 480


def to_fp8(x: F32) -> tuple[Bytes, Bytes]:
    """(E4M3 codes of the shape of x, exponents of x.shape[:-1]): each vector along the last axis has its own power."""
    magnitude = np.abs(np.ascontiguousarray(x, np.float32)).max(axis=-1)
    exponents = np.clip((magnitude.view(np.uint32) >> 23).astype(np.int32) - TOP, 1, MOST_EXPONENT)
    return to_e4m3(x * POWERS[2 * BIAS - exponents][..., None]), exponents.astype(np.uint8)


def to_e4m3(x: F32) -> Bytes:
    """Codes of float32 numbers, rounded to nearest, ties to even, and saturated; what is no number as well."""
    words: npt.NDArray[np.uint32] = np.ascontiguousarray(x, np.float32).view(np.uint32)
    sign = words >> 24 & 0x80
    magnitude: F32 = np.fmin((words & 0x7FFFFFFF).view(np.float32), LARGEST)
    bounded = magnitude.view(np.uint32)
    normal = (bounded + 0x7FFFF + (bounded >> 20 & 1) >> 20) - (120 << 3)
    subnormal = (magnitude + SUBNORMAL_SHIFT).view(np.uint32) - SUBNORMAL_SHIFT.view(np.uint32)
    codes: Bytes = (sign | np.where(magnitude < SMALLEST_NORMAL, subnormal, normal)).astype(np.uint8)
    return codes


def from_fp8(codes: Bytes, exponents: Bytes) -> F32:
    """The inverse of `to_fp8`, but for what was rounded off."""
    out: F32 = DECODED[codes]
    out *= POWERS[exponents][..., None]
    return out


def round_kv(x: F32, kv_dtype: str) -> F32:
    """Keys or values [..., head_dim] as a cache of `kv_dtype` gives them back."""
    if kv_dtype == "fp8":
        return from_fp8(*to_fp8(x))
    return to_float32(to_bf16(np.ascontiguousarray(x)), "bf16")
