"""The findings of the paper as claims on a study's figures, each with its rule.

Section numbers are those of arXiv 2505.12082. All losses are held-out ones, where the paper mostly has benchmark scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

from configs.study import ArmConfig
from pipelines.study.layout import Study
from pipelines.study.spike_arms import CONTROL, TOLERANCE, table
from tasks.evaluation.verdicts import Claim, Finding, above_zero, below_zero, within

MARGIN = 0.1
"""How much of the stable phase's gain counts as no difference."""
Results = Mapping[str, Mapping[str, Any]]
"""What each step of a study measured."""
Cells = Sequence[Mapping[str, Any]]


def judge(study: Study, results: Results) -> list[Finding]:
    """Every finding, judged on what was measured."""
    margin = MARGIN * fmean(_stable_gains(study, results, study.config.grid.ends[-1]))
    findings = [
        _stable_phase(study, results),
        _inside_anneal(study, results, margin),
        _fork_test(study, results, margin),
        _simulator(study, results, margin),
        _methods_early(study, results),
        _methods_late(study, results),
        _interval(study, results),
        _count(study, results),
        _span(study, results),
        _decay_curves(study, results),
        _hessian(study, results),
        _contour(study, results),
    ]
    if study.config.continued:
        findings.append(_continued(study, results, margin))
    if study.config.sft:
        findings.append(_sft(study, results))
    if study.config.spikes:
        findings.append(_spikes(study, results))
    return findings


def margin_of(study: Study, results: Results) -> float:
    """Nats that count as no difference."""
    return MARGIN * fmean(_stable_gains(study, results, study.config.grid.ends[-1]))


def _stable_phase(study: Study, results: Results) -> Finding:
    claims = [
        above_zero(f"raw less merged at step {end:,}", gains)
        for end in study.config.grid.ends
        if (gains := _stable_gains(study, results, end))
    ]
    return Finding(
        name="Stable phase",
        source="4.1",
        text="Merging at a constant learning rate improves the model, at every point in training.",
        claims=tuple(claims),
    )


def _inside_anneal(study: Study, results: Results, margin: float) -> Finding:
    found = _each(study, results, "inside")
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


def _fork_test(study: Study, results: Results, margin: float) -> Finding:
    early = [[_quarter(fork) for fork in item["forks"]] for item in _each(study, results, "forks")]
    late = [[fork["points"][-1] for fork in item["forks"]] for item in _each(study, results, "forks")]
    return Finding(
        name="Fork test",
        source="4.2",
        text="After a fork, constant learning rate with merging first beats both the constant and the annealing model; at the end it is comparable to the annealed one.",
        claims=(
            above_zero(
                "raw less merged, a quarter into the anneal", [_mean(points, "raw", "merged") for points in early]
            ),
            above_zero(
                "annealing less merged, at the same point", [_mean(points, "annealed", "merged") for points in early]
            ),
            within("merged less annealed at the end", [_mean(points, "merged", "annealed") for points in late], margin),
        ),
        remark=f"Mean over {len(study.config.forks)} forks a seed; the paper has one.",
    )


def _simulator(study: Study, results: Results, margin: float) -> Finding:
    errors = [item["errors"] for item in _each(study, results, "forecast")]
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


def _methods_early(study: Study, results: Results) -> Finding:
    end = study.config.grid.ends[0]
    losses = [_methods_at(item, end) for item in _each(study, results, "grid")]
    raw = [item["raw"][str(end)] for item in _each(study, results, "grid")]
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


def _methods_late(study: Study, results: Results) -> Finding:
    end = study.config.grid.ends[-1]
    losses = [_methods_at(item, end) for item in _each(study, results, "grid")]
    gains = _stable_gains(study, results, end)
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


