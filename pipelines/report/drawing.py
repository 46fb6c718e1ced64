"""How charts are drawn: inline SVG, legible in print, in grey, on dark and for colour-blind readers.

Colours are Okabe and Ito's; every series also differs by marker or dash. Each is written as a custom property with the
colour as its fallback: the page's style sheet sets them for its theme, and a chart that stands alone keeps its own.
"""

from __future__ import annotations

import html
import io
import re
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.figure import Figure

RAW, MERGED, ANNEALED, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
LAYERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, PAPER, GRID = "#1a1a1a", "#ffffff", "#dddddd"
PROPERTIES = {
    RAW: "raw", MERGED: "merged", ANNEALED: "annealed", GREY: "muted", INK: "ink", PAPER: "paper", GRID: "grid",
    LAYERS[3]: "pink", LAYERS[4]: "amber", LAYERS[5]: "sky",
}  # fmt: skip
"""Colour to the custom property that the page may set."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "pmaflow",
    "legend.frameon": False,
}
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def bin_means(points: list[tuple[float, float]], bins: int = 250) -> list[tuple[float, float]]:
    """Means of at most ``bins`` equal stretches, so that thousands of steps stay a readable line."""
    size = max(1, -(-len(points) // bins))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def to_svg(figure: Figure, *, title: str, description: str) -> str:
    """The figure as an ``<svg>`` element with its name and what it shows in words; the same figure gives the same bytes."""
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    pyplot.close(figure)
    text = buffer.getvalue()
    name = slug(title)
    text = re.sub(r'\bid="', f'id="{name}-', text[text.index("<svg") :])
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    for colour, own in PROPERTIES.items():
        text = text.replace(f": {colour.lower()}", f": var(--{own}, {colour.lower()})")
    tag, _, body = text.partition(">")
    return f"{tag} {described_by(name)}>{titles(name, title, description)}{body}"


def described_by(name: str) -> str:
    """Attributes of an ``<svg>`` whose title and description :func:`titles` wrote."""
    return f'role="img" aria-labelledby="{name}-title {name}-desc"'


def titles(name: str, title: str, description: str) -> str:
    """What a screen reader says of an ``<svg>``, and a pointer shows."""
    return (
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(description)}</desc>'
    )


def slug(text: str) -> str:
    """``text`` as part of an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
