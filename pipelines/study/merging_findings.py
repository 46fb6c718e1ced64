"""Findings about merging at constant learning rate and beside annealing, as claims on a study's figures.

Section numbers are those of arXiv 2505.12082. All losses are held-out ones, where the paper mostly has benchmark scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

from pipelines.study.figures import (
    Cells,
    Results,
    by_seed,
    mean_difference,
    methods_at,
    quarter_into,
    shortest,
    spread,
    stable_gains,
    windows_at,
)
from pipelines.study.layout import Study
from tasks.evaluation.verdicts import Claim, Finding, above_zero, below_zero, within

MARGIN = 0.1
"""How much of the stable phase's gain counts as no difference."""


def stable_phase(study: Study, results: Results) -> Finding:
    """Section 4.1: merging at a constant learning rate."""
    claims = [
        above_zero(f"raw less merged at step {end:,}", gains)
        for end in study.config.grid.ends
        if (gains := stable_gains(study, results, end))
    ]
    return Finding(
        name="Stable phase",
        source="4.1",
        text="Merging at a constant learning rate improves the model, at every point in training.",
        claims=tuple(claims),
    )


def inside_anneal(study: Study, results: Results, margin: float) -> Finding:
    """Section 4.2: merging the snapshots of an anneal."""
    found = by_seed(study, results, "inside")
    first = [item["points"][0] for item in found]
    return Finding(
        name="Inside the anneal",
        source="4.2",
        text="Merging early in the anneal is about as good as the end of the anneal; at the end there is little left to gain.",
        claims=(
            within(
                f"merge at step {first[0]['step']:,} less the annealed model",
                [point["merged"] - item["annealed"] for point, item in zip(first, found, strict=True)],
                margin,
            ),
            within(
                "raw less merged at the end of the anneal",
                [item["points"][-1]["raw"] - item["points"][-1]["merged"] for item in found],
                margin,
            ),
        ),
        remark=f"Windows of {study.config.inside_count} snapshots of the anneal itself.",
    )


def fork_test(study: Study, results: Results, margin: float) -> Finding:
    """Section 4.2: constant learning rate with merging against annealing, from a fork on."""
    early = [[quarter_into(fork) for fork in item["forks"]] for item in by_seed(study, results, "forks")]
    late = [[fork["points"][-1] for fork in item["forks"]] for item in by_seed(study, results, "forks")]
    return Finding(
        name="Fork test",
        source="4.2",
        text="After a fork, constant learning rate with merging first beats both the constant and the annealing model; at the end it is comparable to the annealed one.",
        claims=(
            above_zero(
                "raw less merged, a quarter into the anneal",
                [mean_difference(points, "raw", "merged") for points in early],
            ),
            above_zero(
                "annealing less merged, at the same point",
                [mean_difference(points, "annealed", "merged") for points in early],
            ),
            within(
                "merged less annealed at the end",
                [mean_difference(points, "merged", "annealed") for points in late],
                margin,
            ),
        ),
        remark=f"Mean over {len(study.config.forks)} forks a seed; the paper has one.",
    )


def simulator(study: Study, results: Results, margin: float) -> Finding:
    """Section 4.2: the merge as a forecast of the anneal."""
    errors = [item["errors"] for item in by_seed(study, results, "forecast")]
    absolute = {
        name: [fmean(abs(error) for error in item[name].values()) for item in errors if item.get(name)]
        for name in ("raw", "merged")
    }
    return Finding(
        name="Simulated anneal",
        source="4.2",
        text="The merge at constant learning rate predicts what annealing would give, at any point.",
        claims=(
            above_zero(
                "absolute error of the raw loss less that of the merged loss",
                [raw - merged for raw, merged in zip(absolute["raw"], absolute["merged"], strict=True)],
            ),
            Claim(text="absolute error of the merged loss", values=tuple(absolute["merged"]), high=margin),
        ),
        remark=f"Over {sum(len(item['raw']) for item in errors)} real anneals.",
    )


def methods_early(study: Study, results: Results) -> Finding:
    """Section 4.3, at the first end point."""
    end = study.config.grid.ends[0]
    losses = [methods_at(item, end) for item in by_seed(study, results, "grid")]
    raw = [item["raw"][str(end)] for item in by_seed(study, results, "grid")]
    low, high = (f"ema {alpha:g}" for alpha in (min(study.config.grid.alphas), max(study.config.grid.alphas)))
    known = [
        (before, found) for before, found in zip(raw, losses, strict=True) if {"sma", "wma", low, high} <= found.keys()
    ]
    return Finding(
        name="Methods, early",
        source="4.3",
        text="Early in training all methods beat the raw model, WMA is the best, and EMA with the larger alpha beats the smaller.",
        claims=(
            above_zero(
                f"raw less the worst method at step {end:,}", [before - max(found.values()) for before, found in known]
            ),
            above_zero(
                "best other method less WMA",
                [min(v for name, v in found.items() if name != "wma") - found["wma"] for _, found in known],
            ),
            above_zero(f"{low} less {high}", [found[low] - found[high] for _, found in known]),
        ),
    )


