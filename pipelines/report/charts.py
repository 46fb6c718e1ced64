"""Charts of losses, training and router health."""

from __future__ import annotations

import re
from collections.abc import Sequence

from matplotlib import pyplot
from matplotlib.axes import Axes

from pipelines.report.data import Evaluated, ReportData
from pipelines.report.drawing import ANNEALED, DASHES, GREY, LAYERS, MERGED, RAW, STYLE, bin_means, to_svg


def held_out_chart(data: ReportData) -> str:
    """Held-out loss over tokens: raw, merged and annealed; the second panel enlarges the end. Empty text without any."""
    if not (data.raw or data.merged or any(data.branches.values())):
        return ""
    with pyplot.rc_context(STYLE):
        figure, (whole, end) = pyplot.subplots(1, 2, figsize=(10, 3.9), width_ratios=(1, 1.25))
        for axes in (whole, end):
            _plot_losses(axes, data)
        end.legend(loc="upper right")
        _zoom(end, data)
        whole.set_title("Whole run", loc="left", fontsize=10)
        end.set_title("From shortly before the fork" if data.fork_tokens else "The end", loc="left", fontsize=10)
        whole.set_ylabel("held-out loss (nats per token)")
        return to_svg(figure, title="Held-out loss over tokens seen", description=_describe_losses(data))


def training_chart(data: ReportData) -> str:
    """Training loss, learning rate and gradient norm over tokens, trunk and branches; empty text without a step."""
    if not any("train/loss" in row.metrics for row in data.journal):
        return ""
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 3, figsize=(10, 3.0))
        series = [("trunk", data.journal, RAW, "-")]
        series += [
            (name.replace("anneal-from-step-", "anneal ").replace("-", " "), rows, ANNEALED, "--")
            for name, rows in data.branch_journals.items()
        ]
        for axes, metric, title in zip(
            panels,
            ("train/loss", "train/learning_rate", "train/gradient_norm"),
            ("Training loss", "Learning rate", "Gradient norm before clipping"),
            strict=True,
        ):
            for label, rows, colour, dash in series:
                points = [(m.tokens / 1e6, m.metrics[metric]) for m in rows if metric in m.metrics]
                if points:
                    x, y = zip(*bin_means(points), strict=True)
                    axes.plot(x, y, dash, color=colour, linewidth=1.3, label=label)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("tokens seen (millions)")
        panels[0].legend(loc="upper right")
        return to_svg(figure, title="Training over tokens seen", description=_describe_training(data))


def router_chart(data: ReportData) -> str:
    """Load entropy and busiest expert per layer; empty text for dense models."""
    layers = sorted(
        {int(m.group(1)) for row in data.journal for key in row.metrics if (m := re.match(r"router/layer_(\d+)/", key))}
    )
    if not layers:
        return ""
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 3, figsize=(10, 2.8))
        titles = {
            "load_entropy": "Load entropy (1 = balanced)",
            "load_max_ratio": "Busiest expert / mean load",
            "dead_experts": "Experts below 1 % of an even share",
        }
        for axes, (metric, title) in zip(panels, titles.items(), strict=True):
            for layer in layers:
                key = f"router/layer_{layer}/{metric}"
                points = bin_means([(m.tokens / 1e6, m.metrics[key]) for m in data.journal if key in m.metrics])
                x, y = zip(*points, strict=True)
                axes.plot(
                    x,
                    y,
                    DASHES[layer % len(DASHES)],
                    color=LAYERS[layer % len(LAYERS)],
                    linewidth=1.3,
                    label=f"layer {layer}",
                )
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("tokens seen (millions)")
        panels[2].set_ylim(bottom=-0.05)
        if len(layers) <= 8:
            panels[0].legend(loc="lower right")
        return to_svg(
            figure,
            title="Router health over tokens seen",
            description=f"Load entropy, busiest expert and dead experts of {len(layers)} layers with experts.",
        )


def _describe_losses(data: ReportData) -> str:
    ends = [("raw snapshots", data.raw), ("merges", data.merged)]
    ends += [(f"branch {name}", rows) for name, rows in data.branches.items()]
    told = [
        f"{label} from {rows[0].evaluation.loss:.4f} to {rows[-1].evaluation.loss:.4f} at {rows[-1].tokens / 1e6:.2f} M tokens"
        for label, rows in ends
        if rows
    ]
    return f"Lines: {'; '.join(told)}."


def _describe_training(data: ReportData) -> str:
    losses = [row.metrics["train/loss"] for row in data.journal if "train/loss" in row.metrics]
    return (
        f"Training loss, learning rate and gradient norm over {len(losses):,} steps; the loss goes from {losses[0]:.3f} to "
        f"{losses[-1]:.3f}."
    )


def _plot_losses(axes: Axes, data: ReportData) -> None:
    _plot(axes, data.raw, RAW, "-", "o", "raw snapshots")
    rule = f"{data.config.merge.method.upper()} of {data.config.merge.count}"
    _plot(axes, data.merged, MERGED, "--", "s", f"merged ({rule}), constant learning rate")
    for number, (name, rows) in enumerate(data.branches.items()):
        label = "_" if number else "annealing branch"
        fork = data.fork_tokens.get(name, 0) / 1e6
        # The branch begins at the snapshot it was forked from.
        start = [row for row in data.raw if row.tokens == data.fork_tokens.get(name)]
        _plot(axes, [*start, *rows], ANNEALED, "-.", "^", label)
        axes.axvline(fork, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            "fork",
            (fork, 0.98),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color=GREY,
            ha="right",
            va="top",
            rotation=90,
        )
    axes.set_xlabel("tokens seen (millions)")


def _plot(axes: Axes, rows: Sequence[Evaluated], colour: str, dash: str, marker: str, label: str) -> None:
    if rows:
        every = max(1, len(rows) // 20)
        x = [row.tokens / 1e6 for row in rows]
        y = [row.evaluation.loss for row in rows]
        axes.plot(x, y, dash, color=colour, marker=marker, markevery=every, markersize=4, linewidth=1.4, label=label)


def _zoom(axes: Axes, data: ReportData) -> None:
    total = max((row.tokens for row in data.raw), default=1)
    start = 0.93 * min(data.fork_tokens.values(), default=int(0.6 * total))
    rows = [*data.raw, *data.merged, *(row for rows in data.branches.values() for row in rows)]
    shown = [row.evaluation.loss for row in rows if row.tokens >= start]
    if shown:
        margin = 0.08 * (max(shown) - min(shown)) + 1e-3
        axes.set_xlim(start / 1e6, 1.01 * total / 1e6)
        axes.set_ylim(min(shown) - margin, max(shown) + 3 * margin)
