"""What a run is doing, from its URL alone: no Ray, no MLflow needed."""

from __future__ import annotations

import time
from typing import Any

from cluster.lease import held_leases
from pipelines.tracking import bring_up_to_date, open_forwarder
from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder
from tasks.evaluation.held_out import read_evaluation, suite_of
from tasks.merging.schedule import scheduled_rule
from tasks.merging.selection import due_windows


def status(run_url: str) -> dict[str, Any]:
    """The fields of ``pma status --json``. If no driver works on the run, MLflow is brought up to date first."""
    run = RunFolder(run_url)
    config = run.identity().config
    leases = held_leases(run.store, time.time())
    suite = suite_of(config)

    def loss_of(digest: str) -> float | None:
        evaluation = read_evaluation(run.store, digest, suite)
        return evaluation.loss if evaluation else None

    rule = scheduled_rule(config)
    snapshots, merged = run.snapshots(), run.merged()
    return {
        "run": run.url,
        "name": config.name,
        "total_steps": config.training.total_steps,
        "snapshots": [
            {
                "step": s.step,
                "tokens_seen": s.manifest.tokens_seen,
                "url": s.url,
                "digest": s.manifest.digest,
                "healthy": s.manifest.healthy,
                "phase": s.manifest.phase,
                "loss": loss_of(s.manifest.digest),
            }
            for s in snapshots
        ],
        "merged": [
            {
                "name": name,
                "url": f"{run.url}/merged/{name}",
                "digest": manifest.digest,
                "method": manifest.merge.method if manifest.merge else None,
                "inputs": [item.url for item in manifest.merge.inputs] if manifest.merge else [],
                "loss": loss_of(manifest.digest),
            }
            for name, manifest in merged.items()
        ],
        "segments": run.segments(),
        "branches": run.branches(),
        "leases": leases,
        "due": [rule.name_at(window[-1].manifest) for window in due_windows(snapshots, rule, set(merged))],
        "tracking": tracking_status(run, is_driven=any(row["name"] == RUN_LEASE for row in leases)),
    }


def tracking_status(run: RunFolder, *, is_driven: bool) -> dict[str, Any]:
    """Lag of MLflow behind the run folder; sends it, unless a driver that is at work does so itself."""
    config = run.identity().config
    if is_driven:
        forwarder = open_forwarder(run, config)
        lag = forwarder.lag() if forwarder else 0
        return {"uri": forwarder.tracker.uri if forwarder else None, "lag": lag, "error": None}
    return bring_up_to_date(run, config)
