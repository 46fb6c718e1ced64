"""Loss against the merge span (N - 1) V: whether the span alone decides, not N and V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot

from pipelines.report.drawing import GREY, INK, LAYERS, MARKERS, STYLE, to_svg
from pipelines.report.heat_map import Cell, method_label


def span_view(cells: Sequence[Cell], end: Mapping[str, Any]) -> str:
    """Losses of the ``cells`` of one end point of an ablation record over their span, and the mean at each span, as SVG."""
    title = f"Loss by merge span, windows that end at step {end['step']:,}"
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7, 3.2))
        for number, label in enumerate(dict.fromkeys(method_label(cell) for cell in cells)):
            mine = [cell for cell in cells if method_label(cell) == label]
            axes.plot(
                [cell["span_tokens"] / 1e6 for cell in mine],
                [cell["loss"] for cell in mine],
                MARKERS[number % len(MARKERS)],
                color=LAYERS[number % len(LAYERS)],
                markersize=6,
                alpha=0.85,
                label=label,
            )
        spans = end["spans"]
        axes.plot(
            [row["span_tokens"] / 1e6 for row in spans], [row["loss"] for row in spans], "-", color=INK, linewidth=1,
            label="mean at the span", zorder=1,
        )  # fmt: skip
        if end["raw_loss"] is not None and end["raw_loss"] < max(cell["loss"] for cell in cells) + 0.5:
            axes.axhline(end["raw_loss"], color=GREY, linewidth=1, linestyle=":", label="raw snapshot")
        axes.set_xlabel("merge span (N - 1) V (millions of tokens)")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.legend(loc="best", fontsize=8)
        return to_svg(figure, title=title, description=_describe(end))


def _describe(end: Mapping[str, Any]) -> str:
    means = ", ".join(f"{row['loss']:.4f} at {row['span_tokens'] / 1e6:.2f} M" for row in end["spans"])
    return f"Mean held-out loss by span: {means}."
