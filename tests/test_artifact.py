"""The artifact: reproducible, checked when read, and written whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builds import stub_compiler, tree
from random_checkpoint import make

from kogc import artifact
from kogc.artifact import MANIFEST, Manifest, Writer, read_manifest, verify
from kogc.build import BuildOptions, build
from kogc.errors import KogcError
from kogc.spec import load_spec

HASHED = ("monokernel.bin", "weights.bin", "tokenizer.json", "spec.yaml", "source/monokernel.cu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("checkpoint"), "llama", tokenizer=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """One artifact that tests only read."""
    out = tmp_path_factory.mktemp("built") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KOGC_CACHE", str(out.parent / "cache"))
        stub_compiler(patch)
        build(str(checkpoint), "h200-sxm", out, BuildOptions(blocks=3))
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """The same artifact, to be harmed."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KOGC_CACHE", str(tmp_path / "cache"))
    stub_compiler(monkeypatch)


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    body = json.loads((directory / MANIFEST).read_text())
    change(body)
    (directory / MANIFEST).write_text(json.dumps(body))


def test_manifest_is_read_back_as_it_was_written(built: Path) -> None:
    manifest = read_manifest(built)
    stored = json.loads((built / MANIFEST).read_text())
    assert json.loads(json.dumps(manifest.to_json())) == stored
    assert manifest.spec == load_spec(built / "spec.yaml")


def test_manifest_says_what_the_issue_of_a_loader_needs(built: Path, checkpoint: Path) -> None:
    manifest = read_manifest(built)
    assert (manifest.target, manifest.arch, manifest.blocks, manifest.tools) == ("cuda", "sm_90a", 3, {"stub": "1.0"})
    assert manifest.config_sha256 == artifact.hash_file(checkpoint / "config.json").sha256
    names = ("generate", "fill", "prompt", "samples")
    assert manifest.entry_points == {name: f"kogc_{name}" for name in names}
    assert manifest.stop_tokens == manifest.spec.eos_tokens == (2,)
    assert manifest.weights_bytes == (built / "weights.bin").stat().st_size
    plan = manifest.plan()
    assert (plan.slab_bytes, plan.max_context) == (manifest.slab_bytes, manifest.max_context)


def test_operands_lie_in_the_weights_without_overlap(built: Path) -> None:
    manifest = read_manifest(built)
    end = 0
    for operand in manifest.operands:
        assert operand.offset % 4096 == 0
        assert operand.offset >= end
        end = operand.offset + operand.bytes
    assert end <= manifest.weights_bytes
    assert [o.name for o in manifest.operands] == ["slabs", "embedding", "norms", "inv_freq"]


def test_every_file_is_listed(built: Path) -> None:
    assert set(tree(built)) == {MANIFEST, *read_manifest(built).files}
    assert {"generation_config.json", "source/common/args.h", *HASHED} <= set(tree(built))


