"""Draw a trace of `kogc bench --trace FILE` as SVG: blocks as tracks, what they do as coloured slices, time in us.

kogc bench llama-3.2-1b --gpu h200-sxm --dummy-weights -d 128 --trace trace.json
python docs/draw_trace.py trace.json trace.svg --layers 3-4 --blocks 8
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

# Colours of the marks of templates/common/trace.h: one of a phase, paler where its results are put or gathered.
COLOURS = {
    "begin": "#bab0ac", "embed": "#bab0ac",
    "qkv_products": "#4e79a7", "qkv_put": "#a0cbe8",
    "query": "#ffbe7d", "attention_products": "#f28e2b", "attention_put": "#ffd9a8", "attention_gather": "#fbe3c4",
    "o_products": "#59a14f", "o_put": "#b5dfa9", "o_gather": "#d9efd3",
    "gate_up_products": "#b6689c", "gate_up_put": "#e2b5d3", "hidden_gather": "#f2dcea",
    "down_products": "#e15759", "down_put": "#ff9d9a", "down_gather": "#ffd2d0",
    "head_products": "#79706e", "head_choice": "#d7d3d1",
}  # fmt: skip
UNKNOWN = "#000000"
LEFT, RIGHT, TOP, WIDTH = 74, 16, 30, 960  # pixels: WIDTH is of the time axis
TRACK, GAP, WAITED = 16, 3, 3  # of a track, between two, and of the bar for time spent waiting for weights
LEGEND_COLUMN, LEGEND_ROW = 170, 18
TICKS = 10  # about


@dataclass(frozen=True)
class Slice:
    """Times in microseconds."""

    block: int
    layer: int
    name: str
    start: float
    length: float
    waited: float


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a trace of `kogc bench --trace` as SVG.")
    parser.add_argument("trace", type=Path, help="what --trace wrote, .json or .json.gz")
    parser.add_argument("svg", type=Path, help="the picture")
    parser.add_argument("--token", type=int, default=1, help="which token of the file (default: 1, the first)")
    parser.add_argument("--layers", type=span, default=(0, 0), metavar="FIRST-LAST", help="layers to draw (default: 0)")
    parser.add_argument("--blocks", type=int, default=8, metavar="N", help="so many blocks, evenly spread (default: 8)")
    asked = parser.parse_args(words)
    try:
        slices = chosen(read(asked.trace), asked.token, asked.layers, asked.blocks)
        asked.svg.write_text(draw(slices), encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.exit(1, f"{asked.trace}: {error}\n")


def span(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    events: list[dict[str, Any]] = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    return [event for event in events if event["ph"] == "X"]


def chosen(events: list[dict[str, Any]], token: int, layers: tuple[int, int], count: int) -> list[Slice]:
    """Slices of `count` blocks, in these layers of this token; time counts from the first of them."""
    blocks = sorted({event["tid"] for event in events})
    shown = {blocks[i * len(blocks) // count] for i in range(count)} if 0 < count < len(blocks) else set(blocks)
    found = [
        Slice(e["tid"], e["args"]["layer"], e["name"], e["ts"], e["dur"], e["args"]["waited_us"])
        for e in events
        if e["tid"] in shown and e["args"]["token"] == token and layers[0] <= e["args"]["layer"] <= layers[1]
    ]
    if not found:
        raise ValueError(f"holds nothing of token {token}, layers {layers[0]} to {layers[1]}")
    begin = min(s.start for s in found)
    return [Slice(s.block, s.layer, s.name, s.start - begin, s.length, s.waited) for s in found]


def draw(slices: list[Slice]) -> str:
    blocks = sorted({s.block for s in slices})
    names = [name for name in COLOURS if any(s.name == name for s in slices)]
    names += sorted({s.name for s in slices} - set(names))
    scale = WIDTH / max(s.start + s.length for s in slices)
    bottom = TOP + len(blocks) * (TRACK + GAP)
    columns = (LEFT + WIDTH) // LEGEND_COLUMN
    rows = -(-(len(names) + 1) // columns)
    height = bottom + 44 + rows * LEGEND_ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" height="{height}" '
        f'viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        *axis(WIDTH / scale, scale, bottom),
        *(text(LEFT - 6, y_of(blocks, block) + TRACK - 4, f"block {block}", "end") for block in blocks),
        *(part for s in slices for part in bars(s, y_of(blocks, s.block), scale)),
        *layer_lines(slices, scale, bottom),
        *legend(names, columns, bottom + 44),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def y_of(blocks: list[int], block: int) -> float:
    return TOP + blocks.index(block) * (TRACK + GAP)


def bars(s: Slice, y: float, scale: float) -> list[str]:
    """A slice, and below it how much of it was spent waiting for weights: its length counts, not its place."""
    x, title = LEFT + s.start * scale, f"{s.name}, layer {s.layer}: {s.length:.2f} us, {s.waited:.2f} for weights"
    out = [rect(x, y, s.length * scale, TRACK, COLOURS.get(s.name, UNKNOWN), title)]
    if s.waited:
        out.append(rect(x, y + TRACK - WAITED, min(s.waited, s.length) * scale, WAITED, "#222222"))
    return out


def axis(length: float, scale: float, bottom: float) -> list[str]:
    step = nice(length / TICKS)
    out = []
    for i in range(math.floor(length / step) + 1):
        x = LEFT + i * step * scale
        out.append(f'<line x1="{x:.2f}" y1="{TOP - 4}" x2="{x:.2f}" y2="{bottom}" stroke="#dddddd"/>')
        out.append(text(x, bottom + 14, f"{i * step:g}", "middle"))
    return [*out, text(LEFT - 6, bottom + 14, "us", "end")]


def nice(step: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `step`."""
    power: float = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def layer_lines(slices: list[Slice], scale: float, bottom: float) -> list[str]:
    out = []
    for layer in sorted({s.layer for s in slices}):
        x = LEFT + min(s.start for s in slices if s.layer == layer) * scale
        out.append(
            f'<line x1="{x:.2f}" y1="{TOP - 14}" x2="{x:.2f}" y2="{bottom}" stroke="#555555" stroke-dasharray="3 2"/>'
        )
        out.append(text(x + 4, TOP - 8, f"layer {layer}" if layer >= 0 else "outside the layers", "start"))
    return out


def legend(names: list[str], columns: int, top: float) -> list[str]:
    entries = [(name.replace("_", " "), COLOURS.get(name, UNKNOWN), 11) for name in names]
    entries.append(("of it, waiting for weights", "#222222", WAITED))
    out = []
    for i, (name, colour, high) in enumerate(entries):
        x, y = 14 + i % columns * LEGEND_COLUMN, top + i // columns * LEGEND_ROW
        out += [rect(x, y - high, 14, high, colour), text(x + 20, y, name, "start")]
    return out


def rect(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height}" fill="{colour}">{inner}</rect>'


def text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{escape(words)}</text>'


if __name__ == "__main__":
    main(sys.argv[1:])
