"""The tensor-core mat-vec by itself, on the emulated machine: each phase's products."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path

import numpy as np
import pytest
import random_checkpoint as rc
from emulated_cases import SMALL, Case, folder, plan_of
from emulator import Buffer, Emulated, EmulatorError

from kogc.checkpoint import to_float32
from kogc.packing import unpack_rows
from kogc.plan.plan import Plan
from kogc.runtime.args import REPORT_WORDS, kernel_args

# Streams the one layer and the head, and multiplies them with activations from memory. x: [phase][columns],
# y: [phase][rows], both as wide as the widest phase.
KERNEL = """
template <class P> void generate(const KernelArgs& args) {
  init_words<P>();
  Ring<P>::init();
  if (warp() == PRODUCER) {
    if (lane() != 0) return;
    const u8* from = args.slabs + block() * P::SLAB_BYTES;
    Producer<P> producer(args, from + P::SLAB_BYTES);
    producer.begin(0, from);
    for (int phase = QKV; phase <= HEAD && producer.copy(from, phase); phase++) {}
    return producer.drain();
  }
  constexpr int VECTORS = %(width)d / 4;
  Stream<P> stream;
  MatVec<P> products;
  const Where where = {args, 0, 0};
  for (int phase = QKV; phase <= HEAD; phase++) {
    const Work work = words<P>().work[phase];
    products.begin(stream, work, where);
    for (int v = thread(); v < work.columns / 4; v += THREADS)
      store_activation(activation<P>(), v, ((const Quad*)args.embedding)[phase * VECTORS + v]);
    sync();
    bool multiplied = false;
    products.run(stream, where, [&] { multiplied = true; }, [&](int i, const float (&y)[1][ROWS_TOGETHER]) {
      const bool last = i / (work.unit * P::PARTIAL_UNITS) == (work.units - 1) / P::PARTIAL_UNITS;
      if (multiplied != last) return;  // what is timed as products must be all of them, and no result of the last
      for (int e = 0; e < ROWS_TOGETHER && work.first + i + e < work.rows; e++)
        args.logits[phase * %(rows)d + work.first + i + e] = y[0][e];
    });
    sync();
  }
  if (thread() == 0) words<P>().finished = 1;
}
"""

WIDE = {"num_hidden_layers": 1, "hidden_size": 768, "intermediate_size": 1152, "head_dim": 64, "vocab_size": 131}
CASES = {
    "units-of-8": Case("llama", 1, SMALL),
    "few-units": Case("llama", 5, SMALL),
    "units-of-4": Case("llama", 7, WIDE, stages=4, knobs={"stage_bytes": 16384}),
    "fp16": Case("llama", 3, {**SMALL, "dtype": "float16"}),
}


@functools.cache
def planned(name: str) -> tuple[Plan, Path]:
    case = CASES[name]
    checkpoint = rc.make(Path(folder().name) / "matvec" / name, case.family, **case.overrides)
    return plan_of(case, checkpoint), checkpoint


class Products(Emulated):
    """The weights of a plan behind the kernel above."""

    def __init__(self, plan: Plan, checkpoint: Path, bug: tuple[str, str] | None = None) -> None:
        self.width = max(p.columns_padded for p in plan.layer_phases)
        self.rows = max(p.rows for p in plan.phases)

        def patch(headers: dict[str, str]) -> dict[str, str]:
            kernels, matvec = headers["cuda/kernels.cuh"], headers["cuda/matvec.cuh"]
            start = kernels.index("template <class P> KOGC_DEVICE void generate(")
            end = kernels.index("// to[i] = uniform in")
            own = kernels[:start] + KERNEL % {"width": self.width, "rows": self.rows} + kernels[end:]
            assert bug is None or bug[0] in matvec, "matvec.cuh has changed: plant the bug anew"
            return {**headers, "cuda/kernels.cuh": own, "cuda/matvec.cuh": matvec.replace(*bug) if bug else matvec}

        super().__init__(plan, checkpoint, patch)

    def multiply(self, x: np.ndarray, seed: int) -> np.ndarray:
        """x: uint16 [phases, width] -> float32 [phases, rows]."""
        own = {"embedding": Buffer(x.nbytes), "logits": Buffer(len(x) * self.rows * 4, 0xFF)}
        own["embedding"].bytes[:] = x.view(np.uint8).reshape(-1)
        buffers = {**self.buffers, **own, "report": Buffer(4 * REPORT_WORDS)}
        args = kernel_args({name: b.address for name, b in buffers.items()}, 0, 1, 0, ())
        message = ctypes.create_string_buffer(200)
        status = self.library.kogc_emulate(
            ctypes.byref(args),
            self.plan.blocks,
            self.plan.threads,
            self.plan.memory.bytes,
            ctypes.c_uint64(seed),
            message,
        )
        self.report = buffers["report"].bytes.view(np.uint32).tolist()
        self._check(status, message, buffers)
        return own["logits"].bytes.view(np.float32).reshape(len(x), self.rows)


def activations(plan: Plan, width: int) -> np.ndarray:
    """Random numbers of the weights' type in the columns that each phase has, zeros after them."""
    out = np.zeros((5, width), np.uint16)
    rng = np.random.default_rng(5)
    for i, phase in enumerate(plan.phases):
        values = rng.standard_normal(phase.columns).astype(np.float32)
        half = values.astype(np.float16).view(np.uint16)
        out[i, : phase.columns] = half if plan.spec.dtype == "fp16" else values.view(np.uint32) >> 16
    return out


