"""What snapshots cost training, and one of them drawn beside the steps that ran meanwhile."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import pyplot

from cluster.journal import Measurement
from pipelines.report.data import ReportData
from pipelines.report.drawing import ANNEALED, GREY, MERGED, PAPER, RAW, STYLE, to_svg

MARGIN_STEPS = 6
"""Drawn before and after the snapshot."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One optimizer step of a segment on the clock of rank 0."""

    start: float
    """Unix seconds."""
    stall: float
    """Seconds at its beginning during which training stood still for a snapshot."""
    end: float
    """Unix seconds."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One snapshot on its way to storage."""

    step: int
    """Index into the step times: the step that began with the copy."""
    uploaded: float
    """Unix seconds when the slowest rank's share was there."""
    committed: float
    """Unix seconds when its manifest was."""


def step_times(journal: Sequence[Measurement], batch_tokens: int) -> list[StepTime]:
    """When the steps of ``journal`` ran, from their throughput and the time of their measurement."""
    times = []
    for row in journal:
        if speed := row.metrics.get("train/tokens_per_second"):
            stall = row.metrics.get("snapshot/stall_seconds", 0.0)
            times.append(StepTime(start=row.time - batch_tokens / speed, stall=stall, end=row.time))
    return times


def uploads(journal: Sequence[Measurement], times: Sequence[StepTime]) -> list[Upload]:
    """The snapshots whose beginning and commit are both among ``times``, which are ``journal``'s."""
    found: list[Upload] = []
    begun: int | None = None
    rows = [row.metrics for row in journal if row.metrics.get("train/tokens_per_second")]
    for number, metrics in enumerate(rows):
        if begun is not None and "snapshot/publish_seconds" in metrics:
            copied = times[begun].start + times[begun].stall
            found.append(
                Upload(
                    step=begun,
                    uploaded=copied + metrics["snapshot/upload_seconds"],
                    committed=copied + metrics["snapshot/publish_seconds"],
                )
            )
            begun = None
        if "snapshot/stall_seconds" in metrics:
            begun = number
    return found


def snapshot_timeline(data: ReportData) -> str:
    """Steps, copy, upload and commit of the snapshot whose upload took the median time; empty text if none was journalled."""
    times = step_times(data.journal, data.config.training.batch_tokens)
    found = uploads(data.journal, times)
    if not found:
        return ""
    shown = sorted(found, key=lambda upload: upload.committed - times[upload.step].start)[len(found) // 2]
    first = times[shown.step]
    step = _median_step(times)
    copied = first.start + first.stall
    window = (first.start - MARGIN_STEPS * step, max(shown.committed, first.end) + MARGIN_STEPS * step)
    near = [t for t in times if t.end > window[0] and t.start < window[1]]

    def bar(start: float, end: float) -> tuple[float, float]:
        return 1000 * (start - first.start), 1000 * (end - start)

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(10, 2.1))
        spans = [bar(t.start + t.stall, t.end) for t in near]
        axes.broken_barh(spans, (2.6, 0.8), facecolors=RAW, edgecolors=PAPER, linewidth=1.0)
        stalls = [bar(t.start, t.start + t.stall) for t in near if t.stall]
        axes.broken_barh(stalls, (1.6, 0.8), facecolors=MERGED, hatch="////", edgecolors=PAPER)
        axes.broken_barh([bar(copied, shown.uploaded)], (0.6, 0.8), facecolors=ANNEALED)
        axes.broken_barh([bar(shown.uploaded, shown.committed)], (0.6, 0.8), facecolors=GREY)
        axes.set_axisbelow(True)
        axes.set_yticks([3.0, 2.0, 1.0], ["steps", "copy to host\n(training stands still)", "upload, commit"])
        axes.set_xlim(1000 * (window[0] - first.start), 1000 * (window[1] - first.start))
        axes.set_xlabel("milliseconds from the snapshot's beginning")
        return to_svg(
            figure, title="A snapshot beside the steps that ran meanwhile", description=timeline_caption(data)
        )


def timeline_caption(data: ReportData) -> str:
    """What snapshots cost in numbers: medians over all of them."""
    times = step_times(data.journal, data.config.training.batch_tokens)
    found = uploads(data.journal, times)
    step = _median_step(times)
    stall = statistics.median(times[upload.step].stall for upload in found)
    publish = statistics.median(
        upload.committed - times[upload.step].start - times[upload.step].stall for upload in found
    )
    return (
        f"The snapshot whose publication took the median time of {len(found):,}. Medians: a step {1000 * step:,.1f} ms, the "
        f"copy {1000 * stall:,.1f} ms ({stall / step:.1f} steps), upload and commit {1000 * publish:,.1f} ms "
        f"({publish / step:.1f} steps), beside which training goes on."
    )


def _median_step(times: Sequence[StepTime]) -> float:
    return statistics.median(t.end - t.start - t.stall for t in times)