def test_two_builds_are_identical(
    compiler: None, built: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another place of checkpoint and artifact, another working directory, a relative path: the same bytes."""
    moved = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere" / checkpoint.name))
    monkeypatch.chdir(moved.parent)
    build(checkpoint.name, "h200-sxm", Path("again"), BuildOptions(blocks=3))
    assert tree(moved.parent / "again") == tree(built)
    text = b"".join(tree(built).values())
    assert str(tmp_path).encode() not in text
    assert str(checkpoint.parent).encode() not in text


def test_verify_accepts_what_was_built(built: Path) -> None:
    counted: list[int] = []
    manifest = verify(built, counted.append)
    assert sum(counted) == sum(entry.bytes for entry in manifest.files.values())


@pytest.mark.parametrize("name", HASHED)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_verify_names_the_file_with_a_flipped_bit(copy: Path, name: str, place: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[place]] ^= 0x10
    (copy / name).write_bytes(data)
    with pytest.raises(KogcError, match=f"{name}: does not match the manifest's SHA-256; rebuild"):
        verify(copy)


def test_verify_finds_an_edited_manifest(copy: Path) -> None:
    edit(copy, lambda body: body.update(max_context=body["max_context"] - 128))
    with pytest.raises(KogcError, match=r"manifest\.json: does not match its own SHA-256"):
        verify(copy)


@pytest.mark.parametrize("name", ["weights.bin", "monokernel.bin", "source/monokernel.cu"])
def test_missing_or_short_file_is_seen_without_hashing(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(KogcError, match=rf"{name}: {len(data) - 1} bytes, the manifest says {len(data)}"):
        read_manifest(copy)
    (copy / name).unlink()
    with pytest.raises(KogcError, match=f"{name}: missing; rebuild"):
        read_manifest(copy)


def test_another_schema_says_rebuild(copy: Path) -> None:
    edit(copy, lambda body: body.update(schema=99, kogc="9.9"))
    with pytest.raises(KogcError, match=r"schema 99, by kogc 9\.9; this kogc reads schema 3: rebuild"):
        read_manifest(copy)


def test_another_layout_says_rebuild(copy: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        body.update(slab_bytes=body["slab_bytes"] + 128)
        body.update(manifest_sha256=artifact._self_hash(body))

    edit(copy, change)
    with pytest.raises(KogcError, match="laid out by kogc .* in another way; rebuild"):
        read_manifest(copy).plan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.pop("spec"), r"damaged \(KeyError: 'spec'\); rebuild"),
        (lambda body: body.update(operands=[{}]), "damaged"),
        (lambda body: body["spec"].update(surprise=1), "damaged .*surprise"),
        (lambda body: body["spec"].pop("hidden"), "damaged .*hidden"),
        (lambda body: body.update(blocks=-1), "damaged .*blocks is not a size"),
        (lambda body: body.update(blocks="3"), "damaged .*blocks is not a size"),
        (lambda body: body.update(files=[]), "damaged"),
        (lambda body: body["files"].update({"../x": {"bytes": 0, "sha256": ""}}), r"damaged .*file name '\.\./x'"),
        (lambda body: body["files"].update({"/etc/passwd": {"bytes": 0, "sha256": ""}}), "damaged .*file name '/etc"),
        (lambda body: body.update(weights=None), "damaged"),
        (lambda body: body.update(format="other"), "not the manifest of a kogc artifact"),
    ],
)
def test_damaged_manifest_is_one_line(copy: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(copy, change)
    with pytest.raises(KogcError, match=message) as caught:
        read_manifest(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff", '{"format": 1}'])
def test_manifest_that_is_not_one(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(KogcError, match=r"manifest\.json: (damaged: not JSON|not the manifest)"):
        read_manifest(copy)


def test_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(KogcError, match="nothing: no such directory"):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(KogcError, match=r"not an artifact: it has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(KogcError, match="not an artifact: not a directory"):
        read_manifest(tmp_path / "file")


def write(out: Path, manifest: Manifest, data: bytes = b"data") -> None:
    with Writer(out) as writer:
        writer.add("a", data)
        writer.finish(replace(manifest, files=dict(writer.files)))


def test_error_while_writing_leaves_nothing(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "parents" / "out"
    for error in (KeyboardInterrupt, ZeroDivisionError, KogcError):
        with pytest.raises(error), Writer(out) as writer:
            writer.add("deep/a", b"data")
            raise error
        assert list(tmp_path.iterdir()) == []


def test_error_while_replacing_keeps_the_old_artifact(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, read_manifest(built), b"old")
    before = tree(out)
    with pytest.raises(KeyboardInterrupt), Writer(out) as writer:
        writer.add("a", b"new")
        raise KeyboardInterrupt
    assert tree(out) == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_old_artifact_is_replaced(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    out = tmp_path / "out"
    for data in (b"old", b"new"):
        write(out, read_manifest(built), data)
        assert (out / "a").read_bytes() == data
        assert list(tmp_path.iterdir()) == [out]


def test_only_artifacts_are_replaced(built: Path, tmp_path: Path) -> None:
    manifest = read_manifest(built)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(KogcError, match="file: exists and is not a directory"):
        write(tmp_path / "file", manifest)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(KogcError, match="home: exists and is not a kogc artifact"):
        write(tmp_path / "home", manifest)
    write(tmp_path / "mixed", manifest)
    (tmp_path / "mixed" / "notes.txt").write_text("precious")
    with pytest.raises(KogcError, match=r"mixed: holds notes\.txt, which is not part of the artifact"):
        write(tmp_path / "mixed", manifest)
    assert (tmp_path / "mixed" / "notes.txt").read_text() == "precious"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(KogcError, match="link: a broken symbolic link"):
        write(tmp_path / "link", manifest)


def test_empty_directory_and_new_parents_are_fine(built: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", read_manifest(built))
    write(tmp_path / "new" / "deeper", read_manifest(built))
    assert {"a", MANIFEST} == set(tree(tmp_path / "empty")) == set(tree(tmp_path / "new" / "deeper"))


def test_link_to_an_artifact_stays_a_link(built: Path, tmp_path: Path) -> None:
    write(tmp_path / "real", read_manifest(built), b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", read_manifest(built), b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_bytes() == b"new"


def test_full_disk_is_one_line_and_leaves_nothing(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    manifest = read_manifest(built)
    monkeypatch.setattr(Path, "open", lambda self, mode: Full())
    with pytest.raises(KogcError, match="cannot write .*out: No space left on device; nothing was kept"):
        write(tmp_path / "out", manifest)
    assert list(tmp_path.iterdir()) == []


def test_by_reference_keeps_location_and_hashes(compiler: None, checkpoint: Path, tmp_path: Path) -> None:
    build(str(checkpoint), "h200-sxm", tmp_path / "out", BuildOptions(blocks=2, weights_by_reference=True))
    weights = read_manifest(tmp_path / "out").weights
    assert (weights.kind, weights.location) == ("reference", str(checkpoint))
    assert weights.files == {"model.safetensors": artifact.hash_file(checkpoint / "model.safetensors")}
    assert "weights.bin" not in tree(tmp_path / "out")


def test_dummy_weights_need_no_checkpoint(compiler: None, tmp_path: Path) -> None:
    result = build("smollm2-135m", "h200-sxm", tmp_path / "out", BuildOptions(dummy_weights=True))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.weights == artifact.Weights("dummy")
    assert (manifest.sms, manifest.threads, manifest.blocks) == (132, 288, result.plan.blocks)
    assert manifest.shared_memory == result.plan.memory.bytes > 0
    assert "weights.bin" not in tree(tmp_path / "out")
