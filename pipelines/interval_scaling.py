"""The best V of several runs against the size of their models, from the ablations that they have on record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from configs.errors import UserError
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.interval_scaling import PAPER_DENSE, PAPER_MOE, PowerLaw, fit_power_law
from tasks.models.size import active_parameters

FOLDER = "ablations"


def scale_intervals(urls: Sequence[str]) -> dict[str, Any]:
    """Best V of every run, the power law through them, and the paper's values with theirs.

    Raises :class:`configs.errors.UserError` for a run without an ablation of several V.
    """
    runs = [best_interval(url) for url in urls]
    law = fit_power_law([(run["active_parameters"], run["interval_tokens"]) for run in runs])
    return {
        "runs": runs,
        "fit": _describe(law),
        "cannot_know": None if law else "a fit needs runs of two sizes at least",
        "paper": {
            name: {"points": [list(point) for point in points], "fit": _describe(fit_power_law(points))}
            for name, points in (("moe", PAPER_MOE), ("dense", PAPER_DENSE))
        },
    }


def best_interval(url: str) -> dict[str, Any]:
    """V of the lowest loss at the last end point that was ablated with several V, and the V that are not told apart from it."""
    run = RunFolder(url)
    config = run.identity().config
    found = [choice for record in _records(run) if (choice := choose(record)) is not None]
    if not found:
        raise UserError(
            f"{run.url} has no ablation of several V on record; make one: "
            f"pma ablate --run {run.url} 'intervals=[{config.merge_interval_tokens},{2 * config.merge_interval_tokens}]'"
        )
    return {
        "run": run.url,
        "active_parameters": active_parameters(config.model, config.training.sequence_length),
        "batch_tokens": config.training.batch_tokens,
        **max(found, key=lambda choice: (choice["step"], len(choice["tried"]))),
    }


def choose(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of the last end in ``record``, the N with the most V and its best V; None if no N has two."""
    by_count: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for cell in record["cells"]:
        if cell["method"] == "sma":
            by_count.setdefault((cell["end_step"], cell["count"]), []).append(cell)
    several = {key: cells for key, cells in by_count.items() if len(cells) > 1}
    if not several:
        return None
    (step, count), cells = max(several.items(), key=lambda item: (item[0][0], len(item[1]), item[0][1]))
    best = min(cells, key=lambda cell: float(cell["loss"]))
    alike: list[str] = next((end["not_told_apart"] for end in record["ends"] if end["step"] == step), [])
    same = sorted(cell["interval_tokens"] for cell in cells if cell["name"] in alike or cell is best)
    return {
        "step": step,
        "count": count,
        "interval_tokens": best["interval_tokens"],
        "not_told_apart": same,
        "tried": sorted(cell["interval_tokens"] for cell in cells),
        "is_at_the_edge": best["interval_tokens"]
        in (min(c["interval_tokens"] for c in cells), max(c["interval_tokens"] for c in cells)),
    }


def _records(run: RunFolder) -> list[dict[str, Any]]:
    keys = [key for key in run.store.keys(FOLDER) if key.count("/") == 1 and key.endswith(".json")]
    return [json.loads(run.store.read(key)) for key in keys]


def _describe(law: PowerLaw | None) -> dict[str, Any] | None:
    if law is None:
        return None
    return {
        "coefficient": law.coefficient,
        "exponent": law.exponent,
        "exponent_interval": list(law.exponent_interval) if law.exponent_interval else None,
        "points": law.points,
    }
