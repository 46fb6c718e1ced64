"""What runs beside training: merges as their windows complete, and evaluations of what was committed.

Both ask committed manifests alone what is due, so a driver that was away catches up, and nothing is
done twice.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable

from cluster.fan_out import fan_out_ray
from cluster.journal import write_event
from cluster.lease import Lease
from configs.load import config_to_dict
from configs.schema import Config
from tasks.checkpoints.manifest import Manifest
from tasks.checkpoints.run_folder import RunFolder, Snapshot
from tasks.checkpoints.tied import open_untied
from tasks.evaluation.held_out import EvaluationTask, evaluate_checkpoints, evaluation_key, suite_of
from tasks.merging.merge import MergeReport, execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import MergeTask, plan_merge
from tasks.merging.receipt import Receipt
from tasks.merging.selection import WindowRule, due_windows

POLL_SECONDS = 0.7
EVALUATION_BATCH = 6
"""Checkpoints of one evaluation task: enough to share the network and text, few enough to show progress."""
logger = logging.getLogger(__name__)


def scheduled_rule(config: Config) -> WindowRule:
    """The merge that a run makes at every snapshot."""
    return WindowRule(
        method=config.merge.method,
        count=config.merge.count,
        interval_tokens=config.merge_interval_tokens,
        alpha=config.merge.alpha if config.merge.method == "ema" else None,
        max_span_fraction=config.merge.max_span_fraction,
    )


def merge_window(
    run: RunFolder,
    config: Config,
    rule: WindowRule,
    window: list[Snapshot],
    lease: Lease,
    cancelled: Callable[[], bool],
) -> MergeReport:
    """Merge one window of the run as Ray tasks, under the run's lease."""
    name = rule.name_at(window[-1].manifest)
    plan = plan_merge(
        [open_untied(snapshot.url) for snapshot in window],
        MethodChoice(method=rule.method, alpha=rule.alpha),
        output_url=f"{run.url}/merged/{name}",
        shard_bytes=config.merge.shard_bytes,
    )

    def run_tasks(function: Callable[[MergeTask], list[Receipt]], tasks: list[MergeTask]) -> list[list[Receipt]]:
        return list(
            fan_out_ray(
                function,
                tasks,
                num_in_flight=max(2, config.merge.num_workers),
                memory_bytes=lambda task: task.memory_bytes,
                should_cancel=cancelled,
            )
        )

    report = execute_merge(plan, run_tasks, lease.check)
    details: dict[str, object] = {"name": name, "seconds": report.seconds, "bytes_read": report.bytes_read}
    write_event(run.store, "merge", {**details, "tasks": len(plan.tasks), "tasks_reused": report.tasks_reused})
    return report


def unevaluated(run: RunFolder, config: Config) -> list[str]:
    """URLs of committed checkpoints without an evaluation record, merged ones first, newest first."""
    suite = suite_of(config)
    done = set(run.store.keys("evaluations"))

    def pending(manifest: Manifest) -> bool:
        return evaluation_key(manifest.digest, suite) not in done

    merged = [f"{run.url}/merged/{name}" for name, manifest in run.merged().items() if pending(manifest)]
    raw = [snapshot.url for snapshot in run.snapshots() if pending(snapshot.manifest)]
    return sorted(merged, reverse=True) + raw[::-1]


def evaluate_all(
    run: RunFolder, config: Config, urls: list[str], cancelled: Callable[[], bool], batch: int = EVALUATION_BATCH
) -> None:
    """Evaluate ``urls`` as Ray tasks."""
    tasks = [
        EvaluationTask(run_url=run.url, config=config_to_dict(config), urls=tuple(urls[start : start + batch]))
        for start in range(0, len(urls), batch)
    ]
    for _ in fan_out_ray(
        evaluate_checkpoints, tasks, num_in_flight=max(1, config.merge.num_workers), should_cancel=cancelled
    ):
        pass


class Beside:
    """Two threads beside training: one merges, one evaluates."""

    def __init__(self, run: RunFolder, config: Config, lease: Lease, *, merges: bool = True) -> None:
        self.run, self.config, self.lease = run, config, lease
        self.rule = scheduled_rule(config) if merges else None
        self.activity: dict[str, str] = {}
        self.seconds: dict[str, float] = {"merge": 0.0, "evaluate": 0.0}
        self._training_done = threading.Event()
        self._cancelled = threading.Event()
        self._errors: list[BaseException] = []
        bodies = [("evaluate", self._evaluate_pending)] + ([("merge", self._merge_due)] if merges else [])
        self._threads = [
            threading.Thread(target=self._loop, args=(name, body), daemon=True, name=name) for name, body in bodies
        ]

    def __enter__(self) -> Beside:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()
        self._training_done.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def finish(self) -> None:
        """Wait until everything due is merged and evaluated; raises what went wrong."""
        self._training_done.set()
        for thread in self._threads:
            while thread.is_alive():
                thread.join(timeout=0.2)
        if self._errors:
            raise self._errors[0]

    def _loop(self, name: str, body: Callable[[], int]) -> None:
        try:
            while not self._cancelled.is_set():
                final = self._training_done.is_set()
                started = time.perf_counter()
                worked = body()
                if worked:
                    self.seconds[name] += time.perf_counter() - started
                elif final and self._is_last(name):
                    return
                else:
                    self._training_done.wait(POLL_SECONDS) if not final else time.sleep(POLL_SECONDS)
        except concurrent.futures.CancelledError:
            return
        except Exception as error:  # noqa: BLE001  a thread's edge: kept, and raised in the driver by finish()
            logger.error("%s failed: %s", name, error)
            self._errors.append(error)

    def _is_last(self, name: str) -> bool:
        """The evaluator outlives the merger, whose results it evaluates."""
        return name == "merge" or not any(thread.is_alive() for thread in self._threads if thread.name == "merge")

    def _merge_due(self) -> int:
        assert self.rule is not None
        due = due_windows(self.run.snapshots(), self.rule, set(self.run.merged()))
        for window in due:
            self.activity["merge"] = f"merging {self.rule.name_at(window[-1].manifest)}"
            merge_window(self.run, self.config, self.rule, window, self.lease, self._cancelled.is_set)
            self.activity.pop("merge", None)
        return len(due)

    def _evaluate_pending(self) -> int:
        if not self.config.evaluation.while_training and not self._training_done.is_set():
            return 0
        urls = unevaluated(self.run, self.config)
        # While training goes on, few at a time: the newest merge is what people wait for.
        chosen = urls if self._training_done.is_set() else urls[:EVALUATION_BATCH]
        if chosen:
            self.activity["evaluate"] = f"evaluating {len(urls)}"
            evaluate_all(self.run, self.config, chosen, self._cancelled.is_set)
            self.activity.pop("evaluate", None)
        return len(chosen)
