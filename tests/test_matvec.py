"""The tensor-core mat-vec by itself, on the emulated machine: each phase's products, for one token and for several."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import random_checkpoint as rc
from emulated_cases import SMALL, Case, plan_of
from emulator import Buffer, Emulated, EmulatorError

from kogc.checkpoint import to_float32
from kogc.packing import unpack_rows
from kogc.plan.plan import Plan
from kogc.runtime.args import REPORT_WORDS, kernel_args

# Streams the one layer and the head, and multiplies them with activations from memory. x: [phase][token][columns],
# y: [phase][token][rows], both as wide as the widest phase.
KERNEL = """
template <class P> struct Several : P {
  static constexpr int TOKENS = %(tokens)d;
  static constexpr int ACTIVATION_OFFSET = (P::SHARED_BYTES + 127) / 128 * 128;
  static constexpr int PARTIAL_OFFSET = ACTIVATION_OFFSET + TOKENS * Pass<P>::ACTIVATION_BYTES;
};

template <class P> void generate(const KernelArgs& args) {
  using S = Several<P>;
  init_words<S>();
  Ring<S>::init();
  if (warp() == PRODUCER) {
    if (lane() != 0) return;
    const u8* from = args.slabs + block() * P::SLAB_BYTES;
    Producer<S> producer(args, from + P::SLAB_BYTES);
    producer.begin(0, from);
    for (int phase = QKV; phase <= HEAD && producer.copy(from, phase); phase++) {}
    return producer.drain();
  }
  constexpr int VECTORS = Pass<P>::ACTIVATION_BYTES / 8;
  Stream<S> stream;
  MatVec<S> products;
  const Where where = {args, 0, 0};
  for (int phase = QKV; phase <= HEAD; phase++) {
    const Work work = words<S>().work[phase];
    products.begin(stream, work, where);
    for (int token = 0; token < S::TOKENS; token++)
      for (int v = thread(); v < VECTORS; v += THREADS)
        store_activation(activation<S>(token), v,
                         ((const Quad*)args.embedding)[(phase * S::TOKENS + token) * VECTORS + v]);
    sync();
    products.run(stream, where, [] {}, [&](int i, const float (&y)[S::TOKENS][ROWS_TOGETHER]) {
      for (int token = 0; token < S::TOKENS; token++)
        for (int e = 0; e < ROWS_TOGETHER && work.first + i + e < work.rows; e++)
          args.logits[(phase * S::TOKENS + token) * %(rows)d + work.first + i + e] = y[token][e];
    });
    sync();
  }
  if (thread() == 0) words<S>().finished = 1;
}
"""

WIDE = {"num_hidden_layers": 1, "hidden_size": 768, "intermediate_size": 1152, "head_dim": 64, "vocab_size": 131}
CASES = {
    "units-of-8": Case("llama", 1, SMALL),
    "units-of-4": Case("llama", 5, SMALL),
    "groups-of-4": Case("llama", 7, WIDE, stages=4, knobs={"stage_bytes": 16384}),
    "fp16": Case("llama", 3, {**SMALL, "dtype": "float16"}),
}


@functools.cache
def planned(name: str) -> tuple[Plan, Path]:
    case = CASES[name]
    folder = Path(tempfile.mkdtemp(prefix="kogc-matvec-"))
    checkpoint = rc.make(folder / name, case.family, **case.overrides)
    return plan_of(case, checkpoint), checkpoint


class Products(Emulated):
    """The weights of a plan behind the kernel above."""

    def __init__(self, plan: Plan, checkpoint: Path, tokens: int, bug: tuple[str, str] | None = None) -> None:
        self.tokens = tokens
        self.width = max(p.columns_padded for p in plan.layer_phases)
        self.rows = max(p.rows for p in plan.phases)

        def patch(headers: dict[str, str]) -> dict[str, str]:
            kernels, matvec = headers["cuda/kernels.cuh"], headers["cuda/matvec.cuh"]
            start = kernels.index("template <class P> KOGC_DEVICE void generate(")
            end = kernels.index("// to[i] = uniform in")
            own = kernels[:start] + KERNEL % {"tokens": tokens, "rows": self.rows} + kernels[end:]
            assert bug is None or bug[0] in matvec, "matvec.cuh has changed: plant the bug anew"
            return {**headers, "cuda/kernels.cuh": own, "cuda/matvec.cuh": matvec.replace(*bug) if bug else matvec}

        super().__init__(plan, checkpoint, patch)

    def multiply(self, x: np.ndarray, seed: int) -> np.ndarray:
        """x: uint16 [phases, tokens, width] -> float32 [phases, tokens, rows]."""
        own = {"embedding": Buffer(x.nbytes), "logits": Buffer(len(x) * self.tokens * self.rows * 4, 0xFF)}
        own["embedding"].bytes[:] = x.view(np.uint8).reshape(-1)
        buffers = {**self.buffers, **own, "report": Buffer(4 * REPORT_WORDS)}
        args = kernel_args({name: b.address for name, b in buffers.items()}, 0, 1, 0, ())
        shared = self.plan.memory.bytes + 128 + self.tokens * (2 * self.width + self.plan.memory["partial"].bytes)
        message = ctypes.create_string_buffer(200)
        status = self.library.kogc_emulate(
            ctypes.byref(args), self.plan.blocks, self.plan.threads, shared, ctypes.c_uint64(seed), message
        )
        self.report = buffers["report"].bytes.view(np.uint32).tolist()
        self._check(status, message, buffers)
        return own["logits"].bytes.view(np.float32).reshape(len(x), self.tokens, self.rows)


def activations(plan: Plan, tokens: int, width: int) -> np.ndarray:
    """Random numbers of the weights' type in the columns that each phase has, zeros after them."""
    out = np.zeros((5, tokens, width), np.uint16)
    rng = np.random.default_rng(tokens)
    for i, phase in enumerate(plan.phases):
        values = rng.standard_normal((tokens, phase.columns)).astype(np.float32)
        half = values.astype(np.float16).view(np.uint16)
        out[i, :, : phase.columns] = half if plan.spec.dtype == "fp16" else values.view(np.uint32) >> 16
    return out


