"""kogc in odd surroundings: closed streams, signals, links, files of others. One line, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import random_checkpoint
import transformers
from builds import kogc_cli, one_line, process_command, process_env, stub_compiler

from kogc import artifact, bench, chat
from kogc.artifact import BINARY, MANIFEST
from kogc.cache import Cache, content_key
from kogc.chat import ChatTemplate
from kogc.errors import KogcError
from kogc.files import write_atomically
from kogc.importer import spec_from_dir
from kogc.plan.plan import usable_cores
from kogc.sampling import sampling_from_config
from kogc.session import load
from kogc.targets import process
from kogc.targets.detect import detect_cpu_profile
from kogc.tokenizer import Tokenizer

GPU = "cpu-avx2"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint.make(tmp_path_factory.mktemp("whole"), "llama", tokenizer=True)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "artifact"
    done = kogc_cli("build", checkpoint, "--gpu", detect_cpu_profile(), "-o", out, "--max-context", 64)
    assert done.exit_code == 0, done.output
    return out


def fails(status: int, *args: object) -> str:
    result = kogc_cli(*args)
    assert result.exit_code == status, result.output
    return one_line(result.stderr)


def in_shell(tmp_path: Path, redirection: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A kogc process whose streams a shell has set up."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", *process_command(*args)]
    return subprocess.run(command, capture_output=True, text=True, env={**process_env(tmp_path), **env}, timeout=60)


# --- streams


def test_without_a_command_there_is_help() -> None:
    result = kogc_cli()
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: kogc")
    assert "\n  build " in result.stderr


def test_streams_that_are_full_or_closed(tmp_path: Path) -> None:
    full = in_shell(tmp_path, ">/dev/full", "models")
    assert (full.returncode, one_line(full.stderr)) == (1, "kogc: No space left on device")
    assert in_shell(tmp_path, ">&-", "models").returncode == 0
    silent = in_shell(tmp_path, "2>&-", "plan", "nowhere")
    assert (silent.returncode, silent.stdout, silent.stderr) == (1, "", "")
    unread = in_shell(tmp_path, "<&-", "run", tmp_path, "-f", "-")
    assert unread.returncode == 1
    one_line(unread.stderr)


def test_an_encoding_that_lacks_a_character(tmp_path: Path) -> None:
    code = "from kogc.cli import _open_streams; _open_streams(); print('3 \\xb1 1')"
    env = {**process_env(tmp_path), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert (done.stdout, done.stderr) == ("3 \\xb1 1\n", "")


# --- signals


def test_a_closed_terminal_ends_a_build(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    command = process_command("build", checkpoint, "--gpu", GPU, "-o", place / "out", stub=True, delay=60)
    command[2] = command[2].replace("    time.sleep", "    print('compiling', flush=True); time.sleep")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=process_env(tmp_path)) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"compiling\n"
        running.send_signal(signal.SIGHUP)
        _, errors = running.communicate(timeout=30)
    assert (running.returncode, one_line(errors.decode())) == (130, "kogc: interrupted")
    assert list(place.iterdir()) == []


def test_what_a_compiler_has_started_ends_with_it(tmp_path: Path) -> None:
    script = tmp_path / "compiler"
    deaf = "(trap '' TERM; exec sleep 60) & echo $! > \"$0.child\""
    script.write_text(f"#!/bin/sh\ntrap 'touch \"$0.told\"; exit 1' TERM\n{deaf}; wait\n")
    script.chmod(0o755)
    with pytest.raises(KogcError, match="^it: .*timed out"):
        process.run("it", [str(script)], 1.0)
    assert Path(f"{script}.told").exists()
    child = int(Path(f"{script}.child").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the compiler's own child is still there")


# --- files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, link = tmp_path / "file", tmp_path / "link"
    old.write_text("old")
    link.symlink_to(old)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(old, b"new")
    assert old.read_text() == "old"
    write_atomically(link, b"new")
    assert (old.read_text(), link.is_symlink()) == ("new", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    write_atomically(Path("/dev/null"), b"gone")
    assert Path("/dev/null").is_char_device()


def test_broken_links_do_not_matter(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_compiler(monkeypatch)
    (copy / ".#config.json").symlink_to("nobody@nowhere.1")
    (copy / "loop").symlink_to("loop")
    assert kogc_cli("build", copy, "--gpu", GPU, "-o", tmp_path / "out").exit_code == 0


def test_the_working_directory_is_not_replaced(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_compiler(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert "the directory you are in" in fails(1, "build", checkpoint, "--gpu", GPU, "-o", ".")


def test_a_name_is_that_of_the_directory(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    assert spec_from_dir(".")[0].name == spec_from_dir(copy)[0].name == "copy"
    host = copy.parent / "me@host"
    host.mkdir()
    copy.rename(host / "alpha")
    assert spec_from_dir(host / "alpha")[0].name == "alpha"


def test_a_reference_holds_from_everywhere(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    gpu = detect_cpu_profile()
    done = kogc_cli("build", "copy", "--gpu", gpu, "--max-context", 64, "--weights-by-reference", "-o", out)
    assert done.exit_code == 0, done.output
    monkeypatch.chdir("/")
    assert kogc_cli("verify", out).exit_code == 0
    with load(out) as session:
        assert len(session.generate([5], 3, stop=()).tokens) == 3
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "not the file that the artifact was built from" in fails(1, "verify", out)


def test_code_and_manifest_are_what_was_built(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "a")
    path = tmp_path / "a" / BINARY
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{path}: does not match" in fails(1, "run", tmp_path / "a", "-t", "5", "-n", 2)
    shutil.copytree(built, tmp_path / "b")
    body = json.loads((tmp_path / "b" / MANIFEST).read_text())
    body["operands"][0]["offset"] = -1
    (tmp_path / "b" / MANIFEST).write_text(json.dumps(body))
    assert "does not match its own SHA-256" in fails(1, "run", tmp_path / "b", "-t", "5", "-n", 2)
    (tmp_path / "b" / MANIFEST).write_text("{")
    assert "its manifest is damaged" in fails(1, "build", "smollm2-135m", "--dummy-weights", "-o", tmp_path / "b")


def test_an_artifact_that_is_replaced_while_it_is_loaded(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built, tmp_path / "a")
    opened = artifact.read_manifest

    def replaced(directory: Path) -> Any:
        manifest = opened(directory)
        body = json.loads((directory / MANIFEST).read_text())
        body["notes"] = [*body["notes"], "another build"]
        body["manifest_sha256"] = artifact._self_hash(body)
        (directory / MANIFEST).write_text(json.dumps(body))
        return manifest

    monkeypatch.setattr("kogc.session.read_manifest", replaced)
    with pytest.raises(KogcError, match="was replaced while it was loaded"):
        load(tmp_path / "a")


def test_a_cache_that_others_can_write_is_not_believed(tmp_path: Path) -> None:
    key, old = content_key(["a"]), os.umask(0o002)
    try:
        cache = Cache(tmp_path / "cache")
        cache.put(key, b"code")
    finally:
        os.umask(old)
    assert cache.root.stat().st_mode & 0o777 == 0o700
    assert cache.get(key) == b"code"
    cache.root.chmod(0o777)
    assert cache.get(key) is None
    cache.root.chmod(0o700)
    (cache.root / key[:2]).chmod(0o720)
    assert cache.get(key) is None


def test_a_device_is_a_gpus_number(built: Path) -> None:
    for device, words in ((7, "device 7: this artifact runs on the CPU"), ("cuda", "device: 'cuda' is not an integer")):
        with pytest.raises(KogcError, match=words):
            load(built, device)  # type: ignore[arg-type]


def test_more_blocks_than_cores_are_remarked(checkpoint: Path) -> None:
    blocks = usable_cores() + 1
    shown = kogc_cli("plan", checkpoint, "--gpu", GPU, "--blocks", blocks)
    assert f"{blocks} blocks need as many cores" in shown.stderr


@pytest.mark.parametrize("word", ["x", "1_0", "٣", "-1", "1,,x"])
def test_tokens_are_plain_numbers(built: Path, word: str) -> None:
    assert f"-t {word}: not a list of token ids" in fails(2, "run", built, f"--tokens={word}")


def test_empty_names(built: Path) -> None:
    assert "empty name" in fails(1, "plan", "")
    assert "empty name" in fails(1, "run", built, "-f", "")


# --- what a checkpoint says


def test_a_build_refuses_what_a_run_would(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_compiler(monkeypatch)
    build = ("build", copy, "--gpu", GPU, "-o", tmp_path / "out")
    for name, text, words in (
        ("generation_config.json", '{"do_sample": "yes"}', "do_sample"),
        ("tokenizer_config.json", "not JSON", "tokenizer_config.json"),
        ("tokenizer.json", "[]", "not a tokenizer"),
    ):
        (copy / name).write_text(text)
        assert words in fails(1, *build)
        (copy / name).unlink()
    assert not (tmp_path / "out").exists()


def test_drawing_takes_fifty_tokens_unless_told(tmp_path: Path) -> None:
    """As Transformers' generate does."""
    path = tmp_path / "generation_config.json"
    for text, top_k in (('{"do_sample": true}', 50), ('{"do_sample": true, "top_k": 0}', 0), ("{}", 0)):
        path.write_text(text)
        assert sampling_from_config(path).top_k == top_k