def _interval(study: Study, results: Results) -> Finding:
    early, late = study.config.grid.ends[0], study.config.grid.ends[-1]
    grids = _each(study, results, "grid")
    longest = [max(_windows_at(item, early), key=lambda cell: cell["span_tokens"]) for item in grids]
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
                [_spread(_windows_at(item, early)) - _spread(_windows_at(item, late)) for item in grids],
            ),
        ),
    )


def _count(study: Study, results: Results) -> Finding:
    early, late = study.config.grid.ends[0], study.config.grid.ends[-1]
    grids = _each(study, results, "grid")

    def many_less_few(item: Mapping[str, Any], end: int) -> float:
        cells = [cell for cell in _windows_at(item, end) if cell["interval_tokens"] == _shortest(item)]
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


def _span(study: Study, results: Results) -> Finding:
    early, late = study.config.grid.ends[0], study.config.grid.ends[-1]
    grids, interval = _each(study, results, "grid"), study.trunk_config(study.config.seeds[0]).snapshots.interval_tokens

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
                [rank_correlation(_windows_at(item, early)) for item in grids],
                unit="",
            ),
            above_zero(
                "best span late less early, in intervals",
                [best(_windows_at(item, late)) - best(_windows_at(item, early)) for item in grids],
                unit="",
            ),
        ),
    )


def _decay_curves(study: Study, results: Results) -> Finding:
    found = _each(study, results, "curves")
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


def _hessian(study: Study, results: Results) -> Finding:
    found = _each(study, results, "curvature")
    return Finding(
        name="Second-order theory",
        source="4.6, Eq. 15",
        text="The gain over the mean snapshot is that of a quadratic bowl; deviations are complementary, their cross terms mostly negative.",
        claims=(
            Claim(
                text="measured gain by half the trace of H Cov",
                values=tuple(item["measured"] / item["predicted"] for item in found),
                low=0.5,
                high=2.0,
                unit="",
            ),
            Claim(
                text="cross terms by (k - 1) times the diagonal (Eq. 15)",
                values=tuple(item["cross_ratio"] for item in found),
                high=1.0,
                unit="",
            ),
            Claim(
                text="share of cross terms that are negative",
                values=tuple(item["negative_cross_terms"] for item in found),
                low=0.5,
                unit="",
            ),
        ),
        remark="Eq. 15 holds for every positive semi-definite H; the third claim is the one that could fail. Deviations are from the annealed weights.",
    )


def _contour(study: Study, results: Results) -> Finding:
    found = _each(study, results, "curvature")
    return Finding(
        name="Contour",
        source="figure 8",
        text="The merge lies nearer to the good region than the snapshots.",
        claims=(above_zero("best snapshot less merge", [min(item["losses"]) - item["merged_loss"] for item in found]),),
    )


def _continued(study: Study, results: Results, margin: float) -> Finding:
    assert study.config.continued is not None
    found = _each(study, results, "continued")
    pair = _pair(study.config.continued.arms, "raw", "merged")
    merged = [arm.name for arm in study.config.continued.arms if arm.start == "merged"]
    finals = [[item["arms"][name]["final_loss"] for name in merged] for item in found]
    claims = [
        below_zero("merged less raw at the start", _differences(found, pair, "initial_loss")),
        within("merged less raw at the end", _differences(found, pair, "final_loss"), margin),
    ]
    if len(merged) > 1:
        claims.append(
            Claim(
                text="spread over learning rates at the end", values=tuple(max(f) - min(f) for f in finals), high=margin
            )
        )
    return Finding(
        name="Continued training",
        source="4.6 (figure 6)",
        text="PMA-init starts lower, ends at parity, and does not depend on the learning rate.",
        claims=tuple(claims),
    )


