"""Charts of a study's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.report.drawing import ANNEALED, DASHES, GREY, LAYERS, MERGED, RAW, STYLE, to_svg
from pipelines.study.layout import Study
from tasks.evaluation.verdicts import Claim, Finding

Results = Mapping[str, Mapping[str, Any]]
MARKERS = "osD^vP"


def draw_charts(study: Study, results: Results, findings: Sequence[Finding]) -> dict[str, tuple[str, str]]:
    """SVG and caption of every chart, by file name."""
    drawers: dict[str, tuple[Callable[[Study, Results], Figure], str]] = {
        "forks": (_forks, "Constant learning rate, its merges, and real anneals from each fork, first seed."),
        "grid": (
            _grid,
            "Loss of SMA merges less that of the raw model, mean over seeds: below zero, the merge is better.",
        ),
        "span": (_span, "The same cells by span, (N-1)V: a line per seed and end point."),
        "inside": (_inside, "Merges of the last anneal's own snapshots."),
        "curves": (
            _curves,
            "Decay curves as merge weights over the span of the last anneal, beside that anneal; a dot a seed.",
        ),
        "forecast": (_forecast, "Errors of predictors of the annealed loss, a dot per real anneal."),
        "hessian": (_hessian, "Gain over the mean snapshot: measured, and half the trace of H Cov, a dot a seed."),
        "contour": (
            _contour,
            "Loss in the plane of two tensors of the last layer: snapshots (dots), their average (cross).",
        ),
    }
    for kind, title in (("continued", "Continued training"), ("sft", "SFT")):
        if any(finding.name == title for finding in findings):
            caption = f"{title}: difference in held-out loss of each arm from its control, at the start and at the end."
            drawers[kind] = (partial(_arms, kind=kind), caption)
    with pyplot.rc_context(STYLE):
        return {
            f"{name}.svg": (to_svg(draw(study, results), title=name.capitalize(), description=caption), caption)
            for name, (draw, caption) in drawers.items()
        }


def _forks(study: Study, results: Results) -> Figure:
    figure, axes = pyplot.subplots(figsize=(8, 3.8))
    seed = study.config.seeds[0]
    forks = results[f"forks-{seed}"]["forks"]
    for number, fork in enumerate(forks):
        points, names = fork["points"], ("raw", "merged", "annealed")
        labels = ("raw", "merged", "annealing") if number == 0 else (None, None, None)
        for name, colour, dash, marker, label in zip(
            names, (RAW, MERGED, ANNEALED), ("-", "--", "-."), "os^", labels, strict=True
        ):
            x = [point["step"] for point in points]
            axes.plot(
                x, [p[name] for p in points], dash, color=colour, marker=marker, markersize=3, linewidth=1, label=label
            )
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss (nats)")
    axes.legend()
    return figure


def _grid(study: Study, results: Results) -> Figure:
    ends = [study.config.grid.ends[0], study.config.grid.ends[-1]]
    figure, panels = pyplot.subplots(1, len(ends), figsize=(8, 3.2))
    for axes, end in zip(panels, ends, strict=True):
        gains = _mean_cells(study, results, end)
        counts, intervals = sorted({n for n, _ in gains}), sorted({v for _, v in gains})
        table = [[gains.get((n, v), float("nan")) for v in intervals] for n in counts]
        limit = max(abs(value) for value in gains.values())
        axes.imshow(table, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    shade = "white" if abs(value) > 0.7 * limit else "black"
                    axes.text(j, i, f"{value:+.3f}", ha="center", va="center", fontsize=8, color=shade)
        axes.set_xticks(range(len(intervals)), [f"{v:,}" for v in intervals])
        axes.set_yticks(range(len(counts)), [str(n) for n in counts])
        axes.set_xlabel("V (tokens)")
        axes.set_ylabel("N")
        axes.grid(visible=False)
        axes.set_title(f"Step {end:,}", loc="left", fontsize=10)
    return figure


def _span(study: Study, results: Results) -> Figure:
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    for number, end in enumerate(study.config.grid.ends):
        for seed in study.config.seeds:
            item = results[f"grid-{seed}"]
            cells = sorted((c for c in item["windows"] if c["end_step"] == end), key=lambda c: c["span_tokens"])
            axes.plot(
                [cell["span_tokens"] / 1e6 for cell in cells],
                [cell["loss"] - item["raw"][str(end)] for cell in cells],
                DASHES[number % len(DASHES)],
                color=LAYERS[number % len(LAYERS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=3,
                linewidth=0.9,
                label=f"step {end:,}" if seed == study.config.seeds[0] else None,
            )
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("span (N-1)V (million tokens)")
    axes.set_ylabel("merged less raw (nats)")
    axes.legend()
    return figure


def _inside(study: Study, results: Results) -> Figure:
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    for number, seed in enumerate(study.config.seeds):
        points = results[f"inside-{seed}"]["points"]
        x = [point["step"] for point in points]
        labels = ("annealing", "annealing, merged") if number == 0 else (None, None)
        axes.plot(
            x, [p["raw"] for p in points], "-.", color=ANNEALED, marker="^", markersize=3, linewidth=1, label=labels[0]
        )
        axes.plot(
            x, [p["merged"] for p in points], "--", color=MERGED, marker="s", markersize=3, linewidth=1, label=labels[1]
        )
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss (nats)")
    axes.legend()
    return figure


def _curves(study: Study, results: Results) -> Figure:
    """Raw, merges by decay curve, and the real anneal, less the latter."""
    figure, axes = pyplot.subplots(figsize=(8, 2.6))
    found = [results[f"curves-{seed}"] for seed in study.config.seeds]
    names = list(found[0]["losses"])
    for number, item in enumerate(found):
        losses = [item["raw"], *(item["losses"][name] for name in names)]
        x = [loss - item["annealed"] for loss in losses]
        marker, colour = MARKERS[number % len(MARKERS)], LAYERS[number % len(LAYERS)]
        axes.plot(x, range(len(x)), marker, color=colour, markersize=5)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(names) + 1), ["raw", *(name.removeprefix("wsm:") for name in names)])
    axes.invert_yaxis()
    axes.set_xlabel("loss less that of the real anneal (nats)")
    return figure


def _forecast(study: Study, results: Results) -> Figure:
    figure, axes = pyplot.subplots(figsize=(8, 3.0))
    names = list(dict.fromkeys(n for seed in study.config.seeds for n in results[f"forecast-{seed}"]["errors"]))
    for row, name in enumerate(names):
        for number, seed in enumerate(study.config.seeds):
            errors = list(results[f"forecast-{seed}"]["errors"].get(name, {}).values())
            axes.plot(
                errors,
                [row] * len(errors),
                MARKERS[number % len(MARKERS)],
                color=LAYERS[number % len(LAYERS)],
                markersize=5,
            )
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("predicted less real annealed loss (nats)")
    return figure


def _hessian(study: Study, results: Results) -> Figure:
    figure, axes = pyplot.subplots(figsize=(4, 3.4))
    found = [results[f"curvature-{seed}"] for seed in study.config.seeds]
    x, y = [item["predicted"] for item in found], [item["measured"] for item in found]
    axes.plot(x, y, "o", color=RAW)
    top = 1.1 * max(*x, *y)
    axes.plot([0, top], [0, top], ":", color=GREY)
    axes.set_xlabel("half the trace of H Cov (nats)")
    axes.set_ylabel("measured gain (nats)")
    return figure


def _contour(study: Study, results: Results) -> Figure:
    found = results[f"contour-{study.config.seeds[0]}"]
    figure, axes = pyplot.subplots(figsize=(5, 4))
    filled = axes.contourf(*found["ticks"], found["losses"], levels=12, cmap="cividis")
    figure.colorbar(filled, label="held-out loss (nats)")
    x, y = zip(*found["places"], strict=True)
    axes.plot(x, y, "o", color="black", markersize=4)
    axes.plot([0], [0], "P", color="white", markeredgecolor="black", markersize=9)
    axes.set_xlabel(f"{found['names'][0].removeprefix('model.')} (standard deviations)", fontsize=8)
    axes.set_ylabel(found["names"][1].removeprefix("model."), fontsize=8)
    return figure


def _arms(study: Study, results: Results, *, kind: str) -> Figure:
    """Differences of every pair of arms at start and end, with intervals over seeds."""
    pairs = list(results[f"{kind}-{study.config.seeds[0]}"]["differences"])
    rows = []
    for pair in pairs:
        for quantity, label in (("initial_loss", "start"), ("final_loss", "end")):
            found = [results[f"{kind}-{seed}"]["differences"][pair] for seed in study.config.seeds]
            values = [item[quantity]["mean"] for item in found if quantity in item]
            rows.append((f"{pair}, {label}", Claim(text="", values=tuple(values)).interval))
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.36 * len(rows)))
    for y, (_, interval) in enumerate(rows):
        if interval is not None:
            _bar(axes, y, interval.mean, interval.low, interval.high)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("difference in held-out loss (nats), 95 % interval over seeds")
    return figure


def _bar(axes: Axes, y: int, mean: float, low: float | None, high: float | None) -> None:
    if low is not None and high is not None:
        axes.plot([low, high], [y, y], "-", color=RAW, linewidth=1.2)
    axes.plot([mean], [y], "o", color=RAW, markersize=5)


def _mean_cells(study: Study, results: Results, end: int) -> dict[tuple[int, int], float]:
    """Merged less raw loss by N and V, mean over seeds."""
    found: dict[tuple[int, int], list[float]] = {}
    for seed in study.config.seeds:
        item = results[f"grid-{seed}"]
        for cell in item["windows"]:
            if cell["end_step"] == end:
                key = (cell["count"], cell["interval_tokens"])
                found.setdefault(key, []).append(cell["loss"] - item["raw"][str(end)])
    return {key: sum(values) / len(values) for key, values in found.items()}
