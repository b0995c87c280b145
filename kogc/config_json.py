"""The JSON objects of a checkpoint, config.json and others: read strictly, each value by its type."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import KogcError
from .spec import MAX_SIZE

MAX_CONFIG_BYTES = 1 << 24


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, duplicate keys refused; KogcError names the file (and line) at fault."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError as err:
        raise KogcError(f"{path}: missing") from err
    except OSError as err:
        raise KogcError(f"{path}: {err.strerror or err}") from err
    if len(raw) > MAX_CONFIG_BYTES:
        raise KogcError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as err:
        raise KogcError(f"{path}:{err.lineno}: not JSON: {err.msg}") from err
    except UnicodeDecodeError as err:
        raise KogcError(f"{path}: not UTF-8") from err
    except RecursionError as err:
        raise KogcError(f"{path}: nested too deeply") from err
    except ValueError as err:
        raise KogcError(f"{path}: {err}") from err
    if not isinstance(value, dict):
        raise KogcError(f"{path}: expected a JSON object")
    return value


class Config:
    """Typed access to a parsed configuration; every error names the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values = values
        self.source = source
        self.prefix = prefix

    def refuse(self, key: str, why: str) -> KogcError:
        return KogcError(f"{self.source}: {self.prefix}{plain(key)} = {show(self.values.get(key))}: {why}")

    def given(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, "expected an integer")
        if not -(1 << 53) < value < 1 << 53:
            raise self.refuse(key, "out of range")
        return value

    def size(self, key: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
        value = self.integer(key, default)
        if not 1 <= value <= limit:
            raise self.refuse(key, f"must be 1 to {limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(key, "expected a number")
        try:
            result = float(value)
        except OverflowError as err:
            raise self.refuse(key, "out of range") from err
        if not math.isfinite(result):
            raise self.refuse(key, "expected a finite number")
        return result

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "expected true or false")
        return value

    def text(self, key: str) -> str:
        value = self._value(key, None)
        if not isinstance(value, str):
            raise self.refuse(key, "expected text")
        return value

    def _value(self, key: str, default: object) -> object:
        if self.given(key):
            return self.values[key]
        if default is None:
            raise KogcError(f"{self.source}: missing key {self.prefix}{key}")
        return default


def show(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def plain(key: str) -> str:
    """A key as it stands, or quoted where it holds what would break the line or the terminal."""
    return key if key.isprintable() and len(key) <= 80 else show(key)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"duplicate key {key!r}")
        out[key] = value
    return out


def _no_constant(name: str) -> float:
    raise ValueError(f"not JSON: the constant {name}")
