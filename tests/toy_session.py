"""A session over the toy kernel, on a toy machine of either target: fixtures of test_session*.py."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_kernel import ToyDriver, ToyKernel, ToyLibrary

from kogc import rope
from kogc.packing import operands
from kogc.plan.plan import Options, make_plan
from kogc.profile import load_profile
from kogc.runtime import Program, Runtime, cpu, open_runtime
from kogc.session import Session
from kogc.spec import ModelSpec, Rope

VOCAB, CONTEXT = 101, 64
SPEC = ModelSpec(
    name="toy", family="llama", layers=2, hidden=64, ffn=96, heads=2, kv_heads=1, head_dim=32, vocab=VOCAB,
    tied_embeddings=False, norm_eps=1e-5, max_context=CONTEXT, qkv_bias=False, qk_norm=False, sliding_window=None,
    sliding_layers=None, rope=Rope(10000.0), dtype="bf16", bos_token=1, eos_tokens=(2,),
)  # fmt: skip
PROFILES = {"cuda": "h200-sxm", "cpu": "cpu-avx2"}


@dataclasses.dataclass
class Machine:
    """A toy machine of one target."""

    target: str
    kernel: ToyKernel
    driver: ToyDriver


def install(target: str, monkeypatch: pytest.MonkeyPatch) -> Machine:
    kernel = ToyKernel(VOCAB)
    driver = ToyDriver(kernel)
    flags = load_profile(PROFILES["cpu"]).flags
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setitem(sys.modules, "kogc.targets.cpu_features", SimpleNamespace(cpu_features=lambda: set(flags)))
    monkeypatch.setattr(cpu, "_open_library", lambda path: ToyLibrary(kernel))
    monkeypatch.setattr(cpu, "CEILING_BYTES", 1 << 20)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    return Machine(target, kernel, driver)


@pytest.fixture(params=["cuda", "cpu"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return install(request.param, monkeypatch)


def make_program(
    target: str, path: Path, spec: ModelSpec = SPEC, weights: bytes | None = None, kv_dtype: str = "bf16"
) -> Program:
    plan = make_plan(spec, load_profile(PROFILES[target]), Options(blocks=2, kv_dtype=kv_dtype))
    (path / "monokernel.bin").write_bytes(b"binary")
    if weights is not None:
        (path / "weights.bin").write_bytes(weights)
    places = tuple(operands(plan))
    frequencies = rope.inv_freq(spec)
    return Program(
        plan=plan,
        binary=path / "monokernel.bin",
        operands=places,
        weights=None if weights is None else path / "weights.bin",
        inv_freq=frequencies,
        rope=rope.table(frequencies, plan.max_context),
        tools={"nvrtc": "13.0"},
    )


@pytest.fixture
def runtime(machine: Machine, tmp_path: Path) -> Iterator[Runtime]:
    with open_runtime(make_program(machine.target, tmp_path)) as opened:
        yield opened


@pytest.fixture
def toy(runtime: Runtime) -> Session:
    return Session(runtime, None, SPEC.eos_tokens)


class Letters:
    """A tokenizer of one letter a token, that holds a last odd token back as bytes of a character would be."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") + 10 for c in text]

    def stream(self, context: Any) -> Letters:
        self.held = ""
        return self

    def push(self, token: int) -> str:
        text, self.held = self.held + f"<{token}>", ""
        if token % 2:
            text, self.held = "", text
        return text

    def finish(self) -> str:
        return self.held