def methods_late(study: Study, results: Results) -> Finding:
    """Section 4.3, at the last end point."""
    end = study.config.grid.ends[-1]
    losses = [methods_at(item, end) for item in by_seed(study, results, "grid")]
    gains = stable_gains(study, results, end)
    spreads = [(max(found.values()) - min(found.values())) / gain for found, gain in zip(losses, gains, strict=True)]
    return Finding(
        name="Methods, late",
        source="4.3",
        text="Later the methods hardly differ.",
        claims=(
            Claim(
                text=f"spread of the methods at step {end:,}, of the gain", values=tuple(spreads), high=MARGIN, unit=""
            ),
        ),
    )


def merge_interval(study: Study, results: Results) -> Finding:
    """Section 4.4: V."""
    early, late = study.config.grid.ends[0], study.config.grid.ends[-1]
    grids = by_seed(study, results, "grid")
    longest = [max(windows_at(item, early), key=lambda cell: cell["span_tokens"]) for item in grids]
    return Finding(
        name="Interval V",
        source="4.4",
        text="Early, a large V falls below the raw model; later the gap across V narrows.",
        claims=(
            above_zero(
                f"longest window at step {early:,} less raw",
                [cell["loss"] - item["raw"][str(early)] for cell, item in zip(longest, grids, strict=True)],
            ),
            above_zero(
                "spread over windows early less late",
                [spread(windows_at(item, early)) - spread(windows_at(item, late)) for item in grids],
            ),
        ),
    )


def snapshot_count(study: Study, results: Results) -> Finding:
    """Section 4.4: N."""
    early, late = study.config.grid.ends[0], study.config.grid.ends[-1]
    grids = by_seed(study, results, "grid")

    def many_less_few(item: Mapping[str, Any], end: int) -> float:
        cells = [cell for cell in windows_at(item, end) if cell["interval_tokens"] == shortest(item)]
        by_count = {cell["count"]: cell["loss"] for cell in cells}
        return float(by_count[max(by_count)] - by_count[min(by_count)])

    few, many = study.config.grid.counts[0], study.config.grid.counts[-1]
    return Finding(
        name="Count N",
        source="4.4",
        text="Early, more snapshots hurt; once trained, more are better.",
        claims=(
            above_zero(f"N={many} less N={few} at step {early:,}", [many_less_few(item, early) for item in grids]),
            below_zero(f"N={many} less N={few} at step {late:,}", [many_less_few(item, late) for item in grids]),
        ),
    )


def merge_span(study: Study, results: Results) -> Finding:
    """Section 4.4 read as a matter of (N - 1) V."""
    early, late = study.config.grid.ends[0], study.config.grid.ends[-1]
    grids, interval = (
        by_seed(study, results, "grid"),
        study.trunk_config(study.config.seeds[0]).snapshots.interval_tokens,
    )

    def rank_correlation(cells: Cells) -> float:
        return float(spearmanr([c["span_tokens"] for c in cells], [c["loss"] for c in cells]).statistic)

    def best(cells: Cells) -> float:
        return float(min(cells, key=lambda cell: float(cell["loss"]))["span_tokens"] / interval)

    return Finding(
        name="Span (N-1)V",
        source="4.4, our reading of its figure 5",
        text="Early, the score falls with the span, whatever N and V; the best span grows with training.",
        claims=(
            above_zero(
                f"rank correlation of loss and span at step {early:,}",
                [rank_correlation(windows_at(item, early)) for item in grids],
                unit="",
            ),
            above_zero(
                "best span late less early, in intervals",
                [best(windows_at(item, late)) - best(windows_at(item, early)) for item in grids],
                unit="",
            ),
        ),
    )


def decay_curves(study: Study, results: Results) -> Finding:
    """Decay curves as merge weights, beside the mean and the real anneal."""
    found = by_seed(study, results, "curves")
    return Finding(
        name="Decay curves as weights",
        source="arXiv 2507.17634",
        text="Merge weights that stand for 1-sqrt beat those that stand for a linear decay (the plain mean); none adds to a real decay's level.",
        claims=(
            above_zero(
                "linear less 1-sqrt", [item["losses"]["wsm:linear"] - item["losses"]["wsm:1-sqrt"] for item in found]
            ),
            above_zero(
                "best of the three less the real anneal",
                [min(item["losses"].values()) - item["annealed"] for item in found],
            ),
        ),
        remark=f"Over the span of the last anneal, {found[0]['count']} snapshots.",
    )
