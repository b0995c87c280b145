"""How commands print: aligned tables, byte counts, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..files import write_text


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns; a column whose cells all begin with a digit (or are '-') is set to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [all(cell[:1].isdigit() or cell in ("-", "") for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, cells)])


def size(count: float) -> str:
    """A byte count for people, in decimal units as bandwidths are: 999 B, 1.24 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            decimals = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
            return f"{count:.{decimals}f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def span(pair: Sequence[int]) -> str:
    """`least..most`, or one number where they agree."""
    least, most = pair
    return f"{least:,}" if least == most else f"{least:,}..{most:,}"


def emit_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, sort_keys=True))


def remark(text: str) -> None:
    """A remark beside the result: stderr, so that pipes carry only the result."""
    click.echo(f"kogc: note: {text}", err=True)


def emit_text(text: str, out: Path | None) -> None:
    """To a file, or to stdout where none is named. KogcError names a file that cannot be written."""
    if out is None:
        click.echo(text, nl=False)
        return
    write_text(out, text)
