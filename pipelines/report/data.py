"""What the report shows, gathered from the run folder alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cluster.journal import Measurement, read_events, read_journal
from configs.schema import Config
from pipelines.timing import stage_seconds
from tasks.checkpoints.manifest import Manifest
from tasks.checkpoints.run_folder import RunFolder, RunIdentity
from tasks.evaluation.held_out import Evaluation, read_evaluation, suite_of
from tasks.merging.schedule import scheduled_rule


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
    """Training metrics by step."""
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
    stages: dict[tuple[str, str], float]
    """Seconds by (stage, kind)."""
    startup_seconds: float
    """Start-up of all gangs, trunk and branches."""
    snapshot_seconds: float
    """Time that training stood still for snapshots."""
    merge_seconds: float
    """Time spent merging, beside training."""


def gather(run_url: str) -> ReportData:
    """Read the run at ``run_url``."""
    run = RunFolder(run_url)
    identity = run.identity()
    config = identity.config
    branches = {name: run.branch(name) for name in run.branches() if run.branch(name).store.exists("run.json")}
    journals = {name: read_journal(branch.store) for name, branch in branches.items()}
    journal = read_journal(run.store)
    everyone = [run, *branches.values()]
    raw = _evaluated_snapshots(run, config)
    last = run.snapshots()[-1].step if run.snapshots() else 0
    merges = _evaluated_merges(run, config)
    rule = scheduled_rule(config)
    return ReportData(
        identity=identity,
        config=config,
        url=run.url,
        journal=journal,
        branch_journals=journals,
        raw=raw,
        merged=[m for m in merges if m.manifest.step is not None and m.name == rule.name_at(m.manifest)],
        comparison=[m for m in merges if m.manifest.step == last],
        branches={name: _evaluated_snapshots(branch, branch.identity().config) for name, branch in branches.items()},
        fork_tokens={name: s.tokens_seen for name, b in branches.items() if (s := b.identity().start) is not None},
        segments=run.segments(),
        stages=_sum_stages([stage_seconds(item.store) for item in everyone]),
        startup_seconds=sum(s["plan"].get("startup_seconds", 0.0) for item in everyone for s in item.segments()),
        snapshot_seconds=sum(
            m.metrics.get("snapshot/stall_seconds", 0.0) for rows in [journal, *journals.values()] for m in rows
        ),
        merge_seconds=sum(float(str(e["seconds"])) for e in read_events(run.store) if e["kind"] == "merge"),
    )


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


def _sum_stages(parts: list[dict[tuple[str, str], float]]) -> dict[tuple[str, str], float]:
    totals: dict[tuple[str, str], float] = {}
    for part in parts:
        for key, seconds in part.items():
            totals[key] = totals.get(key, 0.0) + seconds
    return totals
