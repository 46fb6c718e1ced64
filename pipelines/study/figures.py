"""Figures of a study as its findings ask for them, from what its steps have on record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from configs.study import ArmConfig
from pipelines.study.layout import Study

Results = Mapping[str, Mapping[str, Any]]
"""What each step of a study measured."""
Cells = Sequence[Mapping[str, Any]]


def stable_gains(study: Study, results: Results, end: int) -> list[float]:
    """Raw less the scheduled merge at ``end``, by seed; nothing where the window is longer than the run."""
    gains = []
    for seed, item in zip(study.config.seeds, by_seed(study, results, "grid"), strict=True):
        rule = study.trunk_rule(seed)
        gains += [
            float(cell["gain"])
            for cell in item["methods"]
            if (cell["method"], cell["count"], cell["end_step"]) == (rule.method, rule.count, end)
        ]
    return gains


def by_seed(study: Study, results: Results, step: str) -> list[Mapping[str, Any]]:
    """What ``step`` measured, a seed each."""
    return [results[f"{step}-{seed}"] for seed in study.config.seeds]


def windows_at(item: Mapping[str, Any], end: int) -> list[Mapping[str, Any]]:
    """SMA merges of the grid that end at step ``end``."""
    return [cell for cell in item["windows"] if cell["end_step"] == end]


def shortest(item: Mapping[str, Any]) -> int:
    """The smallest V of the grid, in tokens."""
    return min(int(cell["interval_tokens"]) for cell in item["windows"])


def methods_at(item: Mapping[str, Any], end: int) -> dict[str, float]:
    """Loss by method at step ``end``, with the scheduled N and V."""
    return {
        f"ema {cell['alpha']:g}" if cell["method"] == "ema" else cell["method"]: cell["loss"]
        for cell in item["methods"]
        if cell["end_step"] == end
    }


def spread(cells: Cells) -> float:
    """Largest less smallest loss of ``cells``."""
    losses = [float(cell["loss"]) for cell in cells]
    return max(losses) - min(losses)


def quarter_into(fork: Mapping[str, Any]) -> Mapping[str, Any]:
    """The point a quarter into the anneal, or the first after it."""
    points, start = fork["points"], fork["fork_step"]
    wanted = start + (points[-1]["step"] - start) / 4
    found: Mapping[str, Any] = next(point for point in points if point["step"] >= wanted)
    return found


def mean_difference(points: Sequence[Mapping[str, Any]], first: str, second: str) -> float:
    """Mean over ``points`` of the loss ``first`` less the loss ``second``."""
    return fmean(point[first] - point[second] for point in points)


def pair_key(arms: Sequence[ArmConfig], control: str, other: str) -> str:
    """Key of the difference of the first arms that begin so."""
    names = {start: next(arm.name for arm in arms if arm.start == start) for start in (control, other)}
    return f"{names[other]} less {names[control]}"


def differences(found: Sequence[Mapping[str, Any]], pair: str, quantity: str) -> list[float]:
    """The difference ``pair`` in ``quantity``, of the seeds that have it."""
    return [item["differences"][pair][quantity]["mean"] for item in found if quantity in item["differences"][pair]]
