"""The ablation's heat map: N by V, one per merge method and end point, as SVG with the losses in its cells.

Fills are a ramp of one hue from the lowest loss (pale) to the highest (deep) over all maps that are to be compared; every
cell says its number, the best and the recommended one are marked in words and by a frame, so that nothing hangs on colour.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report.drawing import described_by, slug, titles

PALE, DEEP = (232, 241, 250), (8, 64, 129)
CELL_WIDTH, CELL_HEIGHT = 112, 48
LEFT, TOP = 64, 66
LETTER_WIDTH = 8
"""Of bold text, rather more than less."""
Cell = Mapping[str, Any]
"""A cell of an ablation record: ``method``, ``alpha``, ``count``, ``interval_tokens``, ``end_step``, ``name``, ``loss``."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the fills stand for: equal colours are equal losses on every map drawn with it."""

    low: float
    """Lowest loss, nats per token."""
    high: float
    """Highest loss."""

    def fill(self, loss: float) -> tuple[int, int, int]:
        """Red, green and blue of ``loss``."""
        share = (loss - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        red, green, blue = (round(a + share * (b - a)) for a, b in zip(PALE, DEEP, strict=True))
        return red, green, blue


def scale_of(cells: Sequence[Cell]) -> Scale:
    """One scale for all ``cells``, of which there is at least one."""
    losses = [float(cell["loss"]) for cell in cells]
    return Scale(low=min(losses), high=max(losses))


def heat_maps(cells: Sequence[Cell], ends: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A map for each end point and method of an ablation record, by name, all on one scale; none for a record without cells."""
    maps: dict[str, str] = {}
    for end in ends:
        mine = [cell for cell in cells if cell["end_step"] == end["step"]]
        for label in dict.fromkeys(method_label(cell) for cell in mine):
            marks = {end["chosen"]: "take", end["best"]: "lowest"}
            if end["best"] == end["chosen"]:
                marks = {end["best"]: "lowest, take"}
            title = f"{label}, windows that end at step {end['step']:,}"
            own = [cell for cell in mine if method_label(cell) == label]
            maps[title] = heat_map(own, title=title, scale=scale_of(cells), marks=marks)
    return maps


def heat_map(cells: Sequence[Cell], *, title: str, scale: Scale, marks: Mapping[str, str]) -> str:
    """Losses of ``cells``, which share method and end point, N down and V across; ``marks`` are words by cell name."""
    counts = sorted({int(cell["count"]) for cell in cells})
    intervals = sorted({int(cell["interval_tokens"]) for cell in cells})
    losses = {(int(cell["count"]), int(cell["interval_tokens"])): cell for cell in cells}
    width = max(LEFT + CELL_WIDTH * len(intervals) + 8, 16 + LETTER_WIDTH * len(title))
    height = TOP + CELL_HEIGHT * len(counts) + 8
    parts = [_text(8, 20, title, weight="bold"), _text(LEFT, 40, "V, tokens between snapshots", muted=True)]
    parts += [_text(_x(i) + CELL_WIDTH / 2, 58, f"{v:,}", anchor="middle") for i, v in enumerate(intervals)]
    for row, count in enumerate(counts):
        parts.append(_text(LEFT - 8, _y(row) + CELL_HEIGHT / 2 + 4, f"N {count}", anchor="end"))
        for column, interval in enumerate(intervals):
            cell = losses.get((count, interval))
            mark = marks.get(str(cell["name"]), "") if cell else ""
            parts.append(_cell(_x(column), _y(row), cell, scale, mark))
    name = slug(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'class="heat-map" font-family="system-ui, sans-serif" font-size="13" {described_by(name)}>'
        f"{titles(name, f'Heat map: {title}', describe(cells, marks))}{''.join(parts)}</svg>"
    )


def describe(cells: Sequence[Cell], marks: Mapping[str, str]) -> str:
    """The map in a sentence."""
    best = min(cells, key=lambda cell: float(cell["loss"]))
    told = [
        f"{marks[cell['name']]}: N {cell['count']}, V {cell['interval_tokens']:,}"
        for cell in cells
        if cell["name"] in marks
    ]
    lowest = f"the lowest here is {best['loss']:.4f} at N {best['count']}, V {best['interval_tokens']:,}"
    return "; ".join([f"Held-out loss of {len(cells)} merges, N down and V across", lowest, *told])


def method_label(cell: Cell) -> str:
    """``SMA``, or ``EMA 0.2``."""
    return f"EMA {cell['alpha']:g}" if cell["method"] == "ema" else str(cell["method"]).upper()


def _cell(x: float, y: float, cell: Cell | None, scale: Scale, mark: str) -> str:
    if cell is None:
        frame = f'<rect x="{x}" y="{y}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" style="fill: none; stroke: var(--grid, #dddddd)"/>'
        return frame + _text(x + CELL_WIDTH / 2, y + CELL_HEIGHT / 2 + 4, "not made", anchor="middle", muted=True)
    fill = scale.fill(float(cell["loss"]))
    ink = "#000000" if luminance(fill) > 0.179 else "#ffffff"
    inset = 2.5 if mark else 0.5
    box = (
        f'<rect x="{x + inset}" y="{y + inset}" width="{CELL_WIDTH - 2 * inset}" height="{CELL_HEIGHT - 2 * inset}" '
        f'fill="rgb{fill}"{" stroke-width=" + chr(34) + "3" + chr(34) if mark else ""} '
        f'style="stroke: var(--{"merged, #D55E00" if mark else "paper, #ffffff"})"/>'
    )
    middle = y + CELL_HEIGHT / 2
    number = _text(x + CELL_WIDTH / 2, middle + (-2 if mark else 4), f"{cell['loss']:.4f}", anchor="middle", ink=ink)
    return box + number + (_text(x + CELL_WIDTH / 2, middle + 14, mark, anchor="middle", ink=ink) if mark else "")


def luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance of red, green and blue, 0 to 1 (WCAG 2.2); from 0.179 on black stands out more than white."""
    parts = [c / 255 for c in colour]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _x(column: int) -> float:
    return LEFT + CELL_WIDTH * column


def _y(row: int) -> float:
    return TOP + CELL_HEIGHT * row


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", muted: bool = False, ink: str = ""
) -> str:
    colour = ink or ("var(--muted, #555555)" if muted else "var(--ink, #1a1a1a)")
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" style="fill: {colour}">'
        f"{html.escape(text)}</text>"
    )
