"""The model in plain numpy FP32: what a kernel's logits are compared with. It shares no code with the kernel.

All tokens go through a layer together, so each weight is read once a call, in chunks of rows that are converted on
other threads while the matrix product of the last chunk runs.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from . import rope
from .spec import ModelSpec

F32 = npt.NDArray[np.float32]
KeyValue = tuple[F32, F32]

CHUNK_WEIGHTS = 1 << 22
THREADS = 4


class Weights(Protocol):
    """Where the weights come from, such as `Checkpoint` or `SlabWeights`; tied models have an lm_head.weight too."""

    def float_rows(self, name: str, start: int, stop: int) -> F32:
        """Rows start..stop of a matrix [stop - start, columns], or elements of a vector, under Hugging Face's names."""


class Reference:
    """A forward pass of `spec` in FP32 over the weights as they are stored (16-bit values, exactly widened)."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights
        self._frequencies = rope.inv_freq(spec)
        self._scaling = np.float32(rope.attention_scaling(spec))

    def logits(self, tokens: Sequence[int], past: Sequence[KeyValue] | None = None) -> F32:
        """Logits after each token: float32 [len(tokens), vocab]. See `forward` for `past`."""
        return self.forward(tokens, past)[0]

    def forward(
        self,
        tokens: Sequence[int],
        past: Sequence[KeyValue] | None = None,
        stored: Sequence[KeyValue] | None = None,
    ) -> tuple[F32, list[KeyValue]]:
        """Logits, and the keys and values of past and new tokens together.

        past: per layer (K, V), float32 [kv_heads, positions, head_dim] each, keys already rotated; its length is the
        position of tokens[0]. stored: the same of the new tokens, which attention then sees in place of those that are
        computed and returned. ValueError for no tokens, tokens outside the vocabulary, or past or stored of another
        shape.
        """
        s = self.spec
        if not tokens or min(tokens) < 0 or max(tokens) >= s.vocab:
            raise ValueError(f"tokens must be one or more numbers from 0 to {s.vocab - 1}")
        start = self._past_length(past)
        if stored is not None and self._past_length(stored) != len(tokens):
            raise ValueError(f"stored: keys and values of {self._past_length(stored)} tokens for {len(tokens)}")
        cos_sin = self._rotation(start, len(tokens))
        kv: list[KeyValue] = []
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            stream = _Stream(pool, self.weights)
            x = np.concatenate([stream.vector("model.embed_tokens.weight", t, t + 1) for t in tokens])
            for layer in range(s.layers):
                name = f"model.layers.{layer}."
                normed = self._norm(x, stream.vector(name + "input_layernorm.weight", 0, s.hidden))
                before = past[layer] if past is not None else None
                seen = stored[layer] if stored is not None else None
                mixed, keys_values = self._attention(stream, layer, normed, cos_sin, before, seen)
                kv.append(keys_values)
                x = x + stream.project(mixed, name + "self_attn.o_proj.weight", s.hidden)
                normed = self._norm(x, stream.vector(name + "post_attention_layernorm.weight", 0, s.hidden))
                x = x + stream.project(self._gated(stream, name, normed), name + "mlp.down_proj.weight", s.hidden)
            x = self._norm(x, stream.vector("model.norm.weight", 0, s.hidden))
            return stream.project(x, "lm_head.weight", s.vocab), kv

    def _past_length(self, past: Sequence[KeyValue] | None) -> int:
        if past is None:
            return 0
        s = self.spec
        length = past[0][0].shape[1] if past else 0
        shape = (s.kv_heads, length, s.head_dim)
        if len(past) != s.layers or any(x.shape != shape for pair in past for x in pair):
            raise ValueError(f"past must be {s.layers} pairs of arrays of one shape [{s.kv_heads}, n, {s.head_dim}]")
        return length

    def _norm(self, x: F32, weight: F32) -> F32:
        """Root-mean-square norm over the last axis."""
        mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
        out: F32 = weight * (x / np.sqrt(mean + np.float32(self.spec.norm_eps)))
        return out

    def _rotation(self, start: int, n: int) -> tuple[F32, F32]:
        """Cosine and sine of the positions from `start`: float32 [n, head_dim / 2] each."""
        positions = np.arange(start, start + n, dtype=np.float32)
        angles = positions[:, None] * self._frequencies[None, :]
        return np.cos(angles) * self._scaling, np.sin(angles) * self._scaling

    def _attention(
        self,
        stream: _Stream,
        layer: int,
        x: F32,
        cos_sin: tuple[F32, F32],
        past: KeyValue | None,
        stored: KeyValue | None,
    ) -> tuple[F32, KeyValue]:
        """Attention output before the O projection, [n, heads * head_dim], and all keys and values so far."""
        s = self.spec
        q = self._heads(stream, layer, "q", x, s.heads)
        k = self._heads(stream, layer, "k", x, s.kv_heads)
        v = self._heads(stream, layer, "v", x, s.kv_heads)
        q, k = _rotate(q, cos_sin), _rotate(k, cos_sin)
        start = past[0].shape[1] if past is not None else 0
        computed = _after(past, (k, v))
        k, v = computed if stored is None else _after(past, stored)
        hidden = _masked(start, len(x), s.window(layer))
        out = np.empty((len(x), s.heads, s.head_dim), np.float32)
        for head in range(s.heads):
            kv_head = head // s.group
            scores = (q[head] @ k[kv_head].T) * np.float32(s.head_dim**-0.5)
            scores[hidden] = -np.inf
            out[:, head] = _softmax(scores) @ v[kv_head]
        return out.reshape(len(x), -1), computed

    def _heads(self, stream: _Stream, layer: int, which: str, x: F32, heads: int) -> F32:
        """Projection to [heads, n, head_dim], with bias or norm where the model has them."""
        s = self.spec
        prefix = f"model.layers.{layer}.self_attn.{which}_"
        rows = heads * s.head_dim
        y = stream.project(x, prefix + "proj.weight", rows)
        if s.qkv_bias:
            y += stream.vector(prefix + "proj.bias", 0, rows)
        y = y.reshape(len(x), heads, s.head_dim)
        if s.qk_norm and which != "v":
            y = self._norm(y, stream.vector(prefix + "norm.weight", 0, s.head_dim))
        return np.ascontiguousarray(y.transpose(1, 0, 2))

    def _gated(self, stream: _Stream, name: str, x: F32) -> F32:
        """silu(gate(x)) * up(x): [n, ffn]."""
        names = (name + "mlp.gate_proj.weight", name + "mlp.up_proj.weight")
        out = np.empty((len(x), self.spec.ffn), np.float32)
        for start, stop, (gate_rows, up_rows) in stream.chunks(names, self.spec.ffn, self.spec.hidden):
            gate = x @ gate_rows.T
            with np.errstate(over="ignore"):  # exp(-gate) may be infinite: the quotient is then the right zero
                out[:, start:stop] = gate / (np.float32(1) + np.exp(-gate)) * (x @ up_rows.T)
        return out


class _Stream:
    """Weights in chunks of rows, read and widened ahead of their use."""

    def __init__(self, pool: ThreadPoolExecutor, weights: Weights) -> None:
        self._pool = pool
        self._weights = weights

    def vector(self, name: str, start: int, stop: int) -> F32:
        return self._weights.float_rows(name, start, stop)

    def project(self, x: F32, name: str, rows: int) -> F32:
        """x @ W.T: [n, rows]."""
        out = np.empty((len(x), rows), np.float32)
        for start, stop, (w,) in self.chunks((name,), rows, x.shape[1]):
            np.matmul(x, w.T, out=out[:, start:stop])
        return out

    def chunks(self, names: tuple[str, ...], rows: int, columns: int) -> Iterator[tuple[int, int, list[F32]]]:
        """(start, stop, those rows of each tensor), in order; a few chunks are under way at a time."""
        step = max(8, CHUNK_WEIGHTS // (columns * len(names)) // 8 * 8)
        ahead: deque[tuple[int, int, Future[list[F32]]]] = deque()
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            ahead.append((start, stop, self._pool.submit(self._read, names, start, stop)))
            if len(ahead) > THREADS:
                first, last, future = ahead.popleft()
                yield first, last, future.result()
        for first, last, future in ahead:
            yield first, last, future.result()

    def _read(self, names: tuple[str, ...], start: int, stop: int) -> list[F32]:
        return [self._weights.float_rows(name, start, stop) for name in names]


def _after(past: KeyValue | None, new: KeyValue) -> KeyValue:
    if past is None:
        return new
    return np.concatenate([past[0], new[0]], axis=1), np.concatenate([past[1], new[1]], axis=1)


def _rotate(x: F32, cos_sin: tuple[F32, F32]) -> F32:
    """Turn elements i and i + head_dim / 2 of each head: x [heads, n, head_dim]."""
    cos, sin = cos_sin
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _masked(start: int, n: int, window: int | None) -> npt.NDArray[np.bool_]:
    """True where a new token (row) may not see a position (column): [n, start + n]."""
    query = np.arange(start, start + n)[:, None]
    key = np.arange(start + n)[None, :]
    hidden: npt.NDArray[np.bool_] = key > query
    if window is not None:
        hidden |= key <= query - window
    return hidden


def _softmax(scores: F32) -> F32:
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out: F32 = scores / scores.sum(axis=-1, keepdims=True)
    return out