def expected(products: Products, x: np.ndarray) -> list[np.ndarray]:
    """Each phase's products in float64, [rows]."""
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
        out.append(to_float32(x[i, : phase.columns], plan.spec.dtype).astype(np.float64) @ weights.T)
    return out


def largest_error(got: np.ndarray, exact: list[np.ndarray]) -> float:
    errors = [np.abs(g[: len(e)] - e).max() / np.abs(e).max() for g, e in zip(got, exact, strict=True)]
    return float(np.max(errors))  # NaN stays


@pytest.mark.parametrize("name", CASES)
def test_each_phase_multiplies(name: str) -> None:
    plan, checkpoint = planned(name)
    products = Products(plan, checkpoint)
    x = activations(plan, products.width)
    exact = expected(products, x)
    first = products.multiply(x, seed=1)
    assert largest_error(first, exact) < 1e-5  # FP32 sums of exact products
    again = products.multiply(x, seed=2)
    for a, b, e in zip(first, again, exact, strict=True):
        np.testing.assert_array_equal(a[: len(e)], b[: len(e)])


def test_the_cases_have_units_of_both_kinds() -> None:
    units = [{phase.unit for phase in planned(name)[0].phases} for name in CASES]
    assert {8} in units
    assert any(4 in kinds for kinds in units)


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("units-of-8", ("sum = c.ends ? 0 : sum;", "")),  # a unit's sum carried into the next
        ("units-of-8", ("to += c.ends * UNIT_BYTES;", "to += c.ends ? UNIT_BYTES : 0;")),
        ("units-of-8", ("if constexpr (FEW_GROUPS) to += wrap() * UNIT_BYTES;", "")),
        ("units-of-4", ("== (unit() == 8 ? 0 : lane() >> 4)", "== 0")),
        ("units-of-4", ("if (units) next_ -= groups_;", "if (units) next_ = 0;")),
        ("units-of-4", ("first + P::PARTIAL_UNITS >= units_", "first == 0")),
        ("units-of-4", ("if (++free_ == P::STAGES) free_ = 0;", "free_ = 0;")),
    ],
)
def test_a_planted_bug_is_noticed(name: str, bug: tuple[str, str]) -> None:
    plan, checkpoint = planned(name)
    products = Products(plan, checkpoint, bug)
    x = activations(plan, products.width)
    with contextlib.suppress(EmulatorError):
        assert not largest_error(products.multiply(x, seed=1), expected(products, x)) < 1e-5
