"""Hostile input and bad luck through the command line: one line, an exit status, nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import kogc_cli, kogc_process, one_line, process_command, process_env, stub_compiler, tree
from random_checkpoint import edit_config, make

from kogc.resources import data_dir
from kogc.targets.detect_cuda import driver_version

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("original"), "llama", tokenizer=True)


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A checkpoint to be harmed."""
    return Path(shutil.copytree(original, tmp_path / "in" / "model"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where artifacts go; tests look at what is left in it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KOGC_CACHE", str(tmp_path / "cache"))
    stub_compiler(monkeypatch)


def build_args(model: object, out: Path) -> list[str]:
    return ["build", str(model), "--gpu", "h200-sxm", "--blocks", "3", "-o", str(out)]


def refused(model: object, place: Path, status: int = 1) -> str:
    """Build, expect one line, and nothing left behind."""
    result = kogc_cli(*build_args(model, place / "out"))
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert list(place.iterdir()) == []
    return one_line(result.stderr)


def header_edit(change: Callable[[dict[str, dict[str, object]]], None]) -> Callable[[Path], None]:
    """Rewrite the header of a safetensors file, its data as it was."""

    def edit(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return edit


def reshape(header: dict[str, dict[str, object]]) -> None:
    entry = header["model.layers.1.self_attn.o_proj.weight"]
    entry["shape"] = [entry["shape"][0] * 2, entry["shape"][1] // 2]  # type: ignore[index]


def rename(header: dict[str, dict[str, object]]) -> None:
    header["model.layers.1.mlp.up_proj.bias"] = header.pop("model.layers.1.mlp.up_proj.weight")


def no_number(path: Path) -> None:
    """The last weight becomes an infinity or a NaN."""
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")


def resize(size: int) -> Callable[[Path], None]:
    """Keep the first `size` bytes; a negative size counts from the end."""

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:size])

    return cut


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, "neither model.safetensors nor"),
        (resize(0), "model.safetensors: truncated"),
        (resize(100), "model.safetensors: truncated"),
        (resize(-1), "model.safetensors: truncated"),
        (no_number, "holds nan: the weights are broken"),
        (lambda path: path.write_bytes(b"\xff" * 64), "model.safetensors: "),
        (header_edit(reshape), "model.layers.1.self_attn.o_proj.weight: has shape"),
        (header_edit(rename), "model.layers.1.mlp.up_proj.weight: missing tensor"),
        (header_edit(lambda header: header["model.norm.weight"].update(dtype="F8_E4M3")), "model.norm.weight"),
    ],
)
def test_harmed_weights(checkpoint: Path, place: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(checkpoint / WEIGHTS)
    assert message in refused(checkpoint, place)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "config.json: missing"),
        ("config.json", "{", "config.json:1: not JSON"),
        ("config.json", "[]", "config.json: expected a JSON object"),
        ("config.json", '{"a": 1, "a": 2}', "config.json: "),
        ("generation_config.json", '{"repetition_penalty": 1.3, "eos_token_id": "x"}', "eos_token_id"),
    ],
)
def test_harmed_settings(checkpoint: Path, place: Path, name: str, text: str | None, message: str) -> None:
    if text is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_text(text)
    assert message in refused(checkpoint, place)


def test_unsupported_mathematics_is_named(checkpoint: Path, place: Path) -> None:
    edit_config(checkpoint, final_logit_softcapping=30.0)
    assert "final_logit_softcapping" in refused(checkpoint, place)


@pytest.mark.parametrize("kind", ["model_specs/smollm2-135m", "gpu_profiles/h200-sxm"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda text: text + "surprise: 1\n", "surprise"),
        (lambda text: text + "name: twice\n", "name"),
        (lambda text: "\n".join(text.splitlines()[:3]) + "\n", "missing"),
        (lambda text: text.replace("name:", "name: ["), ""),
    ],
)
def test_harmed_yaml_is_named_by_file_and_line(
    tmp_path: Path, place: Path, kind: str, harm: Callable[[str], str], message: str
) -> None:
    folder, name = kind.split("/")
    file = tmp_path / f"{name}.yaml"
    file.write_text(harm((data_dir(folder) / file.name).read_text()))
    model, gpu = (file, "h200-sxm") if folder == "model_specs" else ("smollm2-135m", file)
    result = kogc_cli("build", model, "--gpu", gpu, "--dummy-weights", "-o", place / "out")
    assert result.exit_code == 1
    line = one_line(result.stderr)
    assert line.startswith(f"kogc: {file}:")
    assert line.removeprefix(f"kogc: {file}:").partition(":")[0].isdigit()
    assert message in line
    assert list(place.iterdir()) == []


def test_unknown_gpu(checkpoint: Path, place: Path) -> None:
    for name in ("h300", "../../etc/passwd", "", "h200-sxm/.."):
        result = kogc_cli("build", checkpoint, "--gpu", name, "-o", place / "out")
        assert result.exit_code == 1
        assert f"unknown GPU {name!r}" in one_line(result.stderr)
    assert list(place.iterdir()) == []