def test_settings_that_are_not_applied_are_named(copy: Path) -> None:
    settings = {"typical_p": 0.9, "eta_cutoff": 0.1, "min_new_tokens": 5, "stop_strings": ["x"], "guidance_scale": 1}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    notes = spec_from_dir(copy)[1]
    named = [name for name in settings if any(f" {name} = " in note for note in notes)]
    assert named == ["typical_p", "eta_cutoff", "min_new_tokens", "stop_strings"]


@pytest.mark.parametrize("decoder", [{}, {"added_tokens_decoder": {}}])
@pytest.mark.parametrize("mapped", [{"bos_token": "<s>", "eos_token": {"content": "</s>"}}, {"bos_token": None}, {}])
def test_special_tokens_of_a_map_of_their_own(tmp_path: Path, mapped: dict[str, Any], decoder: dict[str, Any]) -> None:
    """They count, as in Transformers, unless the configuration is of the kind that lists the added tokens."""
    random_checkpoint.write_tokenizer(tmp_path, 331)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}|{{ messages[0].content }}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapped))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<b>", "eos_token": "<e>", **decoder}))
    messages = [{"role": "user", "content": "hi"}]
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    template = ChatTemplate(tmp_path)
    assert template.render(messages) == expected
    template.close()


def test_a_template_after_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has a process of its own to ask, and leaves the parent's alone."""
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    template = ChatTemplate(tmp_path)
    message = [{"role": "user", "content": "hi"}]
    assert template.render(message) == "hi"
    parents = template._worker
    assert parents is not None
    with monkeypatch.context() as child:
        child.setattr(chat.os, "getpid", lambda: -1)
        assert template.render(message) == "hi"
        assert template._worker is not parents
        template.close()
    assert parents._process.poll() is None
    parents.kill()


