"""The command line: what commands print, and that an error is one line and an exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builds import (
    TOP,
    child_seconds,
    kogc_cli,
    kogc_process,
    one_line,
    process_command,
    process_env,
    stub_compiler,
    tree,
)
from random_checkpoint import edit_config, make

from kogc import targets
from kogc.cli import COMMANDS
from kogc.profile import list_profiles, load_profile
from kogc.spec import dump_spec, list_specs, load_spec
from kogc.targets.detect_cuda import CudaDevice, profile_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("checkpoint"), "qwen3", tokenizer=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOGC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_compiler(monkeypatch)


def ok(*args: object) -> str:
    """Standard output of a command that succeeds."""
    result = kogc_cli(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(status: int, *args: object) -> str:
    """The one line of a command that fails, with nothing on standard output."""
    result = kogc_cli(*args)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    return one_line(result.stderr)


def js(*args: object) -> Any:
    return json.loads(ok(*args, "--json"))


def test_help_lists_every_command_and_imports_little() -> None:
    heavy = "numpy yaml jinja2 rich tokenizers cuda.bindings"
    code = f"import atexit, sys; atexit.register(lambda: print([m for m in {heavy.split()} if m in sys.modules]))\n"
    command = process_command("--help", before=code)
    done = subprocess.run(command, capture_output=True, text=True, env=process_env(Path()), check=True)
    *text, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    listed = [line.split()[0] for line in text[text.index("Commands:") + 1 :]]
    assert listed == list(COMMANDS)
    assert not [line for line in text[1:] if line.endswith("...")]  # nothing is cut short


def test_help_is_quick(tmp_path: Path) -> None:
    start = child_seconds()
    assert kogc_process(tmp_path, "--help").returncode == 0
    assert child_seconds() - start < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    assert f"Usage: kogc {name}" in ok(name, "--help")


def test_version() -> None:
    import kogc

    assert ok("--version") == f"kogc {kogc.__version__}\n"


def test_models_and_gpus_list_what_ships() -> None:
    assert [row["name"] for row in js("models")] == list_specs()
    assert [row["name"] for row in js("gpus")] == list_profiles()
    for name in list_specs():
        assert f"\n{name} " in ok("models")
    for name in list_profiles():
        assert f"\n{name} " in ok("gpus")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248), ("qwen2.5-1.5b", 1_543_714_304),
     ("qwen3-0.6b", 596_049_920), ("smollm2-135m", 134_515_008)],
)  # fmt: skip
def test_parameters_are_the_published_ones(name: str, parameters: int) -> None:
    assert {row["name"]: row["parameters"] for row in js("models")}[name] == parameters


def test_plan_adds_up() -> None:
    data = js("plan", "llama-3.2-1b", "--gpu", "h200-sxm")
    spec = load_spec("llama-3.2-1b")
    phases = {p["name"]: p for p in data["phases"]}
    assert list(phases) == ["qkv", "o", "gate_up", "down", "head"]
    assert (phases["qkv"]["rows"], phases["qkv"]["times"]) == (spec.qkv_rows, spec.layers)
    assert phases["head"]["rows"] == spec.vocab
    for phase in phases.values():
        least, most = phase["rows_per_block"]
        assert least * data["blocks"] <= phase["rows"] <= most * data["blocks"]
    model = 2 * sum(p["times"] * p["rows"] * p["columns"] for p in phases.values())
    for cost in data["per_token"]:
        assert cost["model_weight_bytes"] == model <= cost["weight_bytes"]
        assert cost["kv_bytes"] == cost["depth"] * spec.layers * spec.kv_heads * spec.head_dim * 4
        read = cost["weight_bytes"] + cost["kv_bytes"]
        assert cost["seconds_at_ceiling"] == pytest.approx(read / data["ceiling"]["bandwidth"])
    memory = data["shared_memory"]
    assert sum(region["bytes"] for region in memory["regions"]) <= memory["bytes"] <= 232448
    assert memory["regions"][0]["bytes"] == memory["stages"] * memory["stage_bytes"]


def test_plan_prints_tables(checkpoint: Path) -> None:
    text = ok("plan", checkpoint, "--gpu", "h200-sxm", "--blocks", 4, "--max-context", 256)
    for word in ("4 blocks", "gate_up", "exchange", "ring", "read ceiling: 4.70 TB/s, measured", "tokens/s"):
        assert word in text
    cpu = ok("plan", checkpoint, "--gpu", "cpu-avx2", "--blocks", 2)
    assert "2 blocks" in cpu
    assert "prompts: 16 tokens a pass" in cpu
    assert "shared memory" not in cpu


def test_spec_is_what_the_checkpoint_says(checkpoint: Path, tmp_path: Path) -> None:
    text = ok("spec", checkpoint)
    ok("spec", checkpoint, "-o", tmp_path / "own.yaml")
    assert (tmp_path / "own.yaml").read_text() == text
    assert dump_spec(load_spec(tmp_path / "own.yaml")) == text
    assert "no/such: not a directory" in fails(1, "spec", "no/such")
    assert f"{tmp_path}: Is a directory" in fails(1, "spec", checkpoint, "-o", tmp_path)


def test_build_inspect_verify(compiler: None, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = ok("build", checkpoint, "--gpu", "h200-sxm", "--blocks", 3, "--max-context", 128, "-o", out)
    assert text.startswith(f"{out}: {checkpoint.name} for h200-sxm, 3 blocks, context 128, ")
    shown = ok("inspect", out)
    for word in ("h200-sxm (cuda, sm_90a, 132 SMs)", "qk_norms", "weights.bin", "stub 1.0", "packed"):
        assert word in shown
    assert js("inspect", out) == json.loads((out / "manifest.json").read_text())
    assert ok("verify", out).endswith("all as built\n")


def test_the_type_of_the_cache_is_recorded_and_counted(compiler: None, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ("build", checkpoint, "--gpu", "h200-sxm", "--blocks", 3, "--max-context", 128, "-o", out)
    ok(*args)
    plain = js("inspect", out)
    assert ok(*args, "--kv-dtype", "fp8").count("KV cache in FP8") == 1
    fp8 = js("inspect", out)
    assert (plain["kv_dtype"], fp8["kv_dtype"]) == ("bf16", "fp8")
    head_dim = fp8["spec"]["head_dim"]
    assert fp8["kv_bytes"] * 4 * head_dim == plain["kv_bytes"] * (2 * head_dim + 2)
    assert "kB in FP8" in ok("inspect", out)
    table = js("plan", checkpoint, "--gpu", "h200-sxm", "--blocks", 3, "--max-context", 128, "--kv-dtype", "fp8")
    assert (table["kv_dtype"], table["kv_cache_bytes"]) == ("fp8", fp8["kv_bytes"])


def test_unchanged_rebuild_does_nothing(compiler: None, checkpoint: Path, tmp_path: Path) -> None:
    args = ("build", checkpoint, "--gpu", "h200-sxm", "--blocks", 2, "-o", tmp_path / "out")
    assert js(*args)["up_to_date"] is False
    before = (tmp_path / "out").stat().st_ino
    assert js(*args)["up_to_date"] is True
    assert (tmp_path / "out").stat().st_ino == before
    assert js(*args, "--max-context", 64)["up_to_date"] is False


@pytest.mark.parametrize("touched", ["weights.bin", "monokernel.bin", "manifest.json"])
def test_rebuild_repairs_what_was_touched(compiler: None, checkpoint: Path, tmp_path: Path, touched: str) -> None:
    out = tmp_path / "out"
    args = ("build", checkpoint, "--gpu", "h200-sxm", "--blocks", 2, "-o", out)
    ok(*args)
    before = tree(out)
    (out / touched).write_bytes(before[touched][::-1] if touched != "manifest.json" else before[touched] + b" ")
    assert js(*args)["up_to_date"] is False
    assert tree(out) == before


def test_rebuild_sees_a_changed_checkpoint(compiler: None, tmp_path: Path) -> None:
    changing = make(tmp_path / "changing", "llama", tokenizer=True)
    args = ("build", changing, "--gpu", "h200-sxm", "--blocks", 2, "-o", tmp_path / "out")
    ok(*args)
    before = tree(tmp_path / "out")["weights.bin"]
    weights = changing / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1  # the low bits of the last weight
    weights.write_bytes(data)
    assert js(*args)["up_to_date"] is False
    assert tree(tmp_path / "out")["weights.bin"] != before


def test_dry_run_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    data = js("build", checkpoint, "--gpu", "h200-sxm", "-o", tmp_path / "out", "--dry-run")
    assert (data["out"], data["artifact_bytes"]) == (None, 0)
    assert data["source_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_dumped_source_is_the_artifacts(compiler: None, checkpoint: Path, tmp_path: Path) -> None:
    out, dump = tmp_path / "out", tmp_path / "dump"
    ok("build", checkpoint, "--gpu", "h200-sxm", "-o", out, "--dump-source", dump)
    assert tree(dump) == tree(out / "source")
    assert "kogc_generate" in b"".join(tree(dump).values()).decode()


def test_no_tokenizer_is_said(compiler: None, tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", "llama")
    result = kogc_cli("build", plain, "--gpu", "h200-sxm", "--blocks", 2, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "kogc: note: no tokenizer.json" in result.stderr


def test_rounding_is_said_once(compiler: None, tmp_path: Path) -> None:
    """As config.json promises it while nothing is read, and then as it was found."""
    wide = make(tmp_path / "wide", "llama", dtype="float32", tokenizer=True)
    args = ("build", wide, "--gpu", "h200-sxm", "--blocks", 2, "-o", tmp_path / "out")
    dry, built = kogc_cli(*args, "--dry-run"), kogc_cli(*args)
    assert one_line(dry.stderr).endswith("config.json: float32 weights are rounded to bf16")
    assert "rounded from float32 to bfloat16: 30 of 30 tensors" in one_line(built.stderr)


def test_rounding_is_not_said_of_weights_that_are_not_rounded(compiler: None, tmp_path: Path) -> None:
    """Where config.json says float32 of weights that are BF16."""
    narrow = make(tmp_path / "narrow", "llama", tokenizer=True)
    edit_config(narrow, dtype="float32")
    args = ("build", narrow, "--gpu", "h200-sxm", "--blocks", 2, "-o", tmp_path / "out")
    assert kogc_cli(*args).stderr == ""


def test_an_impossible_plan_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plans are checked before anything is rendered, by every command that makes one."""
    monkeypatch.setattr("kogc.plan.check.MAX_VOCAB", 1000)
    for command in (("plan",), ("build", "--dummy-weights", "-o", tmp_path / "out"), ("build", "--dry-run")):
        line = fails(1, *command, "smollm2-135m", "--gpu", "h200-sxm")
        assert "plan: vocab 49152 is more than 1000" in line
    assert not (tmp_path / "out").exists()


