"""The artifact: a directory with a readable manifest, the binary, the packed weights and the tokenizer.

Nothing in it depends on when or where it was built: keys are sorted, and no time and no path of the machine is kept
(only `--weights-by-reference` keeps where the checkpoint is). What a checkpoint is called follows its directory's name.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import KogcError
from .plan.plan import KV_DTYPES, Knobs, Plan
from .profile import GpuProfile, Measured
from .spec import ModelSpec, Rope, RopeScaling

FORMAT = "kogc-artifact"
SCHEMA = 3
MANIFEST = "manifest.json"
BINARY = "monokernel.bin"
WEIGHTS = "weights.bin"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
SPEC = "spec.yaml"
SOURCE = "source"

PACKED, REFERENCE, DUMMY = "packed", "reference", "dummy"
MAX_STOP_TOKENS = 16  # the length of the kernel's stop list
COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Operand:
    """One array the kernel reads, at `offset` in the weights (offset and bytes in bytes; dtype in numpy's names)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    layout: str


@dataclass(frozen=True)
class Weights:
    """Where the weights come from.

    kind: `packed` (weights.bin), `reference` (packed at load from `location`, a directory or org/name@commit, whose
    files must have the given hashes) or `dummy` (random values made on the device).
    """

    kind: str
    location: str | None = None
    files: dict[str, FileEntry] | None = None


@dataclass(frozen=True)
class Manifest:
    """All that the loader needs to know before it touches the device. Sizes in bytes, contexts in tokens.

    tools: version of the compiler by its name (`nvrtc`: `13.0`). entry_points: symbols of the binary by
    purpose (`generate`, `fill`, `prompt`, `samples`). hub: org/name@commit of a checkpoint from the hub.
    threads: of a block. kv_dtype: of the KV cache, `bf16` or `fp8`.
    """

    kogc: str
    tools: dict[str, str]
    model: str
    spec: ModelSpec
    config_sha256: str | None
    hub: str | None
    target: str
    arch: str
    sms: int
    profile: GpuProfile
    blocks: int
    threads: int
    shared_memory: int
    entry_points: dict[str, str]
    operands: tuple[Operand, ...]
    weights: Weights
    weights_bytes: int
    slab_bytes: int
    kv_dtype: str
    kv_bytes: int
    exchange_bytes: int
    max_context: int
    rope_scaling: RopeScaling | None
    stop_tokens: tuple[int, ...]
    knobs: Knobs
    notes: tuple[str, ...]
    files: dict[str, FileEntry]
    schema: int = SCHEMA

    def operand(self, name: str) -> Operand | None:
        """The operand of that name, None where the model has none."""
        return next((operand for operand in self.operands if operand.name == name), None)

    def plan(self) -> Plan:
        """The plan the artifact was built from; KogcError where this kogc would lay it out differently."""
        plan = Plan(
            self.spec, self.profile, self.knobs, self.blocks, self.max_context, self.notes, kv_dtype=self.kv_dtype
        )
        theirs = (self.slab_bytes, self.kv_bytes, self.exchange_bytes)
        if theirs != (plan.slab_bytes, plan.kv_bytes, plan.exchanges.bytes):
            raise KogcError(f"{MANIFEST}: laid out by kogc {self.kogc} in another way; rebuild the artifact")
        return plan

    def to_json(self) -> dict[str, Any]:
        """As stored: `format` and `schema` say what it is, `manifest_sha256` covers everything else."""
        body: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        body["manifest_sha256"] = _self_hash(body)
        return body


def _self_hash(body: dict[str, Any]) -> str:
    covered = {key: value for key, value in body.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of an artifact directory.

    KogcError: not an artifact, another schema (it says which kogc to rebuild with), a damaged manifest, or a listed
    file that is missing or has another size. Contents of the files are not hashed here: see verify.
    """
    root = Path(directory)
    body = _read_body(root)
    if body.get("schema") != SCHEMA:
        made_by = f"schema {body.get('schema')}, by kogc {body.get('kogc', '?')}"
        raise KogcError(f"{root / MANIFEST}: {made_by}; this kogc reads schema {SCHEMA}: rebuild with `kogc build`")
    try:
        manifest = _from_json(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KogcError(f"{root / MANIFEST}: damaged ({type(error).__name__}: {error}); rebuild the artifact") from None
    if body.get("manifest_sha256") != _self_hash(body):
        raise KogcError(f"{root / MANIFEST}: does not match its own SHA-256; rebuild the artifact")
    for name, entry in manifest.files.items():
        _check_size(root, name, entry)
    return manifest


def _read_body(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        what = "no such directory" if not root.exists() else f"not an artifact: it has no {MANIFEST}"
        raise KogcError(f"{root}: {what}") from None
    except NotADirectoryError:
        raise KogcError(f"{root}: not an artifact: not a directory") from None
    except OSError as error:
        raise KogcError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise KogcError(f"{path}: damaged: not JSON; rebuild the artifact") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise KogcError(f"{path}: not the manifest of a kogc artifact")
    return body


def _from_json(body: dict[str, Any]) -> Manifest:
    values = {field.name: body[field.name] for field in fields(Manifest)}
    weights = values["weights"]
    values.update(
        spec=_spec(values["spec"]),
        profile=_profile(values["profile"]),
        knobs=Knobs(**values["knobs"]),
        operands=tuple(Operand(**{**o, "shape": tuple(o["shape"])}) for o in values["operands"]),
        weights=Weights(weights["kind"], weights["location"], weights["files"] and _file_table(weights["files"])),
        rope_scaling=values["rope_scaling"] and RopeScaling(**values["rope_scaling"]),
        stop_tokens=tuple(values["stop_tokens"]),
        notes=tuple(values["notes"]),
        files=_file_table(values["files"]),
    )
    for key in ("blocks", "threads", "shared_memory", "weights_bytes", "slab_bytes", "kv_bytes", "max_context"):
        if type(values[key]) is not int or values[key] < 0:
            raise ValueError(f"{key} is not a size")
    if values["kv_dtype"] not in KV_DTYPES:
        raise ValueError(f"kv_dtype {values['kv_dtype']!r}")
    return Manifest(**values)


def _spec(data: dict[str, Any]) -> ModelSpec:
    rope = data["rope"]
    scaling = rope["scaling"] and RopeScaling(**rope["scaling"])
    sliding = data["sliding_layers"]
    return ModelSpec(
        **{
            **data,
            "rope": Rope(rope["theta"], scaling),
            "sliding_layers": None if sliding is None else tuple(sliding),
            "eos_tokens": tuple(data["eos_tokens"]),
        }
    )


def _profile(data: dict[str, Any]) -> GpuProfile:
    return GpuProfile(**{**data, "measured": Measured(**data["measured"]), "flags": tuple(data["flags"])})


def _file_table(table: dict[str, Any]) -> dict[str, FileEntry]:
    for name in table:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts:
            raise ValueError(f"file name {name!r}")
    return {name: FileEntry(entry["bytes"], entry["sha256"]) for name, entry in table.items()}


def _check_size(root: Path, name: str, entry: FileEntry) -> None:
    try:
        size = (root / name).stat().st_size
    except OSError:
        raise KogcError(f"{root / name}: missing; rebuild the artifact") from None
    if size != entry.bytes:
        raise KogcError(f"{root / name}: {size} bytes, the manifest says {entry.bytes}; rebuild the artifact")


def verify(directory: str | os.PathLike[str], progress: Callable[[int], None] | None = None) -> Manifest:
    """Hash every file again; KogcError names the first that differs. `progress` gets the bytes hashed since last."""
    root = Path(directory)
    manifest = read_manifest(root)
    for name in manifest.files:
        check_file(root, name, manifest, progress)
    return manifest


def check_file(root: Path, name: str, manifest: Manifest, progress: Callable[[int], None] | None = None) -> None:
    """KogcError where a file of the artifact is not what was built."""
    if hash_file(root / name, progress).sha256 != manifest.files[name].sha256:
        raise KogcError(f"{root / name}: does not match the manifest's SHA-256; rebuild the artifact")


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> FileEntry:
    """Size and SHA-256 of a file, read in pieces; KogcError where it cannot be read."""
    digest = hashlib.sha256()
    size = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(COPY_BYTES):
                digest.update(piece)
                size += len(piece)
                if progress:
                    progress(len(piece))
    except OSError as error:
        raise KogcError(f"{path}: {error.strerror}") from None
    return FileEntry(size, digest.hexdigest())


class HashingFile:
    """A binary file that is hashed as it is written, so that weights are not read a second time."""

    def __init__(self, path: Path, out: Path, progress: Callable[[int], None] | None = None) -> None:
        self._out = out
        self._digest = hashlib.sha256()
        self._progress = progress
        self.bytes = 0
        with _disk_errors(out):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        with _disk_errors(self._out):
            self._file.write(view)
        self._digest.update(view)
        self.bytes += len(view)
        if self._progress:
            self._progress(len(view))
        return len(view)

    def close(self) -> FileEntry:
        """Flush, and return size and hash."""
        with _disk_errors(self._out):
            self._file.close()
        return FileEntry(self.bytes, self._digest.hexdigest())


class Writer:
    """Builds an artifact beside its place and moves it there at the end: `with Writer(out) as w: ...; w.finish(m)`.

    Leaving the block in any other way (an error, a full disk, Ctrl-C) removes everything written.
    """

    def __init__(self, out: Path) -> None:
        check_replaceable(out)
        self.out = Path(os.path.realpath(out))
        self.files: dict[str, FileEntry] = {}
        self._root: Path | None = None
        self._new_parents: list[Path] = []

    def __enter__(self) -> Writer:
        self._new_parents = [parent for parent in self.out.parents if not parent.exists()]
        with _disk_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._root = Path(tempfile.mkdtemp(dir=self.out.parent, prefix=f".{self.out.name}.building-"))
            self._root.chmod(0o755)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
        if not self.out.exists():
            for parent in self._new_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()

    @property
    def root(self) -> Path:
        assert self._root is not None, "the writer is open only inside its with block"
        return self._root

    def add(self, name: str, data: bytes) -> None:
        """Write a small file and note its hash."""
        with self.open(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def open(self, name: str, progress: Callable[[int], None] | None = None) -> Iterator[HashingFile]:
        """A file to write in pieces; its hash is noted when it closes."""
        file = HashingFile(self.root / name, self.out, progress)
        try:
            yield file
        finally:
            self.files[name] = file.close()

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and put the directory in its place, over an older artifact if there is one."""
        text = json.dumps(manifest.to_json(), sort_keys=True, indent=1, ensure_ascii=True) + "\n"
        with _disk_errors(self.out):
            (self.root / MANIFEST).write_text(text, encoding="utf-8")
            check_replaceable(self.out)
            _put_in_place(self.root, self.out)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """A full disk or a forbidden directory is the user's to solve: one line. Only writing happens inside."""
    try:
        yield
    except OSError as error:
        raise KogcError(f"cannot write {out}: {error.strerror or error}; nothing was kept") from None


def check_replaceable(out: Path) -> None:
    """Refuse to write over anything but an older artifact (with nothing else in it) or an empty directory."""
    if not out.exists():
        if out.is_symlink():
            raise KogcError(f"{out}: a broken symbolic link")
        _check_parent(out)
        return
    if not out.is_dir():
        raise KogcError(f"{out}: exists and is not a directory")
    if out.samefile(Path.cwd()):
        raise KogcError(f"{out}: is the directory you are in, which a build would replace; choose another -o")
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if not present:
        return
    try:
        known = set(_read_body(out).get("files", {})) | {MANIFEST}
    except (KogcError, TypeError):
        what = "its manifest is damaged" if (out / MANIFEST).is_file() else "is not a kogc artifact"
        raise KogcError(f"{out}: exists and {what}; remove it or choose another -o") from None
    if foreign := sorted(present - known):
        raise KogcError(f"{out}: holds {foreign[0]}, which is not part of the artifact; move it or choose another -o")


def _check_parent(out: Path) -> None:
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise KogcError(f"cannot write {out}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise KogcError(f"cannot write {out}: no permission to write in {parent}")


def _put_in_place(new: Path, out: Path) -> None:
    if not out.exists():
        new.rename(out)
    elif _exchange(new, out):
        shutil.rmtree(new, ignore_errors=True)
    else:
        _replace_in_two_steps(new, out)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step (Linux renameat2); False where the system cannot."""
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), flag) == 0)


def _replace_in_two_steps(new: Path, out: Path) -> None:
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.replaced-"))
    try:
        out.rename(aside / "old")
        try:
            new.rename(out)
        except BaseException:
            (aside / "old").rename(out)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