def test_tokens_without_a_text_are_not_kept(checkpoint: Path) -> None:
    tokenizer = Tokenizer(checkpoint)
    special = next(i for i in range(tokenizer.size) if tokenizer.is_silent(i))
    stream = tokenizer.stream()
    assert [stream.push(special) for _ in range(1000)] == [""] * 1000
    assert len(stream._new) + len(stream._known) == 0
    words = tokenizer.encode("def f(", special=False)
    mixed = [token for word in words for token in (special, word)]
    assert "".join(map(stream.push, mixed)) + stream.finish() == "def f("


# --- work that would be in vain


def test_a_bench_is_refused_before_it_measures(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("it measured")

    monkeypatch.setattr(bench, "compare", measured)
    line = fails(2, "bench", built, "--kv-dtype", "fp8", "--knob", "pace=900")
    assert "is built: --kv-dtype, --knob would not change it" in line
    assert "--steady from depth 0 need 2001 positions" in fails(1, "bench", built, "-d", "0", "-n", 3, "--steady")
    assert "nowhere" in fails(1, "bench", built, "-d", "0", "-n", 3, "--trace", tmp_path / "nowhere" / "t.json")


def test_a_search_is_refused_before_it_searches(checkpoint: Path, tmp_path: Path) -> None:
    tune = ("tune", checkpoint, "--gpu", GPU)
    assert "--budget nan: not a number of seconds" in fails(2, *tune, "--budget", "nan")
    assert "--depth 9999: " in fails(2, *tune, "--depth", 9999)
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'}: " in fails(1, *tune, "--depth", 3, "-o", tmp_path / "file" / "t.yaml")


def test_a_setting_that_fails_says_why(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kogc.tune.compile_variant", lambda *_: "it spills")
    monkeypatch.setattr("kogc.tune.Bench._load", lambda self, setting: (_ for _ in ()).throw(KogcError("no such GPU")))
    line = fails(1, "tune", checkpoint, "--gpu", GPU, "--depth", 3, "--budget", 0, "-o", tmp_path / "t.yaml")
    assert "does not run here: no such GPU" in line


def test_many_blocks_are_refused_at_once(checkpoint: Path) -> None:
    began = time.monotonic()
    assert "--blocks 99999999999: " in fails(2, "plan", checkpoint, "--gpu", GPU, "--blocks", 99999999999)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("word", ["pace=²", "pace=٣", "pace=-1"])
def test_knobs_are_plain_numbers(word: str) -> None:
    assert f"{word}: not NAME=N" in fails(2, "bench", "llama-3.2-1b", "--dummy-weights", "--knob", word)


@pytest.mark.parametrize("model", ["~nosuchuser/x", "n" * 300])
def test_paths_that_lead_nowhere(model: str) -> None:
    fails(1, "plan", model)


def test_a_compiler_that_makes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    command = process_command("build", checkpoint, "--gpu", GPU, "-o", tmp_path / "out")
    env = {**process_env(tmp_path), "CXX": "/bin/echo"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 1
    assert "made no library" in one_line(done.stderr)
