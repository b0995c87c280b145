"""Writing files: each whole or not at all, and the files of a source into a folder."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from .errors import KogcError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace or make a file; what is no plain file (a pipe, a device) is written into. OSError where that fails."""
    place = os.path.realpath(path)  # of a link, what it points to
    if os.path.exists(place) and not os.path.isfile(place):
        Path(place).write_bytes(data)
        return
    new = f"{place}.{secrets.token_hex(6)}.new"
    try:
        with open(new, "xb") as file:
            file.write(data)
        os.replace(new, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


def write_text(path: Path, text: str) -> None:
    """The same for a text that a flag names: KogcError names the file."""
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise KogcError(f"{path}: {error.strerror}") from None


def write_tree(folder: Path, texts: Mapping[str, str]) -> None:
    """Texts by their names, which may lie in folders of their own, into a scratch folder."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def check_writable(path: Path) -> None:
    """KogcError where a file of this name could not be made: asked before work whose result it is to hold."""
    parent = path.parent
    if path.is_dir():
        raise KogcError(f"{path}: is a directory")
    if not parent.is_dir():
        raise KogcError(f"{path}: no directory {parent}")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise KogcError(f"{path}: no permission to write")
