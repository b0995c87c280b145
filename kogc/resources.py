"""Where the data files lie: inside the package when installed, at the top of the tree in a checkout."""

from __future__ import annotations

from pathlib import Path

from .errors import KogcError

KINDS = ("templates", "model_specs", "gpu_profiles")


def data_dir(kind: str) -> Path:
    """The directory of one kind of data file (one of KINDS); KogcError where it is missing."""
    if kind not in KINDS:
        raise KogcError(f"unknown kind of data {kind!r}: one of {', '.join(KINDS)}")
    package = Path(__file__).resolve().parent
    for candidate in (package / "_data" / kind, package.parent / kind):
        if candidate.is_dir():
            return candidate
    raise KogcError(f"{kind}: not found beside the package; the installation is incomplete")
