"""What the report shows, gathered from the run folder alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.fan_out import fan_out_local
from cluster.journal import Measurement, latest, read_events, read_journal, read_journals
from cluster.storage import Store, open_store
from configs.schema import Config
from pipelines.report.evidence import Evidence, gather_evidence
from pipelines.timing import stage_seconds
from tasks.checkpoints.catalog import NUM_READERS, Glance
from tasks.checkpoints.manifest import Merge, read_manifest
from tasks.checkpoints.recoveries import Recovery, read_confirmations
from tasks.checkpoints.run_folder import RunFolder, RunIdentity
from tasks.evaluation.held_out import FOLDER, Evaluation, evaluation_key, read_evaluation, suite_of
from tasks.merging.schedule import scheduled_rule
from tasks.merging.selection import on_grid
from tasks.recovery.phases import RecoveryPhases, recovery_phases


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A checkpoint with its held-out loss."""

    name: str
    """Folder name."""
    glance: Glance
    """What it is."""
    evaluation: Evaluation
    """Its loss."""

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.glance.tokens_seen or 0


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A merge that ends at the last step, with how it came to be."""

    row: Evaluated
    """The checkpoint."""
    merge: Merge
    """Method, inputs and weights."""


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
    comparison: list[Compared]
    """Every merge that ends at the last step."""
    last: Glance | None
    """The newest snapshot, evaluated or not."""
    unhealthy: list[int]
    """Steps of snapshots before which a step was not finite."""
    num_unevaluated: int
    """Snapshots on the grid and merges without a record of their loss."""
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
    evidence: Evidence
    """What other commands put on record: forecast, ablations, arms, scores."""

    @property
    def num_alarms(self) -> int:
        """Segments that ended with a spike."""
        return sum(1 for segment in self.segments if segment["end"] and segment["end"]["reason"] == "spike")


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
    look, suite = run.look(), suite_of(config)
    snapshots, merged = look.snapshots(), look.merged()
    measured = read_evaluations(run.store, [*snapshots, *merged.values()], suite)
    last = snapshots[-1] if snapshots else None
    merges = sorted(with_loss(merged, measured), key=lambda row: row.tokens)
    rule = scheduled_rule(config)
    return ReportData(
        identity=identity,
        config=config,
        url=run.url,
        journal=journal,
        left_behind=left_behind,
        branch_journals=branch_journals,
        raw=with_loss(named(snapshots), measured),
        merged=[m for m in merges if m.glance.step is not None and m.name == rule.name_at(m.glance)],
        comparison=[found for m in merges if last and m.glance.step == last.step for found in _compared(m)],
        last=last,
        unhealthy=[glance.step or 0 for glance in snapshots if not glance.healthy],
        num_unevaluated=sum(g.digest not in measured for g in [*on_grid(snapshots), *merged.values()]),
        branches={name: _evaluated_snapshots(branch) for name, branch in branches.items()},
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
        evidence=gather_evidence(run, config),
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


def named(snapshots: Iterable[Glance]) -> dict[str, Glance]:
    """``snapshots`` by what the page calls them."""
    return {f"step {glance.step}": glance for glance in snapshots}


def read_evaluations(store: Store, glances: Sequence[Glance], suite: str) -> dict[str, Evaluation]:
    """What is on record of ``glances``, by digest; several reads at once, as there may be thousands."""
    there = set(store.keys(FOLDER))
    digests = {g.digest for g in glances if evaluation_key(g.digest, suite) in there}
    found = fan_out_local(lambda d: read_evaluation(store, d, suite), sorted(digests), num_workers=NUM_READERS)
    return {evaluation.digest: evaluation for evaluation in found if evaluation is not None}


def with_loss(glances: Mapping[str, Glance], measured: Mapping[str, Evaluation]) -> list[Evaluated]:
    """Those with a finite loss: another has no place on an axis, and ``pma status`` names it."""
    return [
        Evaluated(name=name, glance=glance, evaluation=measured[glance.digest])
        for name, glance in glances.items()
        if glance.digest in measured and math.isfinite(measured[glance.digest].loss)
    ]


def _evaluated_snapshots(branch: RunFolder) -> list[Evaluated]:
    glances = branch.glances()
    measured = read_evaluations(branch.store, glances, suite_of(branch.identity().config))
    return with_loss(named(glances), measured)


def _compared(row: Evaluated) -> list[Compared]:
    """``row`` with how it was merged; nothing if it is no merge."""
    merge = read_manifest(open_store(row.glance.url))[0].merge
    return [] if merge is None else [Compared(row=row, merge=merge)]


Key = TypeVar("Key")


def _sum(parts: list[dict[Key, float]]) -> dict[Key, float]:
    totals: dict[Key, float] = {}
    for part in parts:
        for key, seconds in part.items():
            totals[key] = totals.get(key, 0.0) + seconds
    return totals
