"""The build: model, GPU profile and options become an artifact directory.

The order is: everything that can be refused first, then the compile, then the weights; all of it beside the
artifact's place, which is taken only at the end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, targets
from .artifact import (
    BINARY,
    CHAT_TEMPLATE,
    DUMMY,
    GENERATION_CONFIG,
    MANIFEST,
    MAX_STOP_TOKENS,
    PACKED,
    REFERENCE,
    SOURCE,
    SPEC,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    FileEntry,
    Manifest,
    Weights,
    Writer,
    check_replaceable,
    hash_file,
    read_manifest,
)
from .cache import content_key, default_cache
from .commands.progress import byte_progress, spinner
from .config_json import read_json
from .errors import KogcError, UsageError
from .files import write_atomically
from .importer import ROUNDED
from .model_source import ModelSource, find_model
from .plan.check import check
from .plan.matvec import UNITS
from .plan.plan import Knobs, Options, Plan, make_plan, usable_cores
from .profile import GpuProfile, load_profile
from .spec import ModelSpec, dump_spec

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .render import Rendered

LARGEST_CHECKED = 512  # blocks: checking a plan takes time by their square
SUFFIX = {"cuda": ".cu", "hip": ".hip", "cpu": ".cpp"}
# What comes from the checkpoint as it is.
COPIED = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE, GENERATION_CONFIG)


@dataclass(frozen=True)
class BuildOptions:
    """What the command line chooses. `dry_run` plans, renders and checks, and writes no artifact."""

    max_context: int | None = None
    blocks: int | None = None
    dummy_weights: bool = False
    weights_by_reference: bool = False
    dump_source: Path | None = None
    dry_run: bool = False
    kv_dtype: str = "bf16"  # of the KV cache
    knobs: Knobs | None = None  # None: those tuned for this shape and GPU, else the defaults


@dataclass(frozen=True)
class Prepared:
    """A model, its plan, and remarks for the user (one line each)."""

    source: ModelSource
    plan: Plan
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BuildResult:
    """`out` is None after a dry run; `up_to_date`: the artifact was there already and nothing was done."""

    plan: Plan
    notes: tuple[str, ...]
    out: Path | None
    up_to_date: bool
    source_bytes: int
    artifact_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.plan.spec.name,
            "gpu": self.plan.profile.name,
            "blocks": self.plan.blocks,
            "max_context": self.plan.max_context,
            "kv_dtype": self.plan.kv_dtype,
            "out": None if self.out is None else str(self.out),
            "up_to_date": self.up_to_date,
            "source_bytes": self.source_bytes,
            "artifact_bytes": self.artifact_bytes,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }


def prepare(
    model: str,
    gpu: str,
    max_context: int | None = None,
    blocks: int | None = None,
    knobs: Knobs | None = None,
    tuned: bool = True,
    kv_dtype: str = "bf16",
) -> Prepared:
    """Find the model, make its plan and check it; `gpu` is a profile's name or file, or `auto` for this machine.

    Without knobs, those that were tuned for this shape, GPU and number of blocks are taken, where there are such (and
    where `tuned` does not forbid it).
    """
    profile, note = targets.detect_profile() if gpu == "auto" else (load_profile(gpu), None)
    notes = [note] if note else []
    source = find_model(model)
    options = Options(max_context, blocks, knobs, kv_dtype)
    if tuned and knobs is None:
        options = _tuned_options(source.spec, profile, options)
    if profile.target != "cpu":
        plan = _checked_plan(source.spec, profile, options)
    else:
        # A CPU's size is a fact of the machine at hand: it decides the plan, but the profile is kept as it is.
        here = replace(profile, memory_bytes=profile.memory_bytes or _machine_memory())
        plan = replace(_checked_plan(source.spec, here, options), profile=profile)
        if plan.blocks > (cores := usable_cores()):
            notes.append(f"{plan.blocks} blocks need as many cores: this machine, which has {cores}, will not run it")
    return Prepared(source, plan, (*notes, *source.notes, *plan.notes))


def _tuned_options(spec: ModelSpec, profile: GpuProfile, options: Options) -> Options:
    """The options with the knobs found by the tuner, if they are for this very number of blocks."""
    from .tuned import tuned_for

    tuned = tuned_for(spec, profile, options.kv_dtype)
    blocks = options.blocks or (usable_cores() if profile.target == "cpu" else None)
    if tuned is None or blocks not in (None, tuned.setting.blocks):
        return options
    return replace(options, blocks=tuned.setting.blocks, knobs=tuned.setting.knobs)


def _checked_plan(spec: ModelSpec, profile: GpuProfile, options: Options) -> Plan:
    """A plan that keeps its promises, with fewer blocks than the profile's where a small model has no work for all.

    A block without rows in a layer is one that no other block waits for: it may be late, and read what is not its own.
    """
    most = max(1, spec.hidden // UNITS[0])  # so many have rows of every vector of the residual stream's size
    idle = f"--blocks {options.blocks}: some have nothing to do in some phase; any number up to {most} will do"
    if options.blocks is not None and options.blocks > max(most, LARGEST_CHECKED):
        raise UsageError(idle)
    plan = make_plan(spec, profile, options)
    try:
        check(plan)
    except KogcError:
        fewer = (most,) if plan.blocks > most else tuple(plan.blocks * eighths // 8 for eighths in (7, 6, 5, 4))
        few = next(filter(None, (_sound(spec, profile, options, blocks) for blocks in fewer)), None)
        if few is None or (options.blocks is not None and plan.blocks <= most):
            raise
        if options.blocks is not None:
            raise UsageError(idle) from None
        instead = f"{few.blocks} blocks, not the {plan.blocks} of {profile.name}"
        return replace(few, notes=(*few.notes, f"{instead}: more would have nothing to do in some phase"))
    return plan


def _sound(spec: ModelSpec, profile: GpuProfile, options: Options, blocks: int) -> Plan | None:
    """The plan with so many blocks, where it keeps its promises."""
    if not blocks:
        return None
    plan = make_plan(spec, profile, replace(options, blocks=blocks))
    try:
        check(plan)
    except KogcError:
        return None
    return plan


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def build(model: str, gpu: str, out: Path | None, options: BuildOptions = BuildOptions()) -> BuildResult:
    """Build an artifact at `out` (see BuildOptions). KogcError or UsageError for all that the user can change."""
    started = time.monotonic()
    _check_options(out, options)
    prepared = prepare(model, gpu, options.max_context, options.blocks, options.knobs, kv_dtype=options.kv_dtype)
    _check_weights(model, prepared, options)
    from .render import render

    job = _Job(prepared, render(prepared.plan), options)
    if options.dump_source is not None:
        _dump_source(job, options.dump_source)
    up_to_date = False
    if not options.dry_run:
        assert out is not None
        up_to_date = job.run(out)
    size = 0 if options.dry_run or out is None else _artifact_bytes(out)
    return BuildResult(
        plan=prepared.plan,
        notes=job.all_notes(),
        out=None if options.dry_run else out,
        up_to_date=up_to_date,
        source_bytes=len(job.rendered.source.encode()),
        artifact_bytes=size,
        seconds=time.monotonic() - started,
    )


def _check_options(out: Path | None, options: BuildOptions) -> None:
    if options.dummy_weights and options.weights_by_reference:
        raise UsageError("--dummy-weights and --weights-by-reference exclude each other")
    if options.dry_run:
        return
    if out is None:
        raise UsageError("-o DIR is missing: where should the artifact go?")
    check_replaceable(out)


def _check_weights(model: str, prepared: Prepared, options: BuildOptions) -> None:
    if prepared.source.directory is None and not options.dummy_weights and not options.dry_run:
        raise UsageError(f"{model} is a spec and has no weights: give a checkpoint, or --dummy-weights")
    if len(prepared.plan.spec.eos_tokens) > MAX_STOP_TOKENS:
        raise KogcError(f"{model}: eos_tokens: {len(prepared.plan.spec.eos_tokens)}, at most {MAX_STOP_TOKENS} fit")


def _dump_source(job: _Job, directory: Path) -> None:
    try:
        for name, text in job.source_files():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
    except OSError as error:
        raise KogcError(f"--dump-source {directory}: {error.strerror}") from None


def _artifact_bytes(out: Path) -> int:
    return sum(entry.bytes for entry in read_manifest(out).files.values())


@dataclass
class _Job:
    """One build after all choices are made."""

    prepared: Prepared
    rendered: Rendered
    options: BuildOptions
    notes: list[str] = field(default_factory=list)
    opened: bool = False  # the weights, whose own remarks say what is rounded

    @property
    def plan(self) -> Plan:
        return self.prepared.plan

    @property
    def directory(self) -> Path | None:
        """The checkpoint whose weights go in; None for dummy weights."""
        return None if self.options.dummy_weights else self.prepared.source.directory

    def source_files(self) -> list[tuple[str, str]]:
        """Name and text of the kernel source and the headers it includes."""
        main = f"monokernel{SUFFIX[self.plan.target]}"
        return [(main, self.rendered.source), *sorted(self.rendered.headers.items())]

    def all_notes(self) -> tuple[str, ...]:
        """Every remark once: what config.json promised of rounding gives way to what was found in the weights."""
        early = self.prepared.notes
        if self.opened:
            early = tuple(note for note in early if not note.endswith(ROUNDED))
        return (*early, *self.notes)

    def run(self, out: Path) -> bool:
        """Build unless `out` is the result of the same build already; True when it is."""
        compiler = targets.compiler(self.plan)
        stamp = _Stamp(out, self._inputs(compiler))
        if stamp.holds():
            return True
        self._check_texts()
        if self.directory is None:
            self._write(out, compiler, None)
        else:
            from .checkpoint import open_checkpoint

            with open_checkpoint(self.directory, self.plan.spec) as checkpoint:
                self.opened = True
                self.notes += checkpoint.notes
                self._write(out, compiler, checkpoint)
        stamp.renew()
        return False

    def _inputs(self, compiler: tuple[str, str]) -> Iterable[str]:
        """Everything that decides the artifact's bytes; weights by size and time, as make does."""
        yield from (__version__, *COPIED, *compiler, repr(self.plan), self.prepared.source.location, repr(self.options))
        for name, text in self.source_files():
            yield from (name, text)
        if self.prepared.source.directory is not None:
            for path in sorted(self.prepared.source.directory.iterdir()):
                if path.is_file():  # not a broken link, which is nothing to a build
                    stat = path.stat()
                    yield f"{os.path.realpath(path)} {stat.st_size} {stat.st_mtime_ns}"

    def _write(self, out: Path, compiler: tuple[str, str], checkpoint: Checkpoint | None) -> None:
        with spinner(f"compiling with {' '.join(compiler)}"):
            binary = targets.compile_binary(self.rendered, self.plan)
        with Writer(out) as writer:
            writer.add(BINARY, binary)
            writer.add(SPEC, dump_spec(self.plan.spec).encode())
            for name, text in self.source_files():
                writer.add(f"{SOURCE}/{name}", text.encode())
            self._copy_texts(writer)
            weights = self._weights(writer, checkpoint)
            writer.finish(self._manifest(compiler, weights, writer.files))

    def _check_texts(self) -> None:
        """Refuse what the loader would refuse, before the weights are packed."""
        source = self.prepared.source.directory
        if source is None:
            return
        from .sampling import sampling_from_config
        from .tokenizer import Tokenizer

        if (source / TOKENIZER).exists():
            Tokenizer(source)
        if (source / GENERATION_CONFIG).exists():
            sampling_from_config(source / GENERATION_CONFIG)
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
            if (source / name).exists():
                read_json(source / name)

    def _copy_texts(self, writer: Writer) -> None:
        """The tokenizer, the chat template and the generation settings, where the checkpoint has them."""
        source = self.prepared.source.directory
        for name in COPIED:
            if source is not None and (source / name).is_file():
                writer.add(name, _read(source / name))
        if TOKENIZER not in writer.files:
            self.notes.append(f"no {TOKENIZER}: the artifact takes and gives token ids only")

    def _weights(self, writer: Writer, checkpoint: Checkpoint | None) -> Weights:
        if checkpoint is None:
            return Weights(DUMMY)
        if self.options.weights_by_reference:
            return Weights(REFERENCE, self.prepared.source.location, _hash_all(checkpoint))
        _pack(self.plan, checkpoint, writer)
        return Weights(PACKED)

    def _manifest(self, compiler: tuple[str, str], weights: Weights, files: dict[str, FileEntry]) -> Manifest:
        from .packing import operands, total_bytes

        plan, source = self.plan, self.prepared.source
        config = None if source.directory is None else hash_file(source.directory / "config.json").sha256
        return Manifest(
            kogc=__version__,
            tools={compiler[0]: compiler[1]},
            model=plan.spec.name,
            spec=plan.spec,
            config_sha256=config,
            hub=source.hub,
            target=plan.target,
            arch=plan.profile.arch,
            sms=plan.profile.sms,
            profile=plan.profile,
            blocks=plan.blocks,
            threads=plan.threads,
            shared_memory=plan.memory.bytes if plan.target != "cpu" else 0,
            entry_points=targets.entry_points(plan),
            operands=tuple(operands(plan)),
            weights=weights,
            weights_bytes=total_bytes(plan),
            slab_bytes=plan.slab_bytes,
            kv_dtype=plan.kv_dtype,
            kv_bytes=plan.kv_bytes,
            exchange_bytes=plan.exchanges.bytes,
            max_context=plan.max_context,
            rope_scaling=plan.spec.rope.scaling,
            stop_tokens=plan.spec.eos_tokens,
            knobs=plan.knobs,
            notes=plan.notes,  # other remarks name files of this machine
            files=dict(files),
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KogcError(f"{path}: {error.strerror}") from None


def _pack(plan: Plan, checkpoint: Checkpoint, writer: Writer) -> None:
    from .packing import total_bytes, write_weights

    size = total_bytes(plan)
    with byte_progress("packing weights", size) as advance:
        shown = 0

        def progress(done: int, total: int) -> None:
            nonlocal shown
            now = size * done // total
            advance(now - shown)
            shown = now

        try:
            write_weights(plan, checkpoint, writer.root / WEIGHTS, progress)
        except KogcError as error:  # the user knows the artifact's place, not the one it is built in
            raise KogcError(str(error).replace(str(writer.root), str(writer.out))) from None
    with byte_progress("hashing weights", size) as advance:
        writer.files[WEIGHTS] = hash_file(writer.root / WEIGHTS, advance)


def _hash_all(checkpoint: Checkpoint) -> dict[str, FileEntry]:
    total = sum(path.stat().st_size for path in checkpoint.files)
    with byte_progress("hashing checkpoint", total) as advance:
        return {path.name: hash_file(path, advance) for path in checkpoint.files}


class _Stamp:
    """Remembers, in the cache, which inputs made the artifact at a place, and what its files looked like then.

    It is kept outside the artifact, whose bytes must not depend on times and places.
    """

    def __init__(self, out: Path, inputs: Iterable[str]) -> None:
        self._out = out
        self._cache = default_cache()
        self._key = content_key(["artifact", os.path.realpath(out), *inputs])

    def holds(self) -> bool:
        """Whether the artifact is there, untouched since it was made from the same inputs."""
        kept = self._cache.get(self._key)
        return kept is not None and kept == self._look()

    def renew(self) -> None:
        look = self._look()
        if look is not None:
            self._cache.put(self._key, look)

    def _look(self) -> bytes | None:
        """Size and time of every file of the artifact; None where it is not whole."""
        try:
            names = [MANIFEST, *read_manifest(self._out).files]
            stats = [(self._out / name).stat() for name in names]
        except (KogcError, OSError):
            return None
        return json.dumps([[n, s.st_size, s.st_mtime_ns] for n, s in zip(names, stats, strict=True)]).encode()
