"""The loader over a toy kernel: arguments, checks, streaming, stopping, failures, and that everything is given back."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import random_checkpoint
from toy_kernel import Status, ToyDriver, continuation, next_token
from toy_session import CONTEXT, PROFILES, SPEC, VOCAB, Letters, Machine, install, make_program

import kogc
from kogc import artifact, rope, session, targets
from kogc.checkpoint import open_checkpoint
from kogc.errors import KogcError
from kogc.importer import spec_from_dir
from kogc.kv_layout import unpack_kv
from kogc.packing import SlabWeights, operands
from kogc.plan.plan import Options, Plan, make_plan
from kogc.profile import load_profile
from kogc.runtime import SITES, HostWords, Request, Runtime, cpu, open_runtime, stall_message, upload
from kogc.runtime.args import POINTERS, KernelArgs, Logprobs, kernel_args
from kogc.runtime.upload import read_exactly
from kogc.sampling import Sampling
from kogc.session import Session

# --- the argument structure -------------------------------------------------------------------------------------------


def test_arguments_have_the_layout_of_the_header() -> None:
    """Field by field against templates/common/args.h: order, and natural C alignment."""
    header = (Path(kogc.__file__).parent.parent / "templates/common/args.h").read_text()
    start = header.index("struct KernelArgs")
    body = header[start : header.index("};", start)]
    lines = [line.split("//")[0].strip() for line in body.splitlines()[1:]]
    names = [name for line in lines for name in re.findall(r"(\w+)(?:\[\w+\])?\s*[,;]", line)]
    assert names == [field[0] for field in KernelArgs._fields_]
    assert tuple(names[: len(POINTERS)]) == POINTERS
    places = {"start": 104, "n_stop": 116, "stop": 120, "trace": 184, "seed": 216, "choice": 224, "presence": 264}
    assert {name: getattr(KernelArgs, name).offset for name in places} == places
    assert ctypes.sizeof(KernelArgs) == 272


def test_sites_are_those_of_the_header() -> None:
    header = (Path(kogc.__file__).parent.parent / "templates/common/args.h").read_text()
    listed = re.search(r"enum Site \{([^}]*)\}", header)
    assert listed is not None
    assert len(listed[1].split(",")) == len(SITES)


def test_arguments_that_do_not_fit_are_refused() -> None:
    args = kernel_args({"slabs": 1 << 40, "report": 7}, 3, 2, 5, [4, 9])
    assert (args.slabs, args.report, args.logits, args.trace) == (1 << 40, 7, 0, 0)
    assert (args.start, args.n_prompt, args.max_new, args.n_stop, list(args.stop[:3])) == (3, 2, 5, 2, [4, 9, 0])
    with pytest.raises(ValueError, match="17 stop tokens"):
        kernel_args({}, 0, 1, 1, range(17))
    with pytest.raises(ValueError, match="no such kernel argument: slab"):
        kernel_args({"slab": 1}, 0, 1, 1)


def test_shared_words_lie_on_lines_of_their_own() -> None:
    memory = bytearray(HostWords.bytes(4))
    words = HostWords(memory, 4)
    words.clear()
    base = ctypes.addressof((ctypes.c_ubyte * len(memory)).from_buffer(memory))
    at = HostWords.pointers(base)
    assert [at["stop_word"] - base, at["report"] - base, at["tokens"] - base] == [0, 128, 256]
    assert memory[:256] == bytes(256)
    assert memory[256:] == b"\xff" * 16


# --- generating -------------------------------------------------------------------------------------------------------


def test_generates_what_the_kernel_makes(toy: Session) -> None:
    made = toy.generate([5, 6], max_new_tokens=8, stop=())
    assert made.tokens == continuation([5, 6], 8, VOCAB)
    assert (made.prompt_tokens, made.finish_reason, made.text) == (2, "length", "")
    assert made.seconds > 0


def test_all_of_a_prompt_but_its_last_token_goes_through_passes(machine: Machine, toy: Session) -> None:
    toy.generate([5, 6, 7], max_new_tokens=2, stop=())
    launch = machine.kernel.launches[-1]
    assert (launch.prompt, launch.in_passes) == ([5, 6, 7], 2)


def test_a_second_generation_starts_afresh(toy: Session) -> None:
    first = toy.generate([5, 6], 8, stop=())
    toy.generate([9], 20, stop=())
    assert toy.generate([5, 6], 8, stop=()).tokens == first.tokens


def test_stop_tokens_end_a_generation_and_give_no_text(machine: Machine, runtime: Runtime) -> None:
    expected = continuation([12], 6, VOCAB)
    made = Session(runtime, Letters(), (expected[3],)).generate("c", 30)  # type: ignore[arg-type]
    assert made.tokens == expected[:4]
    assert made.finish_reason == "stop"
    assert made.text == "".join(f"<{t}>" for t in expected[:3])


def test_held_back_text_comes_with_the_last_token(runtime: Runtime) -> None:
    odd = next(n for n in range(1, 20) if continuation([12], n, VOCAB)[-1] % 2)
    pieces = list(Session(runtime, Letters(), ()).stream("c", odd))  # type: ignore[arg-type]
    expected = continuation([12], odd, VOCAB)
    assert [p.token for p in pieces] == expected
    assert "".join(p.text for p in pieces) == "".join(f"<{t}>" for t in expected)


def test_sampling_reaches_the_kernel(machine: Machine, toy: Session) -> None:
    wanted = Sampling(top_k=9, logit_bias=((3, 0.5), (100, -2.0)), seed=1 << 40)
    toy.generate([5, 6], 4, stop=(), sampling=wanted)
    toy.generate([5, 6], 4, stop=())
    toy.runtime.run(Request((8,), 3, 2, sampling=Sampling(presence_penalty=1.0), history=(5, 6, 7)))
    sampled, greedy, seedless = machine.kernel.launches
    assert (sampled.choice, sampled.top_k, sampled.seed) == (1 | 2 | 8, 9, 1 << 40)
    assert sampled.bias == [(3, 0.5), (100, -2.0)]
    assert (greedy.choice, greedy.bias, greedy.history) == (0, [], [5])  # the cache held the prompt's first token
    assert (seedless.choice, seedless.prompt, seedless.history) == (1 | 4, [8], [5, 6, 7])
    assert seedless.seed > 0
    with pytest.raises(ValueError, match="a history of 2 tokens before position 1"):
        toy.runtime.run(Request((8,), 1, 2, history=(5, 6)))


def test_logprobs_come_with_their_tokens(toy: Session) -> None:
    for n, count in ((2, 5), (0, 3), (20, 40)):
        made = toy.generate([5, 6], count, stop=(), sampling=Sampling(seed=1, logprobs=n))
        assert made.tokens == continuation([5, 6], count, VOCAB)
        top = [tuple((token + i, -0.5 - i) for i in range(n)) for token in made.tokens]
        assert made.logprobs == [Logprobs(-0.5, pairs) for pairs in top]
    result = toy.runtime.run(Request((5, 6), max_new=5, sampling=Sampling(seed=1, logprobs=1)))
    assert [logprobs.top[0][0] for logprobs in result.logprobs] == result.tokens
    assert toy.generate([5, 6], 3, stop=()).logprobs == []


def test_the_context_ends_a_generation(toy: Session) -> None:
    made = toy.generate(list(range(3, 63)), 1000, stop=())
    assert len(made.tokens) == 4
    assert made.finish_reason == "context"


def test_pieces_arrive_while_the_kernel_runs(machine: Machine, toy: Session) -> None:
    machine.kernel.delay = 0.02
    stream = toy.stream([5], 40, stop=())
    next(stream)
    assert not hasattr(machine.kernel.launches[-1], "made"), "the kernel had ended before its first token was seen"
    stream.close()


def test_closing_a_stream_stops_the_kernel_and_waits(machine: Machine, toy: Session) -> None:
    machine.kernel.delay = 0.01
    with toy.stream([5], 60, stop=()) as stream:
        for _ in range(3):
            next(stream)
    assert 3 <= machine.kernel.launches[-1].made < 60
    assert stream.seconds > 0
    machine.kernel.delay = 0.0
    assert len(toy.generate([5], 7, stop=()).tokens) == 7


def test_an_unread_stream_launches_nothing(machine: Machine, toy: Session) -> None:
    toy.stream([5], 60).close()
    assert machine.kernel.launches == []


def test_one_generation_at_a_time(toy: Session) -> None:
    stream = toy.stream([5], 60, stop=())
    next(stream)
    with pytest.raises(KogcError, match="already generating"):
        toy.generate([6], 3)
    stream.close()
    assert toy.generate([6], 3, stop=()).tokens == continuation([6], 3, VOCAB)


def test_logits_continue_over_launches(machine: Machine, toy: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LOGIT_POSITIONS", 5)
    tokens = list(range(3, 15))
    logits = toy.logits(tokens)
    assert logits.shape == (12, VOCAB)
    assert logits.dtype == np.float32
    assert logits.argmax(axis=1).tolist() == [next_token(t, i, VOCAB) for i, t in enumerate(tokens)]
    assert [(x.start, len(x.prompt), x.max_new) for x in machine.kernel.launches] == [(0, 5, 0), (5, 5, 0), (10, 2, 0)]


def test_numpy_integers_are_token_ids(toy: Session) -> None:
    prompt: Any = np.array([5, 6], np.int64)
    assert toy.generate(prompt, 3, stop=()).tokens == continuation([5, 6], 3, VOCAB)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.generate([VOCAB]), r"prompt: token 101 is outside the vocabulary \(0 to 100\)"),
        (lambda s: s.generate([-1]), "token -1 is outside"),
        (lambda s: s.generate([1.5]), "must be integers"),
        (lambda s: s.generate("text"), "no tokenizer"),
        (lambda s: s.generate([3] * CONTEXT), "the prompt has 64 tokens, the context 64: no room"),
        (lambda s: s.generate([3], 0), "max_new_tokens: 0"),
        (lambda s: s.generate([3], 1, stop=range(17)), "17 tokens, the kernel watches for at most 16"),
        (lambda s: s.generate([3], 1, stop=[999]), "stop: token 999"),
        (lambda s: s.generate([3], stop_strings="ab"), "stop_strings: expected a sequence of strings"),
        (lambda s: s.generate([3], stop_strings=[7]), "stop_strings: expected a sequence of strings"),
        (lambda s: s.generate([3], stop_strings=None), "stop_strings: expected a sequence of strings"),
        (lambda s: s.generate([3], None), "max_new_tokens: None is not an integer"),
        (lambda s: s.generate([3], 1.5), "max_new_tokens: 1.5 is not an integer"),
        (lambda s: s.generate_many([3], "2"), "n: '2' is not an integer"),
        (lambda s: s.generate([3], sampling="greedy"), "sampling: 'greedy' is not a kogc.sampling.Sampling"),
        (lambda s: s.generate([3], stop_strings=["a", ""]), "stop_strings: a string is empty"),
        (lambda s: s.generate([3], stop_strings=["a"]), "stop_strings: this artifact has no tokenizer"),
        (lambda s: s.chat_tokens([{"role": "user", "content": "x"}]), "no chat template"),
        (lambda s: s.logits([]), "token_ids: empty"),
        (lambda s: s.logits([3] * (CONTEXT + 1)), "65 tokens, the context holds 64"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_before_a_launch(
    machine: Machine, toy: Session, call: Callable[[Session], Any], message: str
) -> None:
    with pytest.raises(KogcError, match=message) as caught:
        call(toy)
    assert "\n" not in str(caught.value)
    assert machine.kernel.launches == []


def test_an_empty_prompt_starts_from_the_begin_token(toy: Session) -> None:
    assert toy.generate([], 3, stop=()).tokens == continuation([1], 3, VOCAB)


def test_an_empty_prompt_without_begin_token_is_refused(machine: Machine, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, bos_token=None)
    with open_runtime(make_program(machine.target, tmp_path, spec)) as runtime:
        opened = Session(runtime, None, ())
        with pytest.raises(KogcError, match="the prompt is empty"):
            opened.generate([])


# --- failures while running -------------------------------------------------------------------------------------------


def test_a_stall_is_told_from_the_report(machine: Machine, toy: Session) -> None:
    machine.kernel.stall = [1, 17, 33, 6, 4, 9, 1, 0]
    with pytest.raises(KogcError, match="block 17, thread 33 waited for 'ffn hidden' in layer 4, step 9"):
        toy.generate([5], 5)


def test_a_failed_launch_raises_at_once(machine: Machine, toy: Session) -> None:
    machine.kernel.fail = 3
    with pytest.raises(KogcError, match="the kernel failed"):
        toy.generate([5], 5, stop=())


def test_an_unknown_site_is_still_reported() -> None:
    assert "site 99" in stall_message(np.array([1, 0, 0, 99, 0, 0, 0, 0] + [0] * 8, np.uint32))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_weights_reach_the_device(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through more chunks than there are staging buffers, of a size that does not divide the file."""
    plan = make_plan(SPEC, load_profile(PROFILES[machine.target]), Options(blocks=2))
    size = operands(plan)[-1].offset + operands(plan)[-1].bytes
    monkeypatch.setattr(upload, "CHUNK_BYTES", 10007)
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    with open_runtime(make_program(machine.target, tmp_path, weights=data.tobytes())) as runtime:
        assert np.array_equal(runtime.download("weights", 0, size), data)
        norms = runtime.program.operand("norms")
        assert np.array_equal(runtime.download("norms", 4, 8), data[norms.offset + 4 : norms.offset + 12])


