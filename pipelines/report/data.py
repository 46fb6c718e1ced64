"""What the report shows, gathered from the run folder alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.journal import Measurement, latest, read_events, read_journal, read_journals
from configs.schema import Config
from pipelines.timing import stage_seconds
from tasks.checkpoints.manifest import Manifest
from tasks.checkpoints.recoveries import Recovery, read_confirmations
from tasks.checkpoints.run_folder import RunFolder, RunIdentity
from tasks.evaluation.held_out import Evaluation, read_evaluation, suite_of
from tasks.merging.schedule import scheduled_rule
from tasks.recovery.phases import RecoveryPhases, recovery_phases


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A checkpoint with its held-out loss."""

    name: str
    """Folder name."""
    manifest: Manifest
    """What it is."""
    evaluation: Evaluation
    """Its loss."""

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.manifest.tokens_seen or 0


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that the report shows."""

    identity: RunIdentity
    """Who the run is."""
    config: Config
    """Its configuration."""
    url: str
    """Where it lies."""
    journal: list[Measurement]
    """Training metrics by step, on the run's way."""
    left_behind: list[list[Measurement]]
    """Stretches of training that recoveries cut off, by segment."""
    branch_journals: dict[str, list[Measurement]]
    """The same for each branch."""
    raw: list[Evaluated]
    """Snapshots of the trunk."""
    merged: list[Evaluated]
    """Scheduled merges, by tokens."""
    comparison: list[Evaluated]
    """Every merge that ends at the last step."""
    branches: dict[str, list[Evaluated]]
    """Snapshots of each branch."""
    fork_tokens: dict[str, int]
    """Tokens at which each branch left the trunk."""
    segments: list[dict[str, Any]]
    """Stretches of training."""
    recoveries: list[Recovery]
    """Decisions after loss spikes."""
    confirmed: set[int]
    """Numbers of those that held."""
    phases: list[RecoveryPhases]
    """How long they took."""
    given_up: str
    """What was said of a spike without an answer; empty if there is none."""
    stages: dict[tuple[str, str], float]
    """Seconds by (stage, kind)."""
    startup_seconds: float
    """Start-up of all gangs, trunk and branches."""
    startup_phases: dict[str, float]
    """Seconds of it by phase: ``ray_train_seconds``, ``import_seconds``, ``build_seconds``, ``restore_seconds``."""
    snapshot_seconds: float
    """Time that training stood still for snapshots."""
    merge_seconds: float
    """Time spent merging, beside training."""


def gather(run_url: str) -> ReportData:
    """Read the run at ``run_url``."""
    run = RunFolder(run_url)
    identity = run.identity()
    config = identity.config
    below = {name: run.branch(name) for name in run.branches() if run.branch(name).store.exists("run.json")}
    # Further arms of a stage do not go on from this run's weights: what is said of branches is not true of them.
    branches = {name: b for name, b in below.items() if (start := b.identity().start) and not start.weights_only}
    branch_journals = {name: read_journal(branch.store) for name, branch in branches.items()}
    journals = read_journals(run.store)
    everyone = [run, *below.values()]
    events, segments = read_events(run.store), run.segments()
    recoveries = run.recoveries()
    journal, left_behind = split_journals(journals, segments, recoveries)
    plans = [segment["plan"] for item in everyone for segment in item.segments()]
    raw = _evaluated_snapshots(run, config)
    last = run.snapshots()[-1].step if run.snapshots() else 0
    merges = _evaluated_merges(run, config)
    rule = scheduled_rule(config)
    return ReportData(
        identity=identity,
        config=config,
        url=run.url,
        journal=journal,
        left_behind=left_behind,
        branch_journals=branch_journals,
        raw=raw,
        merged=[m for m in merges if m.manifest.step is not None and m.name == rule.name_at(m.manifest)],
        comparison=[m for m in merges if m.manifest.step == last],
        branches={name: _evaluated_snapshots(branch, branch.identity().config) for name, branch in branches.items()},
        fork_tokens={name: s.tokens_seen for name, b in branches.items() if (s := b.identity().start) is not None},
        segments=segments,
        recoveries=recoveries,
        confirmed=set(read_confirmations(run.store)),
        phases=recovery_phases(segments, events, journals),
        given_up=_unanswered(events),
        stages=_sum([stage_seconds(item.store) for item in everyone]),
        startup_seconds=sum(plan.get("startup_seconds", 0.0) for plan in plans),
        startup_phases=_sum([plan.get("startup_phases", {}) for plan in plans]),
        snapshot_seconds=sum(
            m.metrics.get("snapshot/stall_seconds", 0.0) for rows in [journal, *branch_journals.values()] for m in rows
        ),
        merge_seconds=sum(float(str(e["seconds"])) for e in events if e["kind"] == "merge"),
    )


def split_journals(
    journals: Mapping[int, Sequence[Measurement]], segments: Sequence[Mapping[str, Any]], recoveries: Sequence[Recovery]
) -> tuple[list[Measurement], list[list[Measurement]]]:
    """Measurements by segment as those on the run's way, by step, and the stretches that recoveries cut off."""
    in_force = {segment["segment"]: segment["plan"].get("recovery", 0) for segment in segments}
    kept: dict[int, list[Measurement]] = {}
    cut_off = []
    for number, rows in sorted(journals.items()):
        end = min((r.start.step for r in recoveries if r.number > in_force.get(number, 0)), default=None)
        kept[number] = [row for row in rows if end is None or row.step <= end]
        if len(kept[number]) < len(rows):
            cut_off.append(list(rows[len(kept[number]) :]))
    return latest(kept), cut_off


def _unanswered(events: list[dict[str, Any]]) -> str:
    """What the run said when it gave up, unless it has gone on since."""
    decisions = [event for event in events if event["kind"] in ("spike-unanswered", "recovery")]
    newest = decisions[-1] if decisions else None
    return str(newest["message"]) if newest and newest["kind"] == "spike-unanswered" else ""


def _evaluated_snapshots(run: RunFolder, config: Config) -> list[Evaluated]:
    """Those with a finite loss: another has no place on an axis, and ``pma status`` names it."""
    suite = suite_of(config)
    rows = []
    for snapshot in run.snapshots():
        evaluation = read_evaluation(run.store, snapshot.manifest.digest, suite)
        if evaluation is not None and math.isfinite(evaluation.loss):
            rows.append(Evaluated(name=f"step {snapshot.step}", manifest=snapshot.manifest, evaluation=evaluation))
    return rows


def _evaluated_merges(run: RunFolder, config: Config) -> list[Evaluated]:
    suite = suite_of(config)
    rows = []
    for name, manifest in run.merged().items():
        evaluation = read_evaluation(run.store, manifest.digest, suite)
        if evaluation is not None and math.isfinite(evaluation.loss):
            rows.append(Evaluated(name=name, manifest=manifest, evaluation=evaluation))
    return sorted(rows, key=lambda row: row.tokens)


Key = TypeVar("Key")


def _sum(parts: list[dict[Key, float]]) -> dict[Key, float]:
    totals: dict[Key, float] = {}
    for part in parts:
        for key, seconds in part.items():
            totals[key] = totals.get(key, 0.0) + seconds
    return totals