def test_a_small_model_gets_fewer_blocks(checkpoint: Path) -> None:
    """A block without work in a layer could fall behind unnoticed."""
    result = kogc_cli("plan", checkpoint, "--gpu", "h200-sxm", "--json")
    assert json.loads(result.stdout)["blocks"] == 12  # hidden size 96
    assert "note: 12 blocks, not the 128 of h200-sxm" in kogc_cli("plan", checkpoint, "--gpu", "h200-sxm").stderr
    line = fails(2, "plan", checkpoint, "--gpu", "h200-sxm", "--blocks", 100)
    assert "--blocks 100: " in line
    assert "any number up to 12 will do" in line


def test_limited_context_is_said() -> None:
    result = kogc_cli("plan", "llama-3.1-8b", "--gpu", "h100-sxm", "--max-context", 131072)
    assert result.exit_code in (0, 2)  # 80 GB hold it or not: the profile's facts decide
    if result.exit_code == 2:
        assert "--max-context 131072: llama-3.1-8b on h100-sxm has memory for" in one_line(result.stderr)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["build", "smollm2-135m", "--gpu", "h200-sxm", "-o", "x"], "smollm2-135m is a spec and has no weights"),
        (["build", "smollm2-135m", "--gpu", "h200-sxm"], "-o DIR is missing"),
        (["build", "smollm2-135m", "-o", "x", "--dummy-weights", "--weights-by-reference"], "exclude each other"),
        (["build", "-o", "x"], "Missing argument 'CHECKPOINT|SPEC'"),
        (["build", "x", "--frobnicate"], "--frobnicate"),
        (["plan", "smollm2-135m", "--gpu", "h200-sxm", "--max-context", "9999999"], "--max-context 9999999"),
        (["plan", "smollm2-135m", "--gpu", "h200-sxm", "--blocks", "133"], "--blocks 133: h200-sxm has 132 SMs"),
        (["plan", "smollm2-135m", "--gpu", "h200-sxm", "--blocks", "0"], "'--blocks'"),
        (["build", "x", "--kv-dtype", "fp4", "-o", "x"], "'fp4' is not one of 'bf16', 'fp8'"),
        (["plan", "x", "--kv-dtype", "FP8 "], "'--kv-dtype'"),
        (["bench", "x", "--kv-dtype", "int8"], "'--kv-dtype'"),
        (["tune", "x", "--kv-dtype", ""], "'--kv-dtype'"),
        (["run", "x"], "give one of -p TEXT, -f FILE and -t IDS"),
        (["run", "x", "-p", "a", "-f", "b"], "give one of"),
        (["run", "x", "-t", "1,b"], "-t 1,b: not a list of token ids"),
        (["run", "x", "-p", "a", "-n", "0"], "'-n'"),
        (["run", "x", "-p", "a", "--top-p", "nan"], "--top-p: nan is not above 0 and up to 1"),
        (["run", "x", "-p", "a", "--temperature", "-1"], "--temperature: -1.0 is not from 0 to 1000"),
        (["run", "x", "-p", "a", "--top-k", "1.5"], "'--top-k'"),
        (["run", "x", "-p", "a", "--greedy", "--min-p", "0.1"], "--greedy and --min-p exclude each other"),
        (
            ["run", "x", "-p", "a", "--temperature", "0", "--top-k", "3"],
            "--temperature 0 and --top-k exclude each other",
        ),
        (["run", "x", "-p", "a", "--samples", "0"], "'--samples'"),
        (["run", "x", "-p", "a", "--samples", "17"], "'--samples'"),
        (["run", "x", "--chat", "--samples", "2"], "--chat and --samples exclude each other"),
        (["bench", "x", "--samples", "8,17"], "8,17: at most 16 samples are made together"),
        (["bench", "x", "--samples", "0"], "0: not a list of numbers of samples"),
        (["bench", "smollm2-135m"], "smollm2-135m is not an artifact: build it first, or bench it with --dummy"),
        (["bench", "x", "-d", "1,-2"], "1,-2: not a list of depths"),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(args: list[str], message: str) -> None:
    assert message in fails(2, *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "smollm2-135m", "--gpu", "rtx-6090"], "unknown GPU 'rtx-6090': one of a100-sxm-80gb"),
        (["plan", "smollm3", "--gpu", "h200-sxm"], "smollm3: no such directory, and no spec of that name"),
        (["plan", "no/such.yaml", "--gpu", "h200-sxm"], "no/such.yaml: no such spec file"),
        (["inspect", "no/such"], "no/such: no such directory"),
        (["verify", "no/such"], "no/such: no such directory"),
        (["run", "no/such", "-p", "x"], "no/such: no such directory"),
        (["run", "no/such", "-f", "no/file"], "no/file: No such file or directory"),
    ],
)
def test_what_is_not_there_is_one_line_and_status_1(args: list[str], message: str) -> None:
    assert message in fails(1, *args)


