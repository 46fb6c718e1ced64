"""How charts are drawn: inline SVG, legible in print, in grey, and for colour-blind readers.

Colours are Okabe and Ito's; every series also differs by marker or dash.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.figure import Figure

RAW, MERGED, ANNEALED, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
LAYERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "pmaflow",
    "legend.frameon": False,
}


def bin_means(points: list[tuple[float, float]], bins: int = 250) -> list[tuple[float, float]]:
    """Means of at most ``bins`` equal stretches, so that thousands of steps stay a readable line."""
    size = max(1, -(-len(points) // bins))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def to_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element; the same figure gives the same bytes."""
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
