"""What the user means by a model: a checkpoint directory, a shipped spec, a spec file or a hub id."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import KogcError
from .spec import ModelSpec, find_spec, list_specs, load_spec


@dataclass(frozen=True)
class ModelSource:
    """directory: the checkpoint, None for a bare spec. location: its absolute path, or a hub id with its commit."""

    spec: ModelSpec
    directory: Path | None
    location: str
    hub: str | None
    notes: tuple[str, ...]


def find_model(model: str) -> ModelSource:
    """Read the spec of a model and find its checkpoint; KogcError when there is no such model."""
    if not model:
        raise KogcError("the model is an empty name")
    path = Path(os.path.expanduser(model))  # of Path: RuntimeError where there is no such user
    is_spec = model in list_specs() and not (path / "config.json").is_file()
    if is_spec or path.suffix in (".yaml", ".yml"):
        return ModelSource(load_spec(find_spec(model)), None, model, None, ())
    if path.is_dir():
        return _checkpoint(model, path, None)
    if path.exists():
        raise KogcError(f"{model}: neither a checkpoint directory nor a spec (.yaml)")
    if "/" not in model:
        raise KogcError(f"{model}: no such directory, and no spec of that name (see `kogc models`)")
    from .hub import resolve

    directory, commit = resolve(model)
    return _checkpoint(model, directory, f"{model.partition('@')[0]}@{commit or 'unknown'}")


def _checkpoint(model: str, directory: Path, hub: str | None) -> ModelSource:
    from .importer import spec_from_dir

    spec, notes = spec_from_dir(directory)
    if hub is not None:  # the directory in the hub's cache is named after the commit
        spec = replace(spec, name=hub.partition("@")[0].rpartition("/")[2].lower())
    return ModelSource(spec, directory, hub or os.path.abspath(directory), hub, tuple(notes))