@pytest.mark.skipif(driver_version() is not None, reason="for machines without an NVIDIA driver")
def test_cuda_artifact_without_a_driver(checkpoint: Path, place: Path) -> None:
    assert kogc_cli(*build_args(checkpoint, place / "out")).exit_code == 0
    result = kogc_cli("run", place / "out", "-p", "x")
    assert result.exit_code == 1
    assert "driver" in one_line(result.stderr)


def test_flipped_bit(checkpoint: Path, place: Path) -> None:
    out = place / "out"
    assert kogc_cli(*build_args(checkpoint, out)).exit_code == 0
    data = bytearray((out / "weights.bin").read_bytes())
    data[len(data) // 3] ^= 1
    (out / "weights.bin").write_bytes(data)
    result = kogc_cli("verify", out)
    assert result.exit_code == 1
    assert "weights.bin: does not match the manifest's SHA-256" in one_line(result.stderr)


def limit_files(size: int) -> Callable[[], None]:
    """As if the disk were full after `size` bytes of a file."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [1 << 9, 1 << 15, 1 << 18])
def test_full_disk(checkpoint: Path, place: Path, tmp_path: Path, size: int) -> None:
    """The limit is hit by the first small file, by the copied texts, or while weights are packed."""
    command = process_command(*build_args(checkpoint, place / "out"), stub=True)
    done = subprocess.run(
        command, capture_output=True, text=True, env=process_env(tmp_path), preexec_fn=limit_files(size), check=False
    )
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert f"{place / 'out'}" in line
    assert "File too large" in line
    assert "building-" not in line
    assert list(place.iterdir()) == []


def test_full_disk_keeps_the_old_artifact(checkpoint: Path, place: Path, tmp_path: Path) -> None:
    out = place / "out"
    assert kogc_cli(*build_args(checkpoint, out)).exit_code == 0
    before = tree(out)
    command = process_command(*build_args(checkpoint, out), "--max-context", "128", stub=True)
    done = subprocess.run(
        command, capture_output=True, env=process_env(tmp_path), preexec_fn=limit_files(1 << 15), check=False
    )
    assert done.returncode == 1
    assert tree(out) == before
    assert list(place.iterdir()) == [out]


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_compiling(checkpoint: Path, place: Path, tmp_path: Path, which: signal.Signals) -> None:
    say = "import sys; print('started', flush=True)\n"
    marked = process_command(*build_args(checkpoint, place / "out"), stub=True, delay=60)
    marked[2] = marked[2].replace("    time.sleep", "    print('compiling', flush=True); time.sleep")
    marked[2] = say + marked[2]
    assert interrupt(marked, tmp_path, which, b"compiling\n") == "kogc: interrupted"
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_packing(checkpoint: Path, place: Path, tmp_path: Path, which: signal.Signals) -> None:
    slow = """
import time
from kogc.checkpoint import Checkpoint
rows = Checkpoint.rows
def slowly(self, *args):
    print("packing", flush=True)
    time.sleep(0.5)
    return rows(self, *args)
Checkpoint.rows = slowly
"""
    command = process_command(*build_args(checkpoint, place / "out"), stub=True, before=slow)
    assert interrupt(command, tmp_path, which, b"packing\n") == "kogc: interrupted"
    assert list(place.iterdir()) == []


def interrupt(command: list[str], tmp_path: Path, which: signal.Signals, at: bytes) -> str:
    """Send a signal once the process has printed the line `at`; its one line of error."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=process_env(tmp_path)) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != at:
            assert line, "the process ended too early"
        time.sleep(0.1)
        process.send_signal(which)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    return one_line(errors.decode())


def test_output_that_cannot_be_written(checkpoint: Path, place: Path) -> None:
    (place / "file").write_text("precious")
    result = kogc_cli(*build_args(checkpoint, place / "file" / "out"))
    assert result.exit_code == 1
    assert f"{place / 'file'} is not a directory" in one_line(result.stderr)
    result = kogc_cli(*build_args(checkpoint, place / "file"))
    assert "exists and is not a directory" in one_line(result.stderr)
    assert (place / "file").read_text() == "precious"


def test_checkpoint_is_never_overwritten(checkpoint: Path) -> None:
    before = tree(checkpoint)
    result = kogc_cli(*build_args(checkpoint, checkpoint))
    assert result.exit_code == 1
    assert "exists and is not a kogc artifact" in one_line(result.stderr)
    assert tree(checkpoint) == before


def test_cache_that_cannot_be_written_is_no_error(checkpoint: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    done = kogc_process(tmp_path, *build_args(checkpoint, place / "out"), stub=True)
    assert done.returncode == 0, done.stderr
    assert kogc_cli("verify", place / "out").exit_code == 0
