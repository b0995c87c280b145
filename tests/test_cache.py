"""The build cache: what goes in comes out whole, and trouble with it never fails a build."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from kogc.cache import Cache, cache_dir, content_key

KEY = content_key(["a"])


def entry(root: Path, key: str = KEY) -> Path:
    return root / key[:2] / key


def test_key_depends_on_every_part_and_on_where_parts_end() -> None:
    keys = [content_key(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", b"d"])]
    assert len(set(keys)) == len(keys)
    assert content_key(["ab", b"c"]) == content_key(["ab", "c"])


def test_what_is_put_is_got(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "cache")
    assert cache.get(KEY) is None
    cache.put(KEY, b"binary")
    assert cache.get(KEY) == b"binary"
    assert cache.size() == (1, entry(cache.root).stat().st_size)


def test_make_runs_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"x"

    cache = Cache(tmp_path)
    assert [cache.get_or_make(KEY, make) for _ in range(3)] == [b"x"] * 3
    assert made == [1]


def test_failure_of_make_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(ZeroDivisionError):
        cache.get_or_make(KEY, lambda: bytes(1 // 0))
    assert cache.get_or_make(KEY, lambda: b"good") == b"good"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_entry_is_a_miss(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, b"binary" * 100)
    path = entry(tmp_path)
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:40]), "empty": b""}[damage])
    assert cache.get(KEY) is None
    assert cache.get_or_make(KEY, lambda: b"anew") == b"anew"
    assert cache.get(KEY) == b"anew"


def test_unusable_directory_keeps_nothing_and_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file" / "cache")
    cache.put(KEY, b"x")
    assert cache.get(KEY) is None
    assert cache.size() == (0, 0)


def test_full_disk_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache = Cache(tmp_path)
    cache.put(KEY, b"x")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_oldest_entries_make_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=350)
    keys = [content_key([str(i)]) for i in range(3)]
    for age, key in enumerate(keys):
        cache.put(key, bytes(68))  # 100 bytes with the digest
        os.utime(entry(tmp_path, key), (age, age))
    assert cache.get(keys[0]) is not None  # used just now: no longer the oldest
    cache.put(content_key(["new"]), bytes(68))
    assert [cache.get(key) is not None for key in keys] == [True, False, True]


def test_readers_never_see_half_an_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    values = [bytes([i]) * 100_000 for i in range(2)]
    done = threading.Event()

    def write() -> None:
        for i in range(100):
            cache.put(KEY, values[i % 2])
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    while not done.is_set():
        seen.add(cache.get(KEY))
    thread.join()
    assert seen <= {None, *values}


def test_others_may_not_write_entries(tmp_path: Path) -> None:
    Cache(tmp_path / "cache").put(KEY, b"x")
    assert entry(tmp_path / "cache").parent.stat().st_mode & 0o077 == 0


def test_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KOGC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "kogc"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "kogc"
    monkeypatch.setenv("KOGC_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
