"""The whole way with real compilers: a checkpoint goes in, text comes out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builds import child_seconds, kogc_process, one_line, process_command, process_env, tree
from random_checkpoint import make

from kogc.errors import KogcError
from kogc.targets import cpu
from kogc.targets.cpu_features import cpu_features


def _cpu_works() -> bool:
    try:
        cpu.version()
    except KogcError:
        return False
    return {"avx2", "fma", "f16c"} <= set(cpu_features())


needs_cpu = pytest.mark.skipif(not _cpu_works(), reason="needs a C++ compiler and AVX2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose build cache the tests of this module share."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def checkpoint(home: Path) -> Path:
    return make(home, "qwen2", tokenizer=True)


@pytest.fixture(scope="module")
def artifact(home: Path, checkpoint: Path) -> Path:
    done = kogc_process(home, "build", checkpoint, "--gpu", "cpu-avx2", "--blocks", 1, "-o", home / "built")
    assert done.returncode == 0, done.stderr
    return home / "built"


@needs_cpu
def test_run_prints_text_then_figures(home: Path, artifact: Path) -> None:
    done = kogc_process(home, "run", artifact, "-p", "hello", "-n", 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("6 prompt tokens, ")  # <s> and five bytes
    for word in ("generated", "tok/s", "GB/s", "read ceiling n/a"):
        assert word in last


@needs_cpu
def test_prompt_from_a_file_is_the_same(home: Path, artifact: Path) -> None:
    (home / "prompt").write_text("hello")
    by_text = kogc_process(home, "run", artifact, "-p", "hello", "-n", 12)
    by_file = kogc_process(home, "run", artifact, "-f", home / "prompt", "-n", 12)
    assert by_text.stdout == by_file.stdout != ""


@needs_cpu
def test_sampling_options_change_what_the_model_asks_for(home: Path, artifact: Path) -> None:
    def run(*options: object) -> str:
        done = kogc_process(home, "run", artifact, "-p", "hello", "-n", 12, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    greedy = run()  # the checkpoint's generation_config.json says nothing of sampling
    assert run("--greedy") == run("--temperature", 0) == run("--top-k", 1) == greedy
    drawn = run("--seed", 5, "--temperature", 1.5, "--top-p", 0.99)
    assert drawn == run("--seed", 5, "--temperature", 1.5, "--top-p", 0.99, "--ignore-generation-config") != greedy
    assert run("--repetition-penalty", 5.0) != greedy


@needs_cpu
def test_real_builds_are_identical(home: Path, checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    """Compiled again, not taken from the cache, in another place."""
    moved = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    done = kogc_process(tmp_path, "build", moved, "--gpu", "cpu-avx2", "--blocks", 1, "-o", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "again") == tree(artifact)


@needs_cpu
def test_weights_by_reference_run_alike(home: Path, checkpoint: Path, artifact: Path) -> None:
    out = home / "referenced"
    args = ("build", checkpoint, "--gpu", "cpu-avx2", "--blocks", 1, "-o", out, "--weights-by-reference")
    assert kogc_process(home, *args).returncode == 0
    packed, referenced = (kogc_process(home, "run", where, "-p", "hello", "-n", 12) for where in (artifact, out))
    assert referenced.returncode == 0, referenced.stderr
    assert packed.stdout == referenced.stdout


@needs_cpu
def test_loading_works_without_the_compilers_packages(home: Path, artifact: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('yaml', 'jinja2', 'click', 'rich', 'torch', 'transformers', 'safetensors', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"  # importing it is an ImportError
        "import kogc\n"
        "with kogc.load(sys.argv[1]) as session:\n"
        "    print(session.generate('hello', 12).text, end='\\n')\n"
    )
    command = [sys.executable, "-c", code, str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, env=process_env(home), timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == kogc_process(home, "run", artifact, "-p", "hello", "-n", 12).stdout != ""


def test_artifact_for_more_cores_than_here(tmp_path: Path) -> None:
    """The CPU's form of another SM count: refused before the library is opened."""
    blocks = len(os.sched_getaffinity(0)) + 1
    args = ("llama-3.1-8b", "--gpu", "cpu-avx2", "--blocks", blocks, "--max-context", 64, "--dummy-weights")
    built = kogc_process(tmp_path, "build", *args, "-o", tmp_path / "out", stub=True)
    assert built.returncode == 0, built.stderr
    done = kogc_process(tmp_path, "run", tmp_path / "out", "-t", "1", "-n", 1)
    assert done.returncode == 1
    assert "built for" in one_line(done.stderr)
    assert "rebuild" in done.stderr


@needs_cpu
def test_interrupted_compiler_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    command = process_command(
        "build", checkpoint, "--gpu", "cpu-avx2", "--blocks", 1, "-o", tmp_path / "place" / "out",
        before="import kogc.targets.cpu as c\nrun = c._run\n"
        "def say(*a):\n    print('compiling', flush=True) if a[1] else None\n    return run(*a)\nc._run = say\n",
    )  # fmt: skip
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=process_env(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"compiling\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, b"kogc: interrupted\n")
    assert list((tmp_path / "place").iterdir()) == []


def test_cubin_is_built_without_a_gpu_and_cached(tmp_path: Path) -> None:
    """The second build, in another place, finds the cubin in the cache; the third finds the artifact up to date."""
    pytest.importorskip("cuda.bindings.nvrtc")
    seconds = []
    for out in ("first", "second", "second"):
        args = ("build", "llama-3.1-8b", "--gpu", "h200-sxm", "--dummy-weights", "-o", tmp_path / out, "--json")
        start = child_seconds()
        done = kogc_process(tmp_path, *args)
        seconds.append(child_seconds() - start)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["up_to_date"] is True
    assert seconds[0] < 60
    assert max(seconds[1:]) < 2
    assert tree(tmp_path / "first") == tree(tmp_path / "second")
    assert (tmp_path / "first" / "monokernel.bin").read_bytes()[:4] == b"\x7fELF"
