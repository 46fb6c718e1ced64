"""Ticks: what is due on a run, done once, by whoever's clock asks; watching is ticking in a loop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.errors import LeaseHeld, StorageError
from cluster.fan_out import fan_out_processes, fan_out_ray
from cluster.lease import hold_lease
from cluster.session import ray_session
from cluster.storage import open_store
from configs.load import config_to_dict, override_execution
from configs.schema import Config
from pipelines.adopt import SOURCES, Growth, adopt_new
from pipelines.merge import require_workers, task_runner
from pipelines.scheduled import Round, make_merges
from tasks.checkpoints.catalog import Glance, Look
from tasks.checkpoints.dooms import merges_made, without_gone
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import EvaluationTask, Outcome, evaluation_key, suite_of, try_checkpoints
from tasks.merging.schedule import DueMerge, describe_schedule, due_merges, is_evaluated, schedule_of

ADOPT_LEASE = "adopt"
EVALUATE_LEASE = "evaluate"
logger = logging.getLogger(__name__)


def tick(run_url: str, *, overrides: tuple[str, ...] = (), workers: str = "local") -> dict[str, Any]:
    """Adopt what another trainer has completed, make the merges that are due, evaluate those; then end.

    What is due follows from committed manifests alone: after downtime all of it is caught up, and ticks that run at once
    share the work, each merge being made by one of them. A merge whose inputs are damaged, or that cannot be evaluated, is named
    under ``failed`` and keeps no other back. Raises :class:`cluster.errors.LeaseHeld` if all that is due is being made by others. Returns
    the fields of ``pma tick --json``.
    """
    started = time.perf_counter()
    require_workers(workers)
    run = RunFolder(run_url)
    config = override_execution(run.identity().config, overrides)
    rows = schedule_of(config)
    look = run.look()
    growth = _adopt(run, look)
    if growth.adopted:
        look = run.look()
    snapshots = without_gone(run.store, look.snapshots())
    due = due_merges(snapshots, rows, merges_made(run.store, look.all_merged()))
    outcome = _merge(run, config, due, workers)
    if due:
        look = run.look()
    if outcome.held and not outcome.merged and not outcome.failed and not growth.adopted:
        raise LeaseHeld("; ".join(outcome.held.values()))
    reasons = [*outcome.skipped.values(), *outcome.held.values()]
    evaluations = _evaluate(run, config, look, workers)
    unsound = {item.url: item.error for item in evaluations if item.error is not None}
    failed = outcome.failed | {url.rpartition("/")[2]: error for url, error in unsound.items()}
    return {
        "run": run.url,
        "ok": not failed,
        "merged": outcome.merged,
        "skipped": "; ".join(reasons) or (None if due else describe_schedule(look.snapshots(), rows)),
        "failed": [{"name": name, "reason": str(error)} for name, error in failed.items()],
        "adopted": growth.adopted,
        "waiting": [{"url": url, "reason": reason} for url, reason in growth.waiting.items()],
        "evaluated": [item.url for item in evaluations if item.error is None],
        "seconds": round(time.perf_counter() - started, 3),
    }


def watch(
    run_url: str,
    *,
    overrides: tuple[str, ...] = (),
    workers: str = "local",
    every_seconds: float = 60.0,
    until_done: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Tick every ``every_seconds`` until interrupted or, with ``until_done``, until the run's last step is merged.

    Storage that fails is asked again at the next round. Returns what all rounds did.
    """
    stop = stop or threading.Event()
    merged: list[str] = []
    rounds = 0
    RunFolder(run_url).identity()
    while True:
        rounds += 1
        try:
            answer = tick(run_url, overrides=overrides, workers=workers)
        except (LeaseHeld, StorageError) as error:
            tell(f"round {rounds}: {error}")
        else:
            merged += answer["merged"]
            tell(describe_round(rounds, answer))
            if until_done and not answer["merged"] and is_complete(run_url):
                break
        if stop.wait(every_seconds):
            break
    return {"run": open_store(run_url).url, "merged": merged, "rounds": rounds}


def describe_round(number: int, answer: dict[str, Any]) -> str:
    """One line about a tick."""
    done = [f"merged {url.rpartition('/')[2]}" for url in answer["merged"]]
    done += [f"adopted step {row['step']}" for row in answer["adopted"]]
    done += [f"FAILED {row['name']}: {row['reason']}" for row in answer["failed"]]
    done += [f"waiting for {row['url']}: {row['reason']}" for row in answer["waiting"]]
    return f"round {number}: " + ("; ".join(done) or str(answer["skipped"] or "nothing is due"))


def is_complete(run_url: str) -> bool:
    """Whether the run's last step is committed and nothing is due."""
    run = RunFolder(run_url)
    config = run.identity().config
    look = run.look()
    snapshots = look.snapshots()
    ended = bool(snapshots) and (snapshots[-1].tokens_seen or 0) >= config.training.total_tokens
    return ended and not due_merges(snapshots, schedule_of(config), merges_made(run.store, look.all_merged()))


def _merge(run: RunFolder, config: Config, due: Sequence[DueMerge[Glance]], workers: str) -> Round:
    if not due:
        return Round()
    inputs = dict.fromkeys(snapshot.url for merge in due for snapshot in merge.window)
    with task_runner(workers, [run.url, *inputs], config.cluster.merge_nodes) as run_tasks:
        return make_merges(run, config, due, run_tasks)


def _adopt(run: RunFolder, look: Look) -> Growth:
    """Adopt under a lease, which is asked for only if the run has sources."""
    if not run.store.keys(SOURCES):
        return Growth()
    try:
        with hold_lease(run.store, ADOPT_LEASE):
            return adopt_new(run, {snapshot.step for snapshot in look.snapshots() if snapshot.step is not None})
    except LeaseHeld as held:
        return Growth(waiting={run.url: str(held)})


def _evaluate(run: RunFolder, config: Config, look: Look, workers: str) -> list[Outcome]:
    """Evaluate the merges that lack it, where a row of the schedule asks for it."""
    if not _unevaluated_merges(run, config, look):
        return []
    try:
        with hold_lease(run.store, EVALUATE_LEASE):
            # Again, now that nobody else evaluates: the one before may have, and retention may have taken some away.
            urls = _unevaluated_merges(run, config, run.look())
            task = EvaluationTask(run_url=run.url, config=config_to_dict(config), urls=tuple(urls))
            return _run_alone(task, workers, config.cluster.merge_nodes) if urls else []
    except LeaseHeld as held:
        logger.info("evaluations are left to another driver: %s", held)
        return []


def _unevaluated_merges(run: RunFolder, config: Config, look: Look) -> list[str]:
    rows = schedule_of(config)
    wanted: list[tuple[str, Glance]] = [
        (name, glance) for name, glance in look.merged().items() if is_evaluated(name, glance, rows)
    ]
    if not wanted or not any(row.evaluate for row in rows):
        return []
    suite, done = suite_of(config), set(run.store.keys("evaluations"))
    return [glance.url for _, glance in wanted if evaluation_key(glance.digest, suite) not in done]


def _run_alone(task: EvaluationTask, workers: str, nodes: str | None) -> list[Outcome]:
    """Evaluate in a process or a Ray worker, whose memory goes back when it ends."""
    if workers == "ray":
        with ray_session(None, 1):
            (outcomes,) = fan_out_ray(try_checkpoints, [task], num_in_flight=1, nodes=nodes)
    else:
        (outcomes,) = fan_out_processes(try_checkpoints, [task], num_workers=1)
    return outcomes
