"""The steps of a study: what each is determined by, what it needs, and who carries it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from configs.load import identity_of
from pipelines.steps import Step
from pipelines.study.curvature import measure_contour, measure_curvature
from pipelines.study.layout import Study
from pipelines.study.merges import measure_curves, measure_forecast, measure_forks, measure_grid, measure_inside
from pipelines.study.spike_arms import measure_spikes
from pipelines.study.training import is_trunk_standing, train_arms, train_trunk

TRAINING = ("trunk", "continued", "sft")
"""Kinds of steps that need a gang."""
Measure = Callable[[Study, int], Mapping[str, Any]]


def study_steps(study: Study) -> list[Step[Study]]:
    """All steps, those that train first; each but the training ones is done once its figures are on record."""
    config, steps = study.config, list[Step[Study]]()
    for seed in config.seeds:
        steps.append(_trunk_step(study, seed))
        steps += [
            _measure_step(name, seed, measure, values)
            for name, measure, values in (
                ("forks", measure_forks, {}),
                ("grid", measure_grid, dataclasses.asdict(config.grid)),
                ("inside", measure_inside, {"count": config.inside_count}),
                ("curves", measure_curves, {}),
                ("forecast", measure_forecast, {}),
                ("curvature", measure_curvature, {"count": config.curvature.count, "tokens": config.curvature.tokens}),
            )
        ]
        for kind, stage in (("continued", config.continued), ("sft", config.sft)):
            if stage is not None:
                values = {arm.name: identity_of(study.stage_config(stage, i, seed)) for i, arm in enumerate(stage.arms)}
                starts = {arm.name: arm.start for arm in stage.arms}
                measure = partial(_train_arms, kind=kind)
                steps.append(_measure_step(kind, seed, measure, {"arms": values, "starts": starts}))
        if config.spikes is not None:
            steps.append(_measure_step("spikes", seed, measure_spikes, dataclasses.asdict(config.spikes), needs=()))
    contour = _measure_step("contour", config.seeds[0], measure_contour, dataclasses.asdict(config.curvature))
    return [*steps, contour]


def _train_arms(study: Study, seed: int, *, kind: str) -> dict[str, Any]:
    stage = study.config.continued if kind == "continued" else study.config.sft
    assert stage is not None
    return train_arms(study, kind, stage, seed)


def _trunk_step(study: Study, seed: int) -> Step[Study]:
    return Step(
        name=f"trunk-{seed}",
        config={
            **identity_of(study.trunk_config(seed)),
            "forks": list(study.config.forks),
            "inside_count": study.config.inside_count,
        },
        function=lambda place: train_trunk(place, seed),
        is_standing=lambda place, _: is_trunk_standing(place, seed),
    )


def _measure_step(
    name: str, seed: int, measure: Measure, values: Mapping[str, Any], needs: tuple[str, ...] | None = None
) -> Step[Study]:
    return Step(
        name=f"{name}-{seed}",
        config=dict(values),
        needs=(f"trunk-{seed}",) if needs is None else needs,
        function=lambda place: measure(place, seed),
        is_standing=lambda _place, _result: True,
    )
