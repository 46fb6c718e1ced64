"""What a run's schedule asks for, done: merges whose windows are complete, and evaluations of what was committed.

Each merge is made under a lease of its own, so that the driver that trains, ticks and people can work on one run at once:
each due merge is made by one of them, and the others go on to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.errors import LeaseHeld, ObjectMissing, ObjectTruncated
from cluster.fan_out import fan_out_ray
from cluster.journal import write_event
from cluster.lease import Lease
from configs.errors import UserError
from configs.load import config_to_dict
from configs.schema import Config
from pipelines.merge import RunTasks, merge_lease
from tasks.checkpoints.catalog import Glance
from tasks.checkpoints.dooms import merges_made, without_doomed, without_gone
from tasks.checkpoints.pins import InputCollected, hold_pins
from tasks.checkpoints.run_folder import RunFolder
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.tied import open_untied
from tasks.evaluation.held_out import EvaluationTask, evaluate_checkpoints, evaluation_key, suite_of
from tasks.merging.merge import MergeReport, execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge
from tasks.merging.schedule import DueMerge, due_merges, is_evaluated, schedule_of
from tasks.merging.selection import on_grid

EVALUATION_BATCH = 6
"""Checkpoints of one evaluation task: enough to share the network and text, few enough to show progress."""


@dataclass(kw_only=True)
class Round:
    """What came of a list of due merges."""

    merged: list[str] = field(default_factory=list)
    """URLs of merges made now."""
    held: dict[str, str] = field(default_factory=dict)
    """Merge to who is making it."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Merge to why there was nothing left to do."""
    failed: dict[str, Exception] = field(default_factory=dict)
    """Merge to what is wrong with its inputs or output; the others go on."""


def make_merges(
    run: RunFolder,
    config: Config,
    due: Sequence[DueMerge[Any]],
    run_tasks: RunTasks,
    tell: Callable[[str], None] = lambda _: None,
) -> Round:
    """Make the merges of ``due``, oldest first, each under its own lease; one that another driver is making is left to it.

    ``tell`` is told the name of each as it begins.
    """
    outcome = Round()
    for merge in due:
        url = f"{run.url}/merged/{merge.name}"
        try:
            with merge_lease(url) as lease, hold_pins(merge.window):
                tell(merge.name)
                report = merge_window(run, config, merge, run_tasks, lease)
        except LeaseHeld as held:
            outcome.held[merge.name] = str(held)
        except (CheckpointError, UserError, ObjectMissing, ObjectTruncated) as error:
            outcome.failed[merge.name] = error
        except InputCollected as collected:
            outcome.skipped[merge.name] = str(collected)
        else:
            if report.is_new:
                outcome.merged.append(url)
            else:
                outcome.skipped[merge.name] = "another driver made it just now"
    return outcome


def merge_window(
    run: RunFolder, config: Config, merge: DueMerge[Any], run_tasks: RunTasks, lease: Lease
) -> MergeReport:
    """Make one merge of the schedule under ``lease``, and record it as an event."""
    plan = plan_merge(
        [open_untied(snapshot.url) for snapshot in merge.window],
        MethodChoice(method=merge.rule.method, alpha=merge.rule.alpha),
        output_url=f"{run.url}/merged/{merge.name}",
        shard_bytes=config.merge.shard_bytes,
    )
    report = execute_merge(plan, lambda function, tasks: run_tasks(function, tasks, lease.is_lost), lease.check)
    if report.is_new:
        details: dict[str, object] = {"name": merge.name, "seconds": report.seconds, "bytes_read": report.bytes_read}
        write_event(run.store, "merge", {**details, "tasks": len(plan.tasks), "tasks_reused": report.tasks_reused})
    return report


def due_now(run: RunFolder, config: Config) -> list[DueMerge[Glance]]:
    """Merges that the run's schedule asks for and that are not made yet."""
    look = run.look()
    snapshots = without_gone(run.store, look.snapshots())
    return due_merges(snapshots, schedule_of(config), merges_made(run.store, look.all_merged()))


def on_ray(
    config: Config, cancelled: Callable[[], bool] = lambda: False, *, num_cpus: Callable[[], int] = lambda: 1
) -> RunTasks:
    """Run merge tasks on the Ray session, ``merge.num_workers`` at once; ``cancelled`` is asked between them.

    ``num_cpus``, CPUs of a task, is asked when a merge begins.
    """

    def run_tasks(function: Callable[[Any], Any], tasks: Sequence[Any], is_lost: Callable[[], bool]) -> Iterable[Any]:
        return fan_out_ray(
            function,
            tasks,
            num_in_flight=max(2, config.merge.num_workers),
            num_cpus=num_cpus(),
            memory_bytes=lambda task: int(task.memory_bytes),
            should_cancel=lambda: cancelled() or is_lost(),
            nodes=config.cluster.merge_nodes,
        )

    return run_tasks


def unevaluated(run: RunFolder, config: Config) -> list[str]:
    """URLs of checkpoints that lack an evaluation record and are to have one.

    Merged ones first, newest first; last the weights that the run began with, if it began with weights alone.
    """
    suite, rows = suite_of(config), schedule_of(config)
    done = set(run.store.keys("evaluations"))
    look = run.look()
    merged = [glance for name, glance in look.merged().items() if is_evaluated(name, glance, rows)]
    newest_first = [*sorted(merged, key=lambda glance: glance.url, reverse=True), *on_grid(look.snapshots())[::-1]]
    waiting = [glance for glance in newest_first if evaluation_key(glance.digest, suite) not in done]
    start = run.identity().start
    initial = [start.url] if start and start.weights_only and evaluation_key(start.digest, suite) not in done else []
    return [glance.url for glance in without_doomed(run.store, waiting)] + initial


def evaluate_all(
    run: RunFolder, config: Config, urls: Sequence[str], cancelled: Callable[[], bool], batch: int = EVALUATION_BATCH
) -> None:
    """Evaluate ``urls`` as Ray tasks."""
    task = EvaluationTask(run_url=run.url, config=config_to_dict(config), urls=(), start=run.identity().start)
    tasks = [replace(task, urls=tuple(urls[first : first + batch])) for first in range(0, len(urls), batch)]
    started = time.perf_counter()
    for _ in fan_out_ray(
        evaluate_checkpoints,
        tasks,
        num_in_flight=max(1, config.merge.num_workers),
        should_cancel=cancelled,
        nodes=config.cluster.merge_nodes,
    ):
        pass
    if urls:
        write_event(run.store, "evaluations", {"count": len(urls), "seconds": time.perf_counter() - started})
