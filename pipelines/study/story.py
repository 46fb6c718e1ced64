"""The paper's experiments as a story: trunks and anneals, later stages, spikes, merges, curvature, verdicts, the page."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.lease import hold_lease
from cluster.session import ray_session
from cluster.storage import open_store, scheme_of
from configs.errors import UserError
from configs.load import identity_of
from configs.study import StudyConfig
from pipelines.pretrain import num_cpus
from pipelines.steps import Step, StepRecord, pending_steps, run_steps
from pipelines.study.curvature import measure_contour, measure_curvature
from pipelines.study.faults import SETTINGS, write_sums
from pipelines.study.findings import judge
from pipelines.study.layout import Study
from pipelines.study.merges import measure_curves, measure_forecast, measure_forks, measure_grid, measure_inside
from pipelines.study.page import write_page
from pipelines.study.spike_arms import ARMS, CONTROL, SNAPSHOT_STEPS, Case, run_case
from pipelines.study.training import is_trunk_standing, train_arms, train_trunk

LEASE = "study"
Measure = Callable[[Study, int], Mapping[str, Any]]
Tell = Callable[[str], None]


def study(url: str, config: StudyConfig, *, output: str | None = None, tell: Tell = lambda _: None) -> dict[str, Any]:
    """Do what the study at ``url`` still lacks, judge every finding, and write the page to ``output`` (default: below it).

    The same call again continues it. Returns the fields of ``pma study --json``. Raises
    :class:`configs.errors.UserError` for what is wrong with the configuration before anything is trained, and
    :class:`cluster.errors.LeaseHeld` if somebody else is at work on it.
    """
    started = time.perf_counter()
    place = Study(url=open_store(url).url, config=config)
    require_study(place)
    steps = study_steps(place)
    with hold_lease(place.store, LEASE) as lease, ExitStack() as stack:
        place = replace(place, lease=lease)
        if any(
            step.name.split("-")[0] in ("trunk", "continued", "sft")
            for step in pending_steps(place.store, steps, place)
        ):
            cpus = max(num_cpus(place.trunk_config(seed)) for seed in config.seeds)
            stack.enter_context(ray_session(place.trunk_config(config.seeds[0]).cluster.address, cpus))
        records = run_steps(place.store, steps, place, lease, tell)
    findings = judge(place, {name: record.result for name, record in records.items()})
    page = write_page(place, records, findings, output or f"{place.url}/page")
    return {
        "study": place.url,
        "page": page,
        "findings": [_describe(finding) for finding in findings],
        "step_seconds": {name: record.seconds for name, record in records.items()},
        "seconds": round(time.perf_counter() - started, 3),
    }


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


def require_study(study: Study) -> None:
    """Find what no study can be made of, before anything is trained."""
    config = study.config
    if scheme_of(study.url) != "file":
        raise UserError(f"{study.url}: a study's runs are made on this machine; give --run a path")
    for seed in config.seeds:
        trunk = study.trunk_config(seed)
        total, batch = trunk.training.total_steps, trunk.training.batch_tokens
        interval, length = trunk.snapshots.interval_tokens // batch, trunk.anneal.tokens // batch
        off = [step for step in (*config.forks, *config.grid.ends) if step % interval or step > total]
        if off:
            raise UserError(
                f"forks and grid.ends: there is no snapshot at step {off[0]:,}; the trunk has {total:,} steps and a snapshot "
                f"every {interval:,}"
            )
        if config.forks[-1] + length != total:
            raise UserError(
                f"forks: the last anneal leaves at step {config.forks[-1]:,} and has {length:,} steps, so it ends at "
                f"{config.forks[-1] + length:,}; it is to end with the trunk, at {total:,}"
            )
        if length // interval < config.inside_count:
            raise UserError(f"inside_count={config.inside_count}: the anneal has {length // interval} snapshots")
    if config.spikes is not None:
        unknown = {*config.spikes.faults} - SNAPSHOT_STEPS.keys() | {*config.spikes.arms} - ARMS.keys()
        if unknown:
            raise UserError(
                f"spikes: {sorted(unknown)[0]!r} is not known; faults: {', '.join(SNAPSHOT_STEPS)}; arms: {', '.join(ARMS)}"
            )
    for stage in (config.continued, config.sft):
        for number in range(len(stage.arms) if stage else 0):
            assert stage is not None
            study.stage_config(stage, number, config.seeds[0])


def measure_spikes(study: Study, seed: int) -> dict[str, Any]:
    """Every arm on every fault of ``seed``, beside the run without it, two at a time."""
    assert study.config.spikes is not None
    folder = str(Path(study.url.removeprefix("file://")).resolve() / "spikes")
    if any(SETTINGS[fault].is_easy_text for fault in study.config.spikes.faults):
        write_sums(Path(folder) / "text")
    cases = [
        Case(fault=fault, arm=arm, seed=seed, folder=folder)
        for fault in study.config.spikes.faults
        for arm in dict.fromkeys([CONTROL, *study.config.spikes.arms])
    ]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        return {"cases": pool.map(run_case, cases, chunksize=1)}


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


def _describe(finding: Any) -> dict[str, Any]:
    return {
        "name": finding.name,
        "source": finding.source,
        "finding": finding.text,
        "verdict": finding.verdict,
        "claims": [
            {
                "text": claim.text,
                "rule": claim.rule,
                "values": list(claim.values),
                "mean": claim.interval.mean if claim.interval else None,
                "interval": [claim.interval.low, claim.interval.high] if claim.interval else None,
                "unit": claim.unit,
                "verdict": claim.verdict,
            }
            for claim in finding.claims
        ],
        "remark": finding.remark,
    }


Records = Mapping[str, StepRecord]
