"""What merging gives: grids over N, V, method and end point, inside the anneal, beside it, and decay curves as weights."""

from __future__ import annotations

from typing import Any

from pipelines.ablate import ablate
from pipelines.anneal import branch_name
from pipelines.forecast import forecast
from pipelines.study.layout import Study
from tasks.evaluation.held_out import read_evaluation, suite_of

CURVES = ("wsm:linear", "wsm:cosine", "wsm:1-sqrt")
"""Decay curves whose merge weights stand in for a real decay (arXiv 2507.17634, theorem 3.1)."""


def measure_grid(study: Study, seed: int) -> dict[str, Any]:
    """N and V with SMA, and each method with the scheduled N and V, at every end point of the grid."""
    grid, interval = study.config.grid, study.trunk_config(seed).snapshots.interval_tokens
    rule, url = study.trunk_rule(seed), study.trunk(seed).url
    ends = _list("ends", grid.ends)
    by_window = ablate(
        url,
        (
            "methods=[sma]",
            _list("counts", grid.counts),
            _list("intervals", [multiple * interval for multiple in grid.interval_multiples]),
            ends,
        ),
    )
    by_method = ablate(
        url,
        (
            "methods=[sma,wma,ema]",
            _list("alphas", grid.alphas),
            _list("counts", [rule.count]),
            _list("intervals", [rule.interval_tokens]),
            ends,
        ),
    )
    return {
        "raw": {str(end["step"]): end["raw_loss"] for end in by_window["ends"]},
        "windows": [_cell(cell) for cell in by_window["cells"]],
        "methods": [_cell(cell) for cell in by_method["cells"]],
        "lacking": [item["name"] for item in by_window["lacking"]],
    }


def measure_inside(study: Study, seed: int) -> dict[str, Any]:
    """Merges of the last anneal's own snapshots, at each of them that has enough before it, beside the raw branch."""
    branch, rule = study.last_branch(seed), study.inside_rule(seed)
    steps = [glance.step or 0 for glance in branch.glances() if not glance.ephemeral]
    found = ablate(
        branch.url,
        (
            "methods=[sma]",
            _list("counts", [rule.count]),
            _list("intervals", [rule.interval_tokens]),
            _list("ends", steps[rule.count - 1 :]),
        ),
    )
    raw = {end["step"]: end["raw_loss"] for end in found["ends"]}
    points = [
        {"step": cell["end_step"], "raw": raw[cell["end_step"]], "merged": cell["loss"]} for cell in found["cells"]
    ]
    return {"fork_step": study.config.forks[-1], "points": points, "annealed": points[-1]["raw"]}


def measure_forks(study: Study, seed: int) -> dict[str, Any]:
    """For each fork, the trunk, its scheduled merge and the annealing branch at the same numbers of tokens."""
    trunk, config, rule = study.trunk(seed), study.trunk_config(seed), study.trunk_rule(seed)
    suite, look = suite_of(config), trunk.look()
    merged = {glance.step: glance.digest for name, glance in look.merged().items() if name == _name(rule, glance.step)}
    raw = {glance.step: glance.digest for glance in look.snapshots() if not glance.ephemeral}
    forks = []
    for fork in study.config.forks:
        branch = trunk.branch(branch_name(fork))
        points = []
        for glance in branch.glances():
            losses = {
                "raw": read_evaluation(trunk.store, raw.get(glance.step, ""), suite),
                "merged": read_evaluation(trunk.store, merged.get(glance.step, ""), suite),
                "annealed": read_evaluation(branch.store, glance.digest, suite),
            }
            if not glance.ephemeral and all(losses.values()):
                points.append({"step": glance.step, **{name: found.loss for name, found in losses.items() if found}})
        forks.append({"fork_step": fork, "points": points})
    return {"forks": forks}


def measure_forecast(study: Study, seed: int) -> dict[str, Any]:
    """Every anneal of the trunk predicted from the others, by predictor; and from those alone that had ended by then."""
    found = forecast(study.trunk(seed).url)
    return {
        "anneals": found["anneals"],
        "errors": {name: test["errors"] for name, test in found["back_test"].items()},
        "errors_earlier_only": {name: test["errors"] for name, test in found["back_test_earlier_only"].items()},
    }


def measure_curves(study: Study, seed: int) -> dict[str, Any]:
    """Merges of the trunk over the span of the last anneal, weighted by decay curves, beside that anneal."""
    config, url = study.trunk_config(seed), study.trunk(seed).url
    count = config.anneal.tokens // config.snapshots.interval_tokens
    end = study.last_step(seed)
    found = ablate(
        url,
        (
            f"methods=[{','.join(repr(curve) for curve in CURVES)}]",
            _list("counts", [count]),
            _list("intervals", [config.snapshots.interval_tokens]),
            _list("ends", [end]),
        ),
    )
    annealed = read_evaluation(
        study.last_branch(seed).store, study.last_branch(seed).glances()[-1].digest, suite_of(config)
    )
    return {
        "count": count,
        "raw": found["ends"][0]["raw_loss"],
        "losses": {cell["method"]: cell["loss"] for cell in found["cells"]},
        "annealed": annealed.loss if annealed else None,
    }


def _name(rule: Any, step: int | None) -> str:
    return str(rule.output_name(step or 0))


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    kept = ("method", "alpha", "count", "interval_tokens", "span_tokens", "end_step", "loss", "gain")
    return {key: cell[key] for key in kept}


def _list(key: str, values: Any) -> str:
    return f"{key}=[{','.join(str(value) for value in values)}]"
