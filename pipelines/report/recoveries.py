"""What the report says of loss spikes: each one found, what was done about it, and how long that took."""

from __future__ import annotations

import html
import math

from matplotlib import pyplot

from cluster.journal import Measurement
from pipelines.report.data import ReportData
from pipelines.report.drawing import GREY, MERGED, RAW, STYLE, bin_means, to_svg
from pipelines.report.tables import Number, caption, number, table
from pipelines.wording import format_seconds
from tasks.checkpoints.recoveries import Recovery


def recoveries_section(data: ReportData, drawn: str) -> str:
    """The section's HTML; empty text for a run without recoveries and without a spike that had no answer."""
    if not data.recoveries and not data.given_up:
        return ""
    head = ["recovery", "spike", "onset, alarm", "went on from", "moments", "learning rate", "data skipped", "outcome"]
    rows = [_row(recovery, data) for recovery in data.recoveries]
    given_up = f"<p><strong>Given up.</strong> {html.escape(data.given_up)}</p>" if data.given_up else ""
    return given_up + (table("Recoveries", head, rows) if rows else "") + drawn + _phases(data)


def recovery_chart(data: ReportData) -> str:
    """Training loss over tokens with what recoveries left behind; empty text for a run without recoveries."""
    if not data.recoveries:
        return ""
    batch = data.config.training.batch_tokens
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(10, 3.2))
        kept, left = _points(data.journal), [_points(rows) for rows in data.left_behind]
        axes.plot(*zip(*bin_means(kept), strict=True), color=RAW, linewidth=1.2, label="the run's way")
        for number, rows in enumerate(left):
            label = None if number else "left behind"
            axes.plot(*zip(*bin_means(rows), strict=True), "--", color=MERGED, linewidth=1.2, label=label)
        for recovery in data.recoveries:
            start, alarm = recovery.start.step * batch / 1e6, recovery.alarm_step * batch / 1e6
            axes.axvline(alarm, color=GREY, linewidth=0.8, linestyle=":")
            axes.axvline(start, color=RAW, linewidth=0.8, linestyle=":")
            for x, text in ((alarm, f"alarm {recovery.number}"), (start, f"start {recovery.number}")):
                axes.annotate(
                    text, (x, 0.98), xycoords=("data", "axes fraction"), fontsize=8, color=GREY, ha="right", va="top",
                    rotation=90,
                )  # fmt: skip
        # A loss that runs away would press everything else flat.
        finite = [loss for _, loss in kept if math.isfinite(loss)]
        if finite:
            axes.set_ylim(0.95 * min(finite), 1.05 * 1.5 * max(finite) - 0.5 * min(finite))
        axes.set_xlabel("tokens seen (millions)")
        axes.set_ylabel("training loss (nats)")
        axes.legend(loc="upper right")
        told = "; ".join(
            f"recovery {r.number} from the alarm at step {r.alarm_step:,} back to step {r.start.step:,}"
            for r in data.recoveries
        )
        return to_svg(figure, title="Training loss and what recoveries left behind", description=f"{told}.")


def _points(rows: list[Measurement]) -> list[tuple[float, float]]:
    return [(m.tokens / 1e6, m.metrics["train/loss"]) for m in rows if "train/loss" in m.metrics]


def _row(recovery: Recovery, data: ReportData) -> list[str | Number]:
    skipped = sum(skip.count for skip in recovery.skips)
    if recovery.number in data.confirmed:
        outcome = "held"
    elif any(later.incident == recovery.incident for later in data.recoveries[recovery.number :]):
        outcome = "the spike came back"
    else:
        outcome = "not confirmed yet"
    start = "step" if recovery.count == 1 else f"mean of {recovery.count} up to step"
    return [
        number(recovery.number, "d"),
        f"{recovery.incident}, try {recovery.attempt}: {html.escape(recovery.policy)}",
        f"{recovery.onset_step:,}, {recovery.alarm_step:,}",
        f"{start} {recovery.start.step:,}",
        recovery.moments,
        f"x{recovery.learning_rate_scale:g}, re-warmed over {recovery.rewarm_tokens:,} tokens",
        f"{skipped:,} sequences",
        outcome,
    ]


def _phases(data: ReportData) -> str:
    if not data.phases:
        return ""
    head = ["recovery", "segment ended", "decided", "merged", "restored", "first step", "alarm to first step"]
    rows = [
        [
            number(p.recovery, "d"),
            *(number(x, ".1f", " s") for x in (p.stop, p.decide, p.merge, p.restart, p.first_step, p.total)),
        ]
        for p in data.phases
    ]
    vain = sum(len(rows) for rows in data.left_behind) * data.config.training.batch_tokens
    total = format_seconds(sum(p.total for p in data.phases))
    return table("How long recoveries took", head, rows) + caption(
        f"{vain / 1e6:.2f} M tokens trained in vain; {total} from alarms to first steps."
    )
