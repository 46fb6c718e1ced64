"""Retention: say what of a run stays and why, and take away the rest (docs/retention.md)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cluster.errors import StorageError
from cluster.journal import write_event
from cluster.lease import Lease
from cluster.storage import Store
from configs.load import override_execution
from configs.schema import Config
from pipelines.tracked.registration import FOLDER as REGISTRATIONS
from pipelines.tracked.registration import asked_digests
from pipelines.tracking import CURSOR_KEY
from tasks.checkpoints.attempts import Attempt, find_attempts, remove_attempts, writers_at_work
from tasks.checkpoints.catalog import Glance
from tasks.checkpoints.collect import Collection, collect
from tasks.checkpoints.dependents import read_dependents, reasons_of_dependents
from tasks.checkpoints.dooms import merges_made, names_going, without_gone
from tasks.checkpoints.pins import pins_in_force
from tasks.checkpoints.recoveries import Recovery
from tasks.checkpoints.retention import (
    Holdings,
    RetentionPlan,
    SpikeReach,
    folder_of,
    join_reasons,
    plan_retention,
    reasons_of_recoveries,
    reasons_of_registered,
    reasons_of_segments,
    reasons_of_starts,
)
from tasks.checkpoints.run_folder import RUN_KEY, RUN_LEASE, RunFolder
from tasks.evaluation.held_out import evaluation_key, suite_of
from tasks.merging.pending import reasons_of_windows
from tasks.merging.schedule import kept_merges, schedule_of
from tasks.recovery.reach import reach_of

VERSION_MARK = "version/"
"""Begins the tracking cursor's items of registered merges; the rest is their digest."""
EVALUATORS = {RUN_LEASE, "evaluate"}
"""Leases of drivers that evaluate what was committed."""
Clock = Callable[[], float]


def gc(run_url: str, *, apply: bool, overrides: tuple[str, ...] = (), clock: Clock = time.time) -> dict[str, Any]:
    """Plan what retention takes away from the run at ``run_url``, and with ``apply`` take it away.

    The rules are those of the run's configuration with ``overrides`` such as ``retention.keep_last=5``. Branches are runs of
    their own: what they start from stays, what lies in them is left alone. Returns the fields of ``pma gc --json``.
    """
    started = time.perf_counter()
    run = RunFolder(run_url)
    config = override_execution(run.identity().config, overrides)
    if apply:
        done, attempts, removed = _collect(run, config, clock)
    else:
        done = Collection(plan=survey(run, config, clock()), collected=(), notes=())
        attempts, removed = find_attempts(run.store, names_going(run.store), clock()), []
    deleted = [*(doom.name for doom in done.collected), *removed]
    rows = [_row_of(row) for row in done.plan.describe()] + [_row_of_attempt(run, a) for a in attempts]
    going = [row for row in rows if (row["name"] in deleted if apply else row["action"] == "delete")]
    return {
        "run": run.url,
        "apply": apply,
        "rows": rows,
        "deleted": [f"{run.url}/{name}" for name in deleted],
        "freed_bytes": sum(row["bytes"] for row in going),
        "kept_bytes": sum(row["bytes"] for row in rows) - sum(row["bytes"] for row in going),
        "notes": [*done.notes, *_notes(run, config)],
        "seconds": round(time.perf_counter() - started, 3),
    }


def survey(run: RunFolder, config: Config, now: float) -> RetentionPlan:
    """Read the run anew, and plan.

    The order counts: pins before everything else. A reader lets its pin go only after what it made (a merge, a branch) can be
    seen, so whoever finds no pin first finds that.
    """
    pins = pins_in_force(run.store, now)
    is_evaluating = not EVALUATORS.isdisjoint(writers_at_work(run.store, now))
    look = run.look()
    snapshots = without_gone(run.store, look.snapshots())
    left = without_gone(run.store, look.left_behind())
    merged = _by_name(without_gone(run.store, look.merged().values()))
    left_merges = _by_name(without_gone(run.store, look.left_behind_merges().values()))
    all_merged, segments = {**merged, **left_merges}, run.segments()
    rows = schedule_of(config)
    ends = config.training.total_tokens if snapshots and snapshots[-1].kind == "training" else None
    holdings = [(f"snapshots/{folder_of(s)}", s) for s in (*snapshots, *left)] + [
        (f"merged/{n}", g) for n, g in all_merged.items()
    ]
    branches = {name: run.branch(name) for name in run.branches() if run.branch(name).store.exists(RUN_KEY)}
    needed = join_reasons(
        {name: [f"pinned by {owner}"] for name, owner in pins.items()},
        reasons_of_windows(snapshots, rows, merges_made(run.store, all_merged), last_tokens=ends),
        reasons_of_starts({n: start for n, b in branches.items() if (start := b.identity().start)}, holdings),
        reasons_of_dependents(read_dependents(run.store)),
        reasons_of_segments(segments, snapshots),
        reasons_of_recoveries({recovery.number: recovery.start for recovery in look.recoveries}, all_merged),
        reasons_of_registered(registered_digests(run.store), _merges(all_merged, branches), holdings),
        _reasons_of_evaluation(run, config, holdings) if is_evaluating else {},
    )
    surplus = set(merged) - kept_merges(list(merged.items()), rows)
    return plan_retention(
        Holdings(
            snapshots=tuple(snapshots),
            merged=merged,
            needed=needed,
            surplus=surplus,
            left_behind=tuple(left),
            left_behind_merges=left_merges,
            reach=_reach(config, snapshots, segments, look.recoveries),
        ),
        config.retention,
        interval_tokens=config.snapshots.interval_tokens,
        now=now,
    )


