"""The arms of a stage over their training: held-out loss less the control's, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib import pyplot

from pipelines.report.drawing import DASHES, GREY, LAYERS, MARKERS, STYLE, to_svg


def arms_chart(comparison: Mapping[str, Any], place: int = 1) -> str:
    """A line and a band a seed of the record ``comparison``, of which one has a curve; ``place`` makes its name its own."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7, 3.0))
        for number, seed in enumerate(comparison["seeds"]):
            curve = [point for point in seed["curve"] if point["mean"] is not None]
            tokens, colour = [point["tokens"] / 1e6 for point in curve], LAYERS[number % len(LAYERS)]
            style = DASHES[number % len(DASHES)] + MARKERS[number % len(MARKERS)]
            means = [point["mean"] for point in curve]
            axes.plot(tokens, means, style, color=colour, linewidth=1.3, markersize=4, label=f"seed {seed['seed']}")
            if all(point["low"] is not None for point in curve):
                low, high = ([point[end] for point in curve] for end in ("low", "high"))
                axes.fill_between(tokens, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.axhline(0.0, color=GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("tokens of the stage (millions)")
        axes.set_ylabel("held-out loss, init less control")
        axes.legend(loc="best")
        return to_svg(
            figure,
            title=f"Held-out loss of the arms, init less control ({place})",
            description=_describe(comparison),
        )


def _describe(comparison: Mapping[str, Any]) -> str:
    told = [
        f"seed {seed['seed']} from {seed['curve'][0]['mean']:+.4f} to {seed['curve'][-1]['mean']:+.4f}"
        for seed in comparison["seeds"]
        if seed["curve"] and None not in (seed["curve"][0]["mean"], seed["curve"][-1]["mean"])
    ]
    return f"Below zero the arm with --init is ahead: {'; '.join(told)}."