def test_a_short_weights_file_is_refused(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(KogcError, match=r"weights\.bin: .*(ends at byte 5000|5000 bytes)"):
        open_runtime(make_program(machine.target, tmp_path, weights=bytes(5000)))
    assert machine.driver.live == {}


def test_dummy_weights(runtime: Runtime) -> None:
    norms = runtime.program.operand("norms")
    assert set(runtime.download("norms", 0, norms.bytes).view(np.uint16).tolist()) == {0x3F80}
    assert set(runtime.download("slabs", 0, 64).view(np.uint16).tolist()) == {1}
    frequencies = runtime.download("inv_freq", 0, SPEC.head_dim * 2).view(np.float32)
    assert np.array_equal(frequencies, rope.inv_freq(SPEC))


def test_fill_kv_fills_whole_chunks_of_every_head(machine: Machine, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, kv_heads=2, max_context=300)
    with open_runtime(make_program(machine.target, tmp_path, spec)) as runtime:
        chunk = 128 * spec.head_dim * 4
        runtime.fill_kv(0)
        assert not runtime.download("kv", 0, runtime.plan.kv_bytes).any()
        runtime.fill_kv(129)
        cache = runtime.download("kv", 0, runtime.plan.kv_bytes).view(np.uint16).reshape(4, 3, chunk // 2)
        assert (cache[:, :2] == 1000 + np.arange(4)[:, None, None]).all()
        assert not cache[:, 2].any()


def test_fill_kv_of_fp8_differs_from_head_to_head_and_in_size(machine: Machine, tmp_path: Path) -> None:
    """So that a kernel that reads another head, or another position's scale, is found out at depth."""
    spec = dataclasses.replace(SPEC, kv_heads=2, max_context=300)
    with open_runtime(make_program(machine.target, tmp_path, spec, kv_dtype="fp8")) as runtime:
        plan = runtime.plan
        runtime.fill_kv(129)
        cache = runtime.download("kv", 0, plan.kv_bytes).reshape(4, 3, plan.chunk_bytes)
        assert not cache[:, 2].any()
        heads = [unpack_kv(plan, plan.target, head, 256) for head in cache]
        for keys, values in heads:
            for vectors in (keys, values):
                sizes = np.abs(vectors).max(axis=1)
                assert set(np.ceil(np.log2(sizes)).tolist()) >= {-1, 0, 1}
        assert len({keys.tobytes() for keys, _ in heads}) == 4


def test_close_gives_everything_back_and_may_come_twice(machine: Machine, tmp_path: Path) -> None:
    runtime = open_runtime(make_program(machine.target, tmp_path))
    opened = Session(runtime, None, ())
    opened.logits([3, 4])
    opened.close()
    opened.close()
    assert machine.driver.live == {}
    with pytest.raises(KogcError, match="closed"):
        opened.generate([5])


def test_read_bandwidth_is_positive(machine: Machine, runtime: Runtime) -> None:
    before = len(machine.driver.live)
    assert 0 < runtime.read_bandwidth() < 1e15
    assert len(machine.driver.live) <= before + 1


# --- checks before loading --------------------------------------------------------------------------------------------


def set_all(**values: Any) -> Callable[[ToyDriver], None]:
    def apply(driver: ToyDriver) -> None:
        for name, value in values.items():
            assert hasattr(driver, name)
            setattr(driver, name, value)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_all(init=Status.CUDA_ERROR_NO_DEVICE), "no NVIDIA GPU"),
        (set_all(devices=0), "device 0: this machine has 0 GPUs"),
        (set_all(sms=114), r"for h200-sxm \(132 .*; this GPU is NVIDIA H200 \(114 SMs, .*: rebuild with --gpu auto"),
        (set_all(capability=(8, 0), name=b"NVIDIA A100"), "NVIDIA A100 .* capability 8.0.*: rebuild with --gpu auto"),
        (set_all(capability=(7, 5), name=b"Tesla T4"), "Tesla T4 .* capability 7.5.*: no shipped profile fits"),
        (set_all(version=12080), "driver supports CUDA 12.8, the binary was made by NVRTC 13.0"),
        (set_all(memory=1 << 20), r"toy with a context of 64 needs 0\.3 GB of GPU memory; 0\.0 of 0\.0 GB are free"),
        (set_all(load=Status.CUDA_ERROR_INVALID_IMAGE), "monokernel.bin: the driver does not load it"),
        (set_all(occupancy=0), "0 blocks of this kernel fit NVIDIA H200, it has 2"),
    ],
)  # fmt: skip
def test_a_gpu_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Callable[[ToyDriver], None], message: str
) -> None:
    machine = install("cuda", monkeypatch)
    change(machine.driver)
    with pytest.raises(KogcError, match=message) as caught:
        open_runtime(make_program("cuda", tmp_path))
    assert "\n" not in str(caught.value)
    assert machine.driver.live == {}


