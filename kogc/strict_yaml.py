"""Read YAML facts strictly: every complaint is one line that begins with `file:line:`.

Values are read from the composed nodes, not through YAML's own constructors: the schema decides the type, so that
`1e-5` is a number (YAML 1.1 calls it a string) and `no` is not a boolean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from .errors import KogcError

MAX_BYTES = 1 << 20

_INT = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NULLS = ("null", "~", "", "Null", "NULL")
_CORE_TAGS = tuple("tag:yaml.org,2002:" + t for t in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq"))


class Table:
    """One YAML mapping with the lines of its keys. Getters raise KogcError for a missing key or a wrong type."""

    def __init__(self, file: str, node: yaml.MappingNode, prefix: str = "") -> None:
        self.file = file
        self.line = node.start_mark.line + 1
        self._prefix = prefix
        self._nodes: dict[str, yaml.Node] = {}
        self._lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise KogcError(f"{file}:{line}: a key must be a plain word")
            key = key_node.value
            if key in self._nodes:
                raise KogcError(f"{file}:{line}: duplicate key {prefix + key!r} (first on line {self._lines[key]})")
            self._nodes[key] = value_node
            self._lines[key] = line

    def __contains__(self, key: str) -> bool:
        return key in self._nodes

    def error(self, key: str, message: str) -> KogcError:
        """An error about one key, at its line (or at the mapping's, where the key is missing)."""
        return KogcError(f"{self.file}:{self._lines.get(key, self.line)}: {self._prefix}{key}: {message}")

    def only(self, keys: Iterable[str]) -> None:
        """Refuse every key that is not among `keys`, and a mapping that lacks one of them."""
        wanted = list(keys)
        for key, line in self._lines.items():
            if key not in wanted:
                raise KogcError(f"{self.file}:{line}: unknown key {self._prefix + key!r} (known: {', '.join(wanted)})")
        for key in wanted:
            self._node(key)

    def is_null(self, key: str) -> bool:
        node = self._node(key)
        return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULLS

    def text(self, key: str) -> str:
        node = self._scalar(key, "text")
        if node.value == "" or self.is_null(key):
            raise self.error(key, "expected text, found nothing")
        return str(node.value)

    def integer(self, key: str) -> int:
        return self._as_int(key, self._scalar(key, "an integer"))

    def number(self, key: str) -> float:
        node = self._scalar(key, "a number")
        if node.style is not None or not _FLOAT.fullmatch(node.value):
            raise self.error(key, f"expected a number, found {_show(node)}")
        value = float(node.value)
        if not math.isfinite(value):
            raise self.error(key, f"expected a finite number, found {_show(node)}")
        return value

    def boolean(self, key: str) -> bool:
        node = self._scalar(key, "true or false")
        if node.style is not None or node.value not in ("true", "false"):
            raise self.error(key, f"expected true or false, found {_show(node)}")
        return bool(node.value == "true")

    def integers(self, key: str) -> tuple[int, ...]:
        return tuple(self._as_int(key, node) for node in self._items(key, "a list of integers"))

    def words(self, key: str) -> tuple[str, ...]:
        out = []
        for node in self._items(key, "a list of words"):
            if not isinstance(node, yaml.ScalarNode) or node.value == "":
                raise self.error(key, f"expected a list of words, found {_show(node)} in it")
            out.append(node.value)
        return tuple(out)

    def table(self, key: str) -> Table:
        node = self._node(key)
        if not isinstance(node, yaml.MappingNode):
            raise self.error(key, f"expected a mapping, found {_show(node)}")
        return Table(self.file, node, f"{self._prefix}{key}.")

    def _node(self, key: str) -> yaml.Node:
        if key not in self._nodes:
            raise KogcError(f"{self.file}:{self.line}: missing key {self._prefix + key!r}")
        node = self._nodes[key]
        if node.tag not in _CORE_TAGS:
            raise self.error(key, f"the tag {node.tag!r} is not allowed")
        return node

    def _scalar(self, key: str, wanted: str) -> yaml.ScalarNode:
        node = self._node(key)
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(key, f"expected {wanted}, found {_show(node)}")
        return node

    def _items(self, key: str, wanted: str) -> list[yaml.Node]:
        node = self._node(key)
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(key, f"expected {wanted}, found {_show(node)}")
        return list(node.value)

    def _as_int(self, key: str, node: yaml.Node) -> int:
        if not isinstance(node, yaml.ScalarNode) or node.style is not None or not _INT.fullmatch(node.value):
            raise self.error(key, f"expected an integer, found {_show(node)}")
        if len(node.value) > 19:
            raise self.error(key, "the integer is out of range")
        return int(node.value)


def read(path: Path) -> Table:
    """Compose a YAML file whose top level is a mapping; KogcError (`file:line: ...`) for anything else."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as err:
        raise KogcError(f"{path}: {err.strerror or err}") from err
    if len(raw) > MAX_BYTES:
        raise KogcError(f"{path}: larger than {MAX_BYTES} bytes: not a file of facts")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise KogcError(f"{path}:{raw[: err.start].count(10) + 1}: not UTF-8") from err
    return parse(text, str(path))


def parse(text: str, file: str) -> Table:
    """The mapping that `text` holds; `file` names it in errors."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise KogcError(f"{file}:{line}: not YAML: {_one_line(err.problem or err.context or 'syntax error')}") from err
    except yaml.YAMLError as err:
        raise KogcError(f"{file}:1: not YAML: {_one_line(str(err))}") from err
    except RecursionError as err:
        raise KogcError(f"{file}:1: not YAML of facts: nested too deeply") from err
    if not isinstance(node, yaml.MappingNode):
        raise KogcError(f"{file}:1: expected a mapping of keys to values")
    return Table(file, node)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    value = _one_line(str(node.value))
    if value == "":
        return "nothing"
    return repr(value if len(value) <= 40 else value[:37] + "...")
