"""From an artifact directory to the Program that a runtime loads."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import rope
from ..artifact import BINARY, DUMMY, REFERENCE, WEIGHTS, Manifest, check_file
from . import Program


@contextlib.contextmanager
def open_program(directory: Path, manifest: Manifest) -> Iterator[Program]:
    """The program of an artifact; weights kept by reference are packed into a temporary file, gone at the end."""
    check_file(directory, BINARY, manifest)  # it is run as it is
    plan = manifest.plan()
    frequencies = rope.inv_freq(plan.spec)
    with _weights(directory, manifest) as weights:
        yield Program(
            plan=plan,
            binary=directory / BINARY,
            operands=manifest.operands,
            weights=weights,
            inv_freq=frequencies,
            rope=_rope_table(manifest, frequencies),
            tools=manifest.tools,
        )


def _rope_table(manifest: Manifest, frequencies: NDArray[np.float32]) -> NDArray[np.float32]:
    return rope.table(frequencies, manifest.max_context, rope.attention_scaling(manifest.spec))


@contextlib.contextmanager
def _weights(directory: Path, manifest: Manifest) -> Iterator[Path | None]:
    if manifest.weights.kind == DUMMY:
        yield None
    elif manifest.weights.kind == REFERENCE:
        with tempfile.TemporaryDirectory(prefix="kogc-") as scratch:
            path = Path(scratch) / WEIGHTS
            _pack(manifest, path)
            yield path
    else:
        yield directory / WEIGHTS


def _pack(manifest: Manifest, out: Path) -> None:
    """Pack the referenced checkpoint, if it is still what was built. KogcError names the file that changed."""
    from ..checkpoint import open_checkpoint
    from ..hub import check_reference
    from ..packing import write_weights

    root = check_reference(manifest.weights)
    with open_checkpoint(root, manifest.spec) as checkpoint:
        write_weights(manifest.plan(), checkpoint, out)
