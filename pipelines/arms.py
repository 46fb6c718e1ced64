"""What the arms of a stage came to, read from their run folders, compared, and put as JSON has it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import ObjectExists
from configs.json_numbers import finite_or_none
from configs.schema import Config
from pipelines.initial import InitialWeights
from pipelines.tracked.charts import COMPARISONS
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.run_folder import RunFolder
from tasks.checkpoints.start_point import StartPoint
from tasks.evaluation.arms import Arm, ArmComparison, compare_arms, compare_seeds
from tasks.evaluation.held_out import Evaluation, read_evaluation, suite_of
from tasks.evaluation.paired import CONFIDENCE, Difference
from tasks.merging.selection import on_grid
from tasks.recovery.policy import rule_of
from tasks.recovery.record import read_points


def read_arm(run: RunFolder, config: Config, start: StartPoint) -> Arm:
    """What was measured of the run that began with the weights of ``start``."""
    snapshots, suite = on_grid(run.snapshots()), suite_of(config)
    evaluations = {s.manifest.tokens_seen or 0: read_evaluation(run.store, s.digest, suite) for s in snapshots}
    return Arm(
        initial=read_evaluation(run.store, start.digest, suite),
        held_out={tokens: found for tokens, found in evaluations.items() if found is not None},
        points=read_points(run.store, snapshots[-1].step if snapshots else 0),
        num_recoveries=len({recovery.incident for recovery in run.recoveries()}),
    )


def initial_evaluation(arm: InitialWeights) -> Evaluation | None:
    """Held-out loss of the weights that the arm began with, on its own run's text."""
    return read_evaluation(arm.run.store, arm.start.digest, suite_of(arm.config))


def compare_pairs(pairs: Sequence[tuple[InitialWeights, InitialWeights]]) -> dict[str, Any]:
    """The comparison of arms and their controls, a pair a seed, as JSON has it."""
    found = [
        compare_arms(
            init.config.seed,
            read_arm(init.run, init.config, init.start),
            read_arm(control.run, control.config, control.start),
            rule_of(init.config),
        )
        for init, control in pairs
    ]
    comparison: dict[str, Any] = finite_or_none(
        {
            "confidence": CONFIDENCE,
            "seeds": [_describe(item) for item in found],
            "over_seeds": _differences(compare_seeds(found)) if len(found) > 1 else None,
        }
    )
    return comparison


def record_comparison(run: RunFolder, comparison: Mapping[str, Any]) -> None:
    """Keep ``comparison`` in the run, once, from where tracking forwards it."""
    key = f"{COMPARISONS}/{fingerprint(comparison)[:16]}.json"
    with contextlib.suppress(ObjectExists):
        run.store.create(key, json.dumps({**comparison, "time": time.time()}, allow_nan=False).encode())


def _describe(comparison: ArmComparison) -> dict[str, Any]:
    return {
        "seed": comparison.seed,
        "init": dataclasses.asdict(comparison.init),
        "control": dataclasses.asdict(comparison.control),
        "differences": _differences(comparison.differences),
        "curve": [{"tokens": tokens, **_difference(item)} for tokens, item in comparison.curve.items()],
    }


def _differences(found: Mapping[str, Difference]) -> dict[str, Any]:
    return {name: _difference(item) for name, item in found.items()}


def _difference(item: Difference) -> dict[str, Any]:
    return {**dataclasses.asdict(item), "sign": item.sign}