def test_prompt_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xd8\xff")
    assert "image: not UTF-8 text" in fails(1, "run", "x", "-f", tmp_path / "image")


def test_interrupt_is_one_line_and_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("kogc.spec.list_specs", interrupted)
    assert fails(130, "models") == "kogc: interrupted"


def test_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = process_command("gpus", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=process_env(tmp_path)) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""


def test_doctor_says_what_is_here(tmp_path: Path) -> None:
    result = kogc_cli("doctor", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == (0 if data["builds"] else 1)
    assert data["python"] == sys.version.split()[0]
    assert data["packages"]["numpy"]
    assert data["cache"] == {"dir": str(tmp_path / "cache"), "entries": 0, "bytes": 0, "writable": True}
    assert data["cpu"]["cores"] >= 1
    assert data["cpu"]["profile"] in list_profiles()
    assert (data["nvrtc"] is not None) == ("cuda" in data["builds"])
    assert (data["hip"]["compiler"] is not None) == ("hip" in data["builds"])
    text = kogc_cli("doctor").stdout
    assert f"can build:  {', '.join(data['builds']) or 'nothing'}" in text


def test_doctor_survives_an_empty_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("kogc.doctor.nvrtc_version", lambda: 1 // 0)
    monkeypatch.setattr("kogc.doctor.cxx_version", lambda: 1 // 0)
    monkeypatch.setattr("kogc.doctor.hip_version", lambda: 1 // 0)
    monkeypatch.setattr("kogc.doctor._version", lambda name: None)
    result = kogc_cli("doctor")
    assert result.exit_code == 1
    for line in (
        "nvrtc:      not found",
        "missing:    numpy",
        "AMD:        no compiler",
        "C++ used:   none: install",
        "can build:  nothing",
    ):
        assert line in result.stdout


@pytest.mark.parametrize(
    ("device", "profile"),
    [
        (CudaDevice(0, "NVIDIA H200", (9, 0), 132, 150_754_820_096), "h200-sxm"),
        (CudaDevice(0, "NVIDIA H100 80GB HBM3", (9, 0), 132, 84_929_347_584), "h100-sxm"),
        (CudaDevice(0, "NVIDIA H100 PCIe", (9, 0), 114, 84_929_347_584), None),
        (CudaDevice(0, "NVIDIA H200 MIG 3g.71gb", (9, 0), 60, 75_000_000_000), None),
        (CudaDevice(0, "NVIDIA A100-SXM4-80GB", (8, 0), 108, 84_929_347_584), "a100-sxm-80gb"),
        (CudaDevice(0, "NVIDIA A100-SXM4-40GB", (8, 0), 108, 42_300_000_000), None),
        (CudaDevice(0, "NVIDIA A10G", (8, 6), 80, 22_587 << 20), "a10g"),
        (CudaDevice(0, "NVIDIA GeForce RTX 4090", (8, 9), 128, 25_300_000_000), "rtx-4090"),
        (CudaDevice(0, "NVIDIA B200", (10, 0), 148, 182_642 << 20), "b200"),
        (CudaDevice(0, "NVIDIA B300 SXM6 AC", (10, 3), 148, 275_040 << 20), "b300"),
        (CudaDevice(0, "NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 188, 97_250 << 20), "rtx-pro-6000"),
        (CudaDevice(0, "NVIDIA GB10", (12, 1), 48, 130_602_405_888), "dgx-spark"),
        (CudaDevice(0, "Tesla T4", (7, 5), 40, 15_843_721_216), None),
    ],
)
def test_devices_are_told_apart(device: CudaDevice, profile: str | None) -> None:
    assert profile_of(device) == profile


def test_auto_prefers_the_gpu_and_says_when_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = CudaDevice(0, "Tesla T4", (7, 5), 40, 15_843_721_216)
    monkeypatch.setattr("kogc.targets.detect_cuda.cuda_devices", lambda: [unknown])
    profile, note = targets.detect_profile()
    assert profile.target == "cpu"
    assert note == "Tesla T4 matches no GPU profile; building for the CPU"
    known = CudaDevice(0, "NVIDIA H200", (9, 0), 132, 150_754_820_096)
    monkeypatch.setattr("kogc.targets.detect_cuda.cuda_devices", lambda: [known])
    assert targets.detect_profile() == (load_profile("h200-sxm"), None)


def test_auto_takes_a_profile_by_architecture_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    other = CudaDevice(0, "NVIDIA GeForce RTX 4080", (8, 9), 76, 16_800_000_000, 64 << 20, 101376, 7.17e11)
    monkeypatch.setattr("kogc.targets.detect_cuda.cuda_devices", lambda: [other])
    profile, note = targets.detect_profile()
    assert note is not None
    assert note.startswith("NVIDIA GeForce RTX 4080 has no profile: taking that of rtx-4090 by architecture (sm_89)")
    assert "76 SMs and 16.8 GB" in note
    assert (profile.name, profile.sms, profile.blocks, profile.arch) == ("sm_89-76sms", 76, 76, "sm_89")
    assert (profile.memory_bytes, profile.l2_bytes, profile.ceiling) == (16_800_000_000, 64 << 20, 7.17e11)
    result = kogc_cli("plan", "llama-3.2-1b")
    assert result.exit_code == 0, result.output
    assert "by architecture" in result.stderr


def test_no_module_of_the_tree_is_left_out_of_the_wheel() -> None:
    text = (TOP / "pyproject.toml").read_text()
    for kind in ("templates", "model_specs", "gpu_profiles"):
        assert f'{kind} = "kogc/_data/{kind}"' in text
