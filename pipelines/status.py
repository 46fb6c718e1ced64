"""What a run is doing, from its URL alone: no Ray, no MLflow needed."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster.lease import held_leases
from cluster.storage import Store
from configs.load import override_execution
from configs.schema import Config
from pipelines.tracking import bring_up_to_date, open_forwarder
from pipelines.wording import describe_event
from tasks.checkpoints.catalog import Glance, Look
from tasks.checkpoints.dooms import merges_made, without_gone
from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder
from tasks.evaluation.held_out import evaluation_key, read_loss, suite_of
from tasks.merging.schedule import due_merges, schedule_of

NUM_EVENTS = 8
"""Newest events that are shown."""
QUIET_EVENTS = ("timing", "evaluations")
"""Kinds of events that are bookkeeping."""


def status(run_url: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of ``pma status --json``. If no driver works on the run, MLflow is brought up to date first."""
    run = RunFolder(run_url)
    config = override_execution(run.identity().config, overrides)
    leases = held_leases(run.store, time.time())
    look, measured = run.look(), _measured(run, config)
    return {
        "run": run.url,
        "name": config.name,
        "total_steps": config.training.total_steps,
        "snapshots": [_of_snapshot(glance) | measured(glance) for glance in look.snapshots()],
        "merged": [_of_merge(name, glance) | measured(glance) for name, glance in look.merged().items()],
        "left_behind": [_fields(glance, "step", "url", "digest", "healthy") for glance in look.left_behind()],
        "left_behind_merges": [
            {"name": name, **_fields(glance, "url", "digest", "method", "step")}
            for name, glance in look.left_behind_merges().items()
        ],
        "segments": run.segments(),
        "recoveries": [dataclasses.asdict(recovery) for recovery in look.recoveries],
        "branches": run.branches(),
        "leases": leases,
        "due": _due(run, config, look),
        "events": newest_events(run.store),
        "tracking": tracking_status(run, is_driven=any(row["name"] == RUN_LEASE for row in leases)),
    }


def follow(
    run_url: str,
    *,
    tell: Callable[[str], None],
    every_seconds: float = 5.0,
    overrides: tuple[str, ...] = (),
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Tell a line for everything that happens to the run, until it is trained and nothing is due; returns its status then."""
    stop = stop or threading.Event()
    before = status(run_url, overrides)
    while not is_finished(before) and not stop.wait(every_seconds):
        now = status(run_url, overrides)
        for line in describe_news(before, now):
            tell(f"{time.strftime('%H:%M:%S')} {line}")
        before = now
    return before


def is_finished(result: dict[str, Any]) -> bool:
    """Whether the last step is committed, nothing is due and nobody works on the run."""
    snapshots = result["snapshots"]
    is_trained = bool(snapshots) and snapshots[-1]["step"] >= result["total_steps"]
    return is_trained and not result["due"] and not result["leases"]


def describe_news(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What ``now`` has that ``before`` had not, a line each."""
    seen = {s["url"] for s in before["snapshots"]}
    lines = [
        f"snapshot step {s['step']:,} ({s['phase']}{'' if s['healthy'] else ', UNHEALTHY'})"
        for s in now["snapshots"]
        if s["url"] not in seen
    ]
    old = {m["name"] for m in before["merged"]}
    lines += [f"merged {m['name']}" for m in now["merged"] if m["name"] not in old]
    known = {(row["name"], row["owner"]) for row in before["leases"]}
    lines += [f"lease {r['name']} taken by {r['owner']}" for r in now["leases"] if (r["name"], r["owner"]) not in known]
    for number, segment in enumerate(now["segments"]):
        was = before["segments"][number] if number < len(before["segments"]) else None
        if was is None:
            lines.append(f"segment {segment['segment']}: {segment['cause']}, from step {segment['start']['step']:,}")
        if segment["end"] and (was is None or not was["end"]):
            lines.append(
                f"segment {segment['segment']} ended at step {segment['end']['step']:,}: {segment['end']['reason']}"
            )
    told = {event["key"] for event in before["events"]}
    lines += [describe_event(event) for event in now["events"] if event["key"] not in told and event["kind"] != "merge"]
    return lines


def newest_events(store: Store) -> list[dict[str, Any]]:
    """The newest events that are more than bookkeeping, oldest first."""
    keys = [key for key in store.keys("events") if not key.removesuffix(".json").endswith(QUIET_EVENTS)]
    return [{"key": key, **json.loads(store.read(key))} for key in keys[-NUM_EVENTS:]]


def tracking_status(run: RunFolder, *, is_driven: bool) -> dict[str, Any]:
    """Lag of MLflow behind the run folder; sends it, unless a driver that is at work does so itself."""
    config = run.identity().config
    if is_driven:
        forwarder = open_forwarder(run, config)
        lag = forwarder.lag() if forwarder else 0
        decisions = list(forwarder.cursor.decisions.values()) if forwarder else []
        return {"uri": forwarder.tracker.uri if forwarder else None, "lag": lag, "error": None, "promotions": decisions}
    return bring_up_to_date(run, config)


def _due(run: RunFolder, config: Config, look: Look) -> list[str]:
    snapshots = without_gone(run.store, look.snapshots())
    due = due_merges(snapshots, schedule_of(config), merges_made(run.store, look.all_merged()))
    return [merge.name for merge in due]


def _measured(run: RunFolder, config: Config) -> Callable[[Glance], dict[str, Any]]:
    """What gives the held-out loss of a checkpoint, and whether it was measured; a loss may be none though it was."""
    suite, losses = suite_of(config), run.catalog.losses(lambda key: read_loss(run.store.read(key)))

    def measured(glance: Glance) -> dict[str, Any]:
        key = evaluation_key(glance.digest, suite)
        return {"loss": losses.get(key), "evaluated": key in losses}

    return measured


def _of_snapshot(glance: Glance) -> dict[str, Any]:
    return _fields(glance, "step", "tokens_seen", "url", "digest", "healthy", "phase")


def _of_merge(name: str, glance: Glance) -> dict[str, Any]:
    return {"name": name, **_fields(glance, "url", "digest", "method"), "inputs": list(glance.inputs)}


def _fields(glance: Glance, *names: str) -> dict[str, Any]:
    return {name: getattr(glance, name) for name in names}
