"""The build cache: binaries under the hash of everything that made them. Losing it costs time, never a result."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from .files import write_atomically

DIGEST = 32  # bytes of SHA-256 in front of each entry, so that a damaged entry is a miss and not a wrong binary
MAX_BYTES = 1 << 30  # the least recently used entries go when the cache outgrows this


def cache_dir() -> Path:
    """$KOGC_CACHE, else kogc in $XDG_CACHE_HOME, else ~/.cache/kogc."""
    if own := os.environ.get("KOGC_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "kogc"
    return Path.home() / ".cache" / "kogc"


def content_key(parts: Iterable[str | bytes]) -> str:
    """SHA-256 (hex) of the parts in order. Each part counts with its length: ("ab", "c") differs from ("a", "bc")."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


class Cache:
    """Bytes by key in one directory. Reading and writing never fail: without a usable directory nothing is kept."""

    def __init__(self, root: Path, max_bytes: int = MAX_BYTES) -> None:
        self.root = root
        self.max_bytes = max_bytes

    def get(self, key: str) -> bytes | None:
        """The entry's bytes, or None where there is none or it is damaged."""
        path = self._path(key)
        try:
            if not _is_ours(self.root) or not _is_ours(path.parent):
                return None
            stored = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # of another's cache, or one that can only be read
            os.utime(path)
        data = stored[DIGEST:]
        return data if hashlib.sha256(data).digest() == stored[:DIGEST] else None

    def put(self, key: str, data: bytes) -> None:
        """Keep `data` under `key`; another process sees all of it or nothing."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            # Entries are run as code later, so nobody else may write here.
            self.root.parent.mkdir(parents=True, exist_ok=True)
            for directory in (self.root, path.parent):
                directory.mkdir(mode=0o700, exist_ok=True)
            self._make_room(len(data))
            write_atomically(path, hashlib.sha256(data).digest() + data)

    def get_or_make(self, key: str, make: Callable[[], bytes]) -> bytes:
        """The entry, made and kept first where it is missing; errors of `make` pass through."""
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def size(self) -> tuple[int, int]:
        """Number of entries and their bytes."""
        sizes = [stat.st_size for _, stat in self._entries()]
        return len(sizes), sum(sizes)

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / key

    def _entries(self) -> list[tuple[Path, os.stat_result]]:
        entries = []
        for path in self.root.glob("??/*"):  # unfinished ones too: they go in time
            with contextlib.suppress(OSError):
                entries.append((path, path.stat()))
        return entries

    def _make_room(self, incoming: int) -> None:
        entries = sorted(self._entries(), key=lambda entry: entry[1].st_mtime_ns)
        excess = sum(stat.st_size for _, stat in entries) + incoming - self.max_bytes
        for path, stat in entries:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= stat.st_size


def default_cache() -> Cache:
    return Cache(cache_dir())


def _is_ours(directory: Path) -> bool:
    """Whether nobody but us, and root, can have put anything there."""
    stat = directory.stat()
    return stat.st_uid in (os.geteuid(), 0) and not stat.st_mode & 0o022