def test_a_cpu_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("cpu", monkeypatch)
    program = make_program("cpu", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with pytest.raises(KogcError, match="built for 2 cores; this process may use 1 core: rebuild"):
        open_runtime(program)
    open_runtime(program, oversubscribe=True).close()
    monkeypatch.setitem(sys.modules, "kogc.targets.cpu_features", SimpleNamespace(cpu_features=lambda: {"avx2", "fma"}))
    with pytest.raises(KogcError, match="this CPU has no f16c: rebuild with --gpu auto"):
        open_runtime(program)


def test_a_library_that_does_not_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "monokernel.bin").write_bytes(b"not a library")
    with pytest.raises(KogcError, match=r"monokernel\.bin: the system does not load it"):
        cpu._open_library(tmp_path / "monokernel.bin")


def test_reading_past_the_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"abc")
    file = os.open(tmp_path / "w", os.O_RDONLY)
    try:
        with pytest.raises(KogcError, match="ends at byte 3"):
            read_exactly(file, memoryview(bytearray(4)), 0, tmp_path / "w")
    finally:
        os.close(file)


# --- from the artifact ------------------------------------------------------------------------------------------------


def write_artifact(out: Path, plan: Plan, weights: artifact.Weights) -> None:
    """An artifact as the build writes it, around a binary that only the toy machine runs."""
    places = tuple(operands(plan))
    with artifact.Writer(out) as writer:
        writer.add(artifact.BINARY, b"binary")
        writer.finish(
            artifact.Manifest(
                kogc=kogc.__version__, tools={"nvrtc": "13.0"}, model=plan.spec.name, spec=plan.spec,
                config_sha256=None, hub=None, target=plan.target, arch=plan.profile.arch, sms=plan.profile.sms,
                profile=plan.profile, blocks=plan.blocks, threads=1, shared_memory=0,
                entry_points=targets.entry_points(plan), operands=places, weights=weights,
                weights_bytes=places[-1].offset + places[-1].bytes, slab_bytes=plan.slab_bytes,
                kv_dtype=plan.kv_dtype, kv_bytes=plan.kv_bytes, exchange_bytes=plan.exchanges.bytes,
                max_context=plan.max_context,
                rope_scaling=None, stop_tokens=plan.spec.eos_tokens, knobs=plan.knobs, notes=(),
                files=dict(writer.files),
            )
        )  # fmt: skip


