"""What helps against a loss spike: arms of recovery on the same faults and seeds.

Each case is a whole run of pmaflow (segments, snapshots, detector, merges, records) with a gang of one rank in a process
of its own, without Ray; ``control`` is the run of the same seed without the fault.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import load_config
from configs.schema import Config
from pipelines.study.faults import SETTINGS, SHORT, SMALL, write_sums
from pipelines.study.layout import Study
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import HeldOutSuite
from tasks.recovery.policy import SpikeUnanswered

TOLERANCE = 0.1
CONTROL = "control"
CONTROLS = {"learning-rate": "learning-rate-lower"}
"""Faults whose control is another setting, not the same without a drill."""
SNAPSHOT_STEPS = {"poison": 25, "corrupt-weights": 25, "corrupt-moments": 25, "corrupt-bits": 25, "learning-rate": 10}
"""Faults, and the steps between their snapshots."""
ARMS: dict[str, tuple[str, ...]] = {
    CONTROL: ("recovery.policy=ignore",),
    "none": ("recovery.policy=ignore",),
    "skip-step": ("recovery.policy=ignore", "optimizer.guard=skip-step"),
    "zclip": ("recovery.policy=ignore", "optimizer.guard=zclip"),
    "rollback": ("recovery.policy=rollback",),
    "rollback-skip": ("recovery.policy=rollback-skip",),
    "pma": ("recovery.policy=pma",),
    "pma-reset": ("recovery.policy=pma", "recovery.moments=reset"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    fault: str
    """A key of :data:`pipelines.study.faults.SETTINGS`."""
    arm: str
    """Name of an arm."""
    seed: int
    """Of weights, data order and fault."""
    folder: str
    """Where runs go."""

    @property
    def url(self) -> str:
        """Run folder."""
        return f"{self.folder}/{self.fault}-{self.arm}-{self.seed}"

    def config(self) -> Config:
        """The run's configuration; the control of a learning rate is a quarter of it."""
        is_control = self.arm == CONTROL
        setting = SETTINGS[CONTROLS.get(self.fault, self.fault) if is_control else self.fault]
        overrides = tuple(item for item in setting.overrides if not (is_control and item.startswith("drill.")))
        if not setting.is_easy_text:
            # A quarter of the work of tiny; half the sequences a batch, so the poisoned ones are half as far along.
            overrides = (*overrides, *SMALL)
        if self.fault == "poison" and not is_control:
            overrides = (*overrides, "drill.poison_start_sequence=1600", "drill.poison_sequences=256")
        batch = 1024
        length = (
            f"training.total_tokens={setting.num_steps * batch}",
            f"snapshots.interval_tokens={SNAPSHOT_STEPS[self.fault] * batch}",
            f"seed={self.seed}",
            "training.num_workers=1",
            f"anneal.tokens={batch}",
            "evaluation.slice_tokens=8192",
            "data.held_out_fraction=0.2",
        )
        sources = (f"data.sources=[{self.folder}/text]",) if setting.is_easy_text else ()
        return load_config("tiny", (*SHORT, *overrides, *length, *sources, *ARMS[self.arm])).config


def run_case(case: Case) -> dict[str, Any]:
    """Make the run, or read what came of it before."""
    record = Path(f"{case.url}.json")
    if record.exists():
        return dict(json.loads(record.read_text()))
    import torch

    torch.set_num_threads(1)
    from pipelines.local_gang import train

    config, run, started = case.config(), RunFolder(case.url), time.perf_counter()
    run.begin(config)
    given_up = ""
    try:
        train(run, config)
    except SpikeUnanswered as error:
        given_up = str(error)
    segments = run.segments()
    result = {
        "fault": case.fault,
        "arm": case.arm,
        "seed": case.seed,
        "loss": None if given_up else _held_out_loss(run, config),
        "given_up": given_up,
        "recoveries": len(run.recoveries()),
        "tokens_in_vain": sum(
            (segment["end"]["step"] - recovery.start.step) * config.training.batch_tokens
            for segment, recovery in zip(segments, run.recoveries(), strict=False)
        ),
        "alarm_steps": [r.alarm_step for r in run.recoveries()],
        "seconds": round(time.perf_counter() - started, 1),
    }
    record.write_text(json.dumps(result))
    return result


def _held_out_loss(run: RunFolder, config: Config) -> float | None:
    """Of the last snapshot; null where its weights are not finite."""
    loss = HeldOutSuite(run.url, config).evaluate(run.snapshots()[-1].url).loss
    return loss if math.isfinite(loss) else None


def table(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per fault and arm."""
    control = {(r["fault"], r["seed"]): r["loss"] for r in results if r["arm"] == CONTROL}
    rows = []
    for fault, arm in dict.fromkeys((r["fault"], r["arm"]) for r in results):
        mine = [r for r in results if (r["fault"], r["arm"]) == (fault, arm)]
        excess = [_excess(r, control) for r in mine]
        rows.append(
            {
                "fault": fault,
                "arm": arm,
                "runs": len(mine),
                "recovered": sum(value <= TOLERANCE for value in excess),
                "excess": excess,
                "excess_loss_median": round(statistics.median(excess), 4),
                "excess_loss_range": [round(min(excess), 4), round(max(excess), 4)],
                "tokens_in_vain_median": statistics.median(r["tokens_in_vain"] for r in mine),
                "recoveries": [r["recoveries"] for r in mine],
                "seconds_median": statistics.median(r["seconds"] for r in mine),
            }
        )
    return rows


def _excess(result: dict[str, Any], control: dict[tuple[str, int], float]) -> float:
    if result["loss"] is None:
        return math.inf
    return float(result["loss"] - control[result["fault"], result["seed"]])


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