def _reach(
    config: Config,
    snapshots: Sequence[Glance],
    segments: Sequence[Mapping[str, Any]],
    recoveries: Sequence[Recovery],
) -> SpikeReach | None:
    """What recoveries may ask for; None before training begins, and once it is at its end without a spike."""
    if not snapshots:
        return None
    is_spike = bool(segments) and (segments[-1]["end"] or {}).get("reason") == "spike"
    if (snapshots[-1].tokens_seen or 0) >= config.training.total_tokens and not is_spike:
        return None
    return reach_of(config, snapshots[-1].step or 0, recoveries)


def _by_name(merges: Iterable[Glance]) -> dict[str, Glance]:
    return {folder_of(glance): glance for glance in merges}


def registered_digests(store: Store) -> set[str]:
    """Digests of merged checkpoints that the run registered as model versions, with any tracking server."""
    data = store.read_if_present(CURSOR_KEY)
    try:
        cursors = json.loads(data or b"{}").values()
        items = [item for cursor in cursors for item in cursor.get("items", [])]
        sent = {item.removeprefix(VERSION_MARK) for item in items if item.startswith(VERSION_MARK)}
    except (ValueError, AttributeError, TypeError) as error:
        raise StorageError(
            f"{store.url}/{CURSOR_KEY} is damaged ({error}): which merges are registered is not known, nothing is deleted"
        ) from error
    # Those that MLflow, which is away, has not heard of yet.
    return sent | set(asked_digests(store.keys(REGISTRATIONS)))


def _collect(run: RunFolder, config: Config, clock: Clock) -> tuple[Collection, list[Attempt], list[str]]:
    attempts: list[Attempt] = []
    removed: list[str] = []

    def tidy(lease: Lease) -> None:
        attempts.extend(find_attempts(run.store, names_going(run.store), clock()))
        removed.extend(remove_attempts(run.store, attempts, lease))

    done = collect(run.store, lambda: survey(run, config, clock()), clock=clock, tidy=tidy)
    if done.collected or removed:
        names = [doom.name for doom in done.collected]
        write_event(run.store, "gc", {"collected": names, "attempts": removed, "notes": list(done.notes)})
    return done, attempts, removed


def _merges(merged: Mapping[str, Glance], branches: Mapping[str, RunFolder]) -> list[Glance]:
    """Merges of the run and of its branches, which may have inputs here."""
    found = list(merged.values())
    for branch in branches.values():
        found += branch.look().all_merged().values()
    return found


def _reasons_of_evaluation(
    run: RunFolder, config: Config, holdings: Iterable[tuple[str, Glance]]
) -> dict[str, list[str]]:
    """What a driver that is at work is yet to evaluate."""
    suite, done = suite_of(config), set(run.store.keys("evaluations"))
    waiting = [
        folder
        for folder, glance in holdings
        if not glance.ephemeral and evaluation_key(glance.digest, suite) not in done
    ]
    return {folder: ["not evaluated yet, and the run's driver is at work"] for folder in waiting}


def _row_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("name", "url", "step", "bytes", "action", "reasons")}


def _row_of_attempt(run: RunFolder, attempt: Attempt) -> dict[str, Any]:
    return {
        "name": attempt.name,
        "url": f"{run.url}/{attempt.name}",
        "step": None,
        "bytes": attempt.bytes,
        "action": "delete" if attempt.is_removable else "keep",
        "reasons": [attempt.reason],
    }


def _notes(run: RunFolder, config: Config) -> Sequence[str]:
    notes = []
    if not config.retention.is_set:
        notes.append("no retention rule is set (retention.keep_last, keep_every, keep_hours): every snapshot stays")
    if branches := run.branches():
        notes.append(
            f"{len(branches)} branch(es) are runs of their own and were left alone: pma gc --run {run.url}/branches/NAME"
        )
    return notes