def _sft(study: Study, results: Results) -> Finding:
    assert study.config.sft is not None
    found = _each(study, results, "sft")
    pair = _pair(study.config.sft.arms, "annealed", "annealed-merged")
    return Finding(
        name="SFT",
        source="appendix B, figure 7",
        text="SFT from a merge is better at the same learning rate, its gradient norm steadier, its spikes fewer. (The authors could not repeat the gain at other sizes.)",
        claims=(
            below_zero("merged less annealed at the end", _differences(found, pair, "final_loss")),
            below_zero(
                "log ratio of gradient-norm variances",
                [math.log(value) for value in _differences(found, pair, "gradient_variance")],
                unit="",
            ),
            Claim(
                text="difference in steps that stand out",
                values=tuple(_differences(found, pair, "num_excursions")),
                high=0.0,
                unit="",
            ),
        ),
    )


def _spikes(study: Study, results: Results) -> Finding:
    rows = [row for item in _each(study, results, "spikes") for row in item["cases"]]
    found = {(row["fault"], row["arm"]): row for row in table(rows)}
    claims = [
        Claim(
            text=f"excess over the run without the fault, {fault}",
            values=tuple(found[fault, "pma"]["excess"]),
            high=TOLERANCE,
        )
        for fault in dict.fromkeys(row["fault"] for row in rows)
        if (fault, "pma") in found
    ]
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != CONTROL]
    share = {arm: [row["recovered"] / row["runs"] for (_, name), row in found.items() if name == arm] for arm in arms}
    told = ", ".join(f"{arm} {fmean(values):.0%}" for arm, values in share.items())
    return Finding(
        name="Spike recovery",
        source="4.8 (figure 7)",
        text="Merging three checkpoints of before the collapse and resuming there passes the spike and follows the original course.",
        claims=tuple(claims),
        remark=f"Runs that ended within {TOLERANCE} nats of the undisturbed one: {told}.",
    )


def _stable_gains(study: Study, results: Results, end: int) -> list[float]:
    """Raw less the scheduled merge at ``end``, by seed; nothing where the window is longer than the run."""
    gains = []
    for seed, item in zip(study.config.seeds, _each(study, results, "grid"), strict=True):
        rule = study.trunk_rule(seed)
        gains += [
            float(cell["gain"])
            for cell in item["methods"]
            if (cell["method"], cell["count"], cell["end_step"]) == (rule.method, rule.count, end)
        ]
    return gains


def _each(study: Study, results: Results, step: str) -> list[Mapping[str, Any]]:
    return [results[f"{step}-{seed}"] for seed in study.config.seeds]


def _windows_at(item: Mapping[str, Any], end: int) -> list[Mapping[str, Any]]:
    return [cell for cell in item["windows"] if cell["end_step"] == end]


def _shortest(item: Mapping[str, Any]) -> int:
    return min(int(cell["interval_tokens"]) for cell in item["windows"])


def _methods_at(item: Mapping[str, Any], end: int) -> dict[str, float]:
    return {
        f"ema {cell['alpha']:g}" if cell["method"] == "ema" else cell["method"]: cell["loss"]
        for cell in item["methods"]
        if cell["end_step"] == end
    }


def _spread(cells: Cells) -> float:
    losses = [float(cell["loss"]) for cell in cells]
    return max(losses) - min(losses)


def _quarter(fork: Mapping[str, Any]) -> Mapping[str, Any]:
    """The point a quarter into the anneal, or the first after it."""
    points, start = fork["points"], fork["fork_step"]
    wanted = start + (points[-1]["step"] - start) / 4
    found: Mapping[str, Any] = next(point for point in points if point["step"] >= wanted)
    return found


def _mean(points: Sequence[Mapping[str, Any]], first: str, second: str) -> float:
    return fmean(point[first] - point[second] for point in points)


def _pair(arms: Sequence[ArmConfig], control: str, other: str) -> str:
    """Key of the difference of the first arms that begin so."""
    names = {start: next(arm.name for arm in arms if arm.start == start) for start in (control, other)}
    return f"{names[other]} less {names[control]}"


def _differences(found: Sequence[Mapping[str, Any]], pair: str, quantity: str) -> list[float]:
    return [item["differences"][pair][quantity]["mean"] for item in found if quantity in item["differences"][pair]]
