"""Find a model: a directory as it is, or a Hugging Face hub id through huggingface_hub and its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from .artifact import Weights, hash_file
from .errors import KogcError

# Only what a build reads: not the .bin copies, not original/, not consolidated.safetensors.
PATTERNS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "model.safetensors-*.safetensors",  # shards of other writers
]
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w./-]*))?", re.ASCII)


def resolve(model: str) -> tuple[Path, str | None]:
    """(directory, None) of an existing path, or (cached snapshot, commit) of `org/name[@revision]`.

    Downloads what is missing from the cache unless HF_HUB_OFFLINE is set. KogcError when there is no such model.
    """
    path = Path(os.path.expanduser(model))  # of Path: RuntimeError where there is no such user
    if model and path.exists():
        return path, None
    match = HUB_ID.fullmatch(model)
    if match is None or ".." in model:
        raise KogcError(f"{model or repr(model)}: no such directory, and not a hub id (org/name or org/name@revision)")
    snapshot = _download(model, match[1], match[2])
    commit = snapshot.name if re.fullmatch(r"[0-9a-f]{40}", snapshot.name) else None
    return snapshot, commit


def check_reference(weights: Weights, progress: Callable[[int], None] | None = None) -> Path:
    """The directory of weights kept by reference; KogcError names a file that is not the one that was built from."""
    root, _ = resolve(weights.location or "")
    for name, entry in (weights.files or {}).items():
        if hash_file(root / name, progress).sha256 != entry.sha256:
            raise KogcError(f"{root / name}: not the file that the artifact was built from; rebuild the artifact")
    return root


def _download(model: str, repo: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError as err:
        raise KogcError(f"{model}: no such directory; hub models need huggingface_hub (install kogc[hub])") from err
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS))
    except errors.GatedRepoError as err:  # a kind of RepositoryNotFoundError, so it comes first
        raise KogcError(f"{model}: access is restricted: accept its terms on the hub and log in") from err
    except errors.RevisionNotFoundError as err:
        raise KogcError(f"{model}: the hub has {repo}, but no revision {revision or 'main'}") from err
    except errors.RepositoryNotFoundError as err:
        raise KogcError(f"{model}: no such directory, and no such model on the hub (or it is private)") from err
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as err:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise KogcError(f"{model}: no such directory, not in the cache, and {why}") from err
    except Exception as err:
        # Connection errors come from whichever HTTP library the installed version uses; only the first line is ours.
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise KogcError(f"{model}: cannot be fetched from the hub: {reason[:200]}") from err