def expected(products: Products, x: np.ndarray) -> list[np.ndarray]:
    """Each phase's products in float64, [tokens, rows]."""
    plan, slabs = products.plan, products.buffers["slabs"].bytes
    out = []
    for i, phase in enumerate(plan.phases):
        rows = []
        for block in range(plan.blocks):
            layer = 1 if phase is plan.head else 0
            start = block * plan.slab_bytes + plan.slab_offset(layer, phase, block)
            data = slabs[start : start + phase.bytes_of(block)].tobytes()
            rows.append((phase.rows_of(block).start, to_float32(unpack_rows(phase, block, data), plan.spec.dtype)))
        weights = np.concatenate([w for _, w in sorted(rows, key=lambda pair: pair[0]) if len(w)]).astype(np.float64)
        out.append(to_float32(x[i, :, : phase.columns], plan.spec.dtype).astype(np.float64) @ weights.T)
    return out


def largest_error(got: np.ndarray, exact: list[np.ndarray]) -> float:
    errors = [np.abs(g[:, : e.shape[1]] - e).max() / np.abs(e).max() for g, e in zip(got, exact, strict=True)]
    return float(np.max(errors))  # NaN stays


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9, 16])
@pytest.mark.parametrize("name", CASES)
def test_each_phase_multiplies_every_token(name: str, tokens: int) -> None:
    plan, checkpoint = planned(name)
    products = Products(plan, checkpoint, tokens)
    x = activations(plan, tokens, products.width)
    exact = expected(products, x)
    first = products.multiply(x, seed=1)
    assert largest_error(first, exact) < 1e-5  # FP32 sums of exact products
    again = products.multiply(x, seed=2)
    for a, b, e in zip(first, again, exact, strict=True):
        np.testing.assert_array_equal(a[:, : e.shape[1]], b[:, : e.shape[1]])


def test_the_cases_have_units_of_both_kinds() -> None:
    units = [{phase.unit for phase in planned(name)[0].phases} for name in CASES]
    assert {8} in units
    assert any(4 in kinds for kinds in units)


@pytest.mark.parametrize(
    "bug",
    [
        ("x_ += (unit() == 8 ? column / 2 : column / 4) % PER_TILE * Pass<P>::ACTIVATION_BYTES;", ""),
        ("from + j * (PER_TILE * Pass<P>::ACTIVATION_BYTES)", "from"),
        ("if (j * PER_TILE + token < TOKENS) sums", "sums"),
        ("add_up(token, row, y[token])", "add_up(0, row, y[token])"),
    ],
)
def test_a_planted_bug_is_noticed(bug: tuple[str, str]) -> None:
    plan, checkpoint = planned("units-of-4")
    products = Products(plan, checkpoint, 5, bug)
    x = activations(plan, 5, products.width)
    with contextlib.suppress(EmulatorError):
        assert not largest_error(products.multiply(x, seed=1), expected(products, x)) < 1e-5