def test_load_opens_an_artifact(machine: Machine, tmp_path: Path) -> None:
    plan = make_plan(SPEC, load_profile(PROFILES[machine.target]), Options(blocks=2))
    write_artifact(tmp_path / "a", plan, artifact.Weights(artifact.DUMMY))
    with kogc.load(tmp_path / "a") as opened:
        assert opened.max_context == CONTEXT
        assert opened.stop_tokens == (2,)
        assert opened.generate([5], 4, stop=()).tokens == continuation([5], 4, VOCAB)
    assert machine.driver.live == {}


def test_weights_by_reference_are_packed_at_load(machine: Machine, tmp_path: Path) -> None:
    source = random_checkpoint.make(tmp_path, "llama")
    spec, _ = spec_from_dir(source)
    plan = make_plan(spec, load_profile(PROFILES[machine.target]), Options(blocks=2))
    files = {"model.safetensors": artifact.hash_file(source / "model.safetensors")}
    write_artifact(tmp_path / "a", plan, artifact.Weights(artifact.REFERENCE, str(source), files))
    with kogc.load(tmp_path / "a") as opened, open_checkpoint(source, spec) as checkpoint:
        packed = SlabWeights(plan, lambda offset, n: opened.runtime.download("weights", offset, n).tobytes())
        name = "model.layers.1.mlp.up_proj.weight"
        assert np.array_equal(packed.tensor(name), checkpoint.float_rows(name, 0, spec.ffn))
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (source / "model.safetensors").write_bytes(data)
    with pytest.raises(KogcError, match=r"model\.safetensors: not the file that the artifact was built from"):
        kogc.load(tmp_path / "a")


def test_loading_needs_nothing_of_the_compiler() -> None:
    code = (
        "import sys, kogc.session, kogc.runtime.cuda, kogc.runtime.cpu, kogc.runtime.program\n"
        "unwanted = {'jinja2', 'yaml', 'click', 'torch', 'transformers', 'rich'}\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules} & unwanted))\n"
        "print(*sorted(m for m in sys.modules if m.startswith('cuda')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == []


def test_a_session_may_move_between_threads(toy: Session) -> None:
    results: list[list[int]] = []
    thread = threading.Thread(target=lambda: results.append(toy.generate([5, 6], 8, stop=()).tokens))
    thread.start()
    thread.join()
    assert results == [continuation([5, 6], 8, VOCAB)]


def test_run_gives_tokens_and_logits_of_one_launch(machine: Machine, runtime: Runtime) -> None:
    result = runtime.run(Request((5, 6), 7, 4, (), logits=True))
    assert result.tokens == continuation([5, 6], 4, VOCAB, start=7)
    assert result.logits is not None
    assert result.logits[-1].argmax() == result.tokens[0]
    assert machine.kernel.launches[-1].start == 7
