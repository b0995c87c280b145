"""Rotary position embedding: frequencies and the table of cosines and sines, as Transformers computes them in FP32."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .spec import ModelSpec, RopeScaling

F32 = npt.NDArray[np.float32]


def inv_freq(spec: ModelSpec) -> F32:
    """Radians per position of each rotated pair: float32[head_dim / 2], scaling applied.

    Element i turns elements i and i + head_dim / 2 of a head.
    """
    # The exponent and each later step are rounded to FP32 where the reference rounds them; only the power itself is
    # taken in FP64 first, since FP32 powers differ between mathematics libraries.
    exponent = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
    theta = np.float64(np.float32(spec.rope.theta))
    powers: F32 = (theta ** exponent.astype(np.float64)).astype(np.float32)
    plain: F32 = (np.float32(1.0) / powers).astype(np.float32)
    scaling = spec.rope.scaling
    if scaling is None:
        return plain
    if scaling.type == "linear":
        linear: F32 = plain / np.float32(scaling.factor)
        return linear
    if scaling.type == "llama3":
        return _llama3(plain, scaling)
    if scaling.type == "yarn":
        return _yarn(powers, spec.head_dim, spec.rope.theta, scaling)
    raise ValueError(f"rope scaling {scaling.type!r} has no frequencies here")


def attention_scaling(spec: ModelSpec) -> float:
    """The factor on every cosine and sine: 1 except for yarn."""
    scaling = spec.rope.scaling
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return _need(scaling.attention_factor)


def table(frequencies: F32, n: int, scaling: float = 1.0) -> F32:
    """(cosine, sine) of positions 0 .. n-1: float32[n, len(frequencies), 2], multiplied by `scaling`.

    The angle is an FP32 product, as in the reference: at high positions its rounding is far from negligible, so an
    exact angle would be a different model.
    """
    positions = np.arange(n, dtype=np.float32)
    angles = (positions[:, None] * frequencies[None, :].astype(np.float32)).astype(np.float64)
    out = np.empty((n, len(frequencies), 2), dtype=np.float32)
    out[:, :, 0] = np.cos(angles)
    out[:, :, 1] = np.sin(angles)
    if scaling != 1.0:
        out *= np.float32(scaling)
    return out


def _llama3(plain: F32, scaling: RopeScaling) -> F32:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    original = float(_need(scaling.original_max_position))
    low, high = _need(scaling.low_freq_factor), _need(scaling.high_freq_factor)
    factor = np.float32(scaling.factor)
    # The reference divides a number by a tensor as reciprocal, then product: two roundings.
    one = np.float32(1.0)
    wavelength: F32 = (one / plain) * np.float32(2 * math.pi)
    stretched = np.where(wavelength > np.float32(original / low), plain / factor, plain).astype(np.float32)
    smooth = ((one / wavelength) * np.float32(original) - np.float32(low)) / np.float32(high - low)
    blended = (one - smooth) * stretched / factor + smooth * stretched
    between = (wavelength >= np.float32(original / high)) & (wavelength <= np.float32(original / low))
    return np.where(between, blended, stretched).astype(np.float32)


def _yarn(powers: F32, dim: int, theta: float, scaling: RopeScaling) -> F32:
    """A ramp over the pairs blends kept frequencies (fast pairs) with stretched ones (slow pairs)."""
    original = float(_need(scaling.original_max_position))

    def pair_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(_need(scaling.beta_fast)), pair_of(_need(scaling.beta_slow))
    if scaling.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, float(dim - 1))
    if low == high:
        high += 0.001  # keep the ramp finite
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = np.float32(1.0) - ramp.astype(np.float32)
    plain = np.float32(1.0) / powers
    stretched = np.float32(1.0) / (np.float32(scaling.factor) * powers)
    out: F32 = (stretched * (np.float32(1.0) - kept) + plain * kept).astype(np.float32)
    return out


def _need(value: float | None) -> float:
    if value is None:
        raise ValueError("a field that this rope scaling needs is missing; validate() reports which")
    return value
