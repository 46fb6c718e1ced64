"""Keep a gang at work on a run until its last step is committed, whatever workers and losses do meanwhile."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.capacity import free_cpus, listed_slots
from cluster.errors import GangFailed, LeaseExpired, LeaseHeld, LeaseLost, StorageError
from cluster.gang import GangSize, WorkerLost, run_gang
from cluster.journal import write_event
from cluster.lease import Lease
from cluster.outages import outages_logged
from cluster.storage import Store, open_store
from configs.errors import UserError
from configs.load import config_to_dict
from configs.schema import Config
from pipelines.elastic import GrowthWatch, choose_size, wants_gpus
from pipelines.merge import RunTasks
from pipelines.recover import SpikeAnswers, answer_spike, unanswered_alarm
from pipelines.scheduled import on_ray
from pipelines.throttle import Throttle
from tasks.checkpoints.catalog import Glance
from tasks.checkpoints.ephemeral import drop_ephemeral
from tasks.checkpoints.run_folder import RunFolder
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.training.requests import write_request

StartGang = Callable[[Any, Config, str, Callable[[], object]], dict[str, Any]]
"""Runs one gang on a segment task to its end, under a name; raises :class:`cluster.gang.WorkerLost`.

Meanwhile it calls the last argument now and then, if the task says that spikes are answered while the gang waits.
"""
TIDY_SECONDS = 60.0
RENEWAL_SECONDS = 120.0
"""How long an outage of storage may keep the lease from being renewed between two gangs."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Means:
    """What gangs and the merges of recoveries run on."""

    start_gang: StartGang
    """Runs a gang."""
    run_tasks: RunTasks
    """Runs merge tasks."""
    answers_spikes: bool
    """Whether gangs stay together while a recovery is decided."""


def train_to_end(run: RunFolder, config: Config, lease: Lease, means: Means | None = None) -> None:
    """Run gangs until the last step is committed.

    A gang that loses a worker is started again from the newest snapshot, up to ``training.max_restarts`` times without a
    new snapshot in between. One that ends with a spike is followed by a recovery. Raises
    :class:`cluster.errors.GangFailed` and :class:`tasks.recovery.policy.SpikeUnanswered` where that does not help.
    """
    means = means or on_cluster(config)
    failures, attempt = 0, 0
    while not is_trained(snapshots := run.glances(), config):
        check_patiently(lease)
        if (alarm := unanswered_alarm(run)) is not None:
            answer_spike(run, config, alarm, lease, means.run_tasks)
            snapshots = run.glances()
        cause = "worker lost" if failures else "resume" if snapshots else "start"
        task = _segment_task(run, config, lease, means, cause=cause)
        answers, tidy = SpikeAnswers(run, config, lease, means.run_tasks), EphemeralTidy(run, config)
        try:
            means.start_gang(task, config, f"{config.name}-{attempt}", _one_after_the_other(answers.look, tidy.look))
        except WorkerLost as lost:
            check_patiently(lease)
            _raise_if_final(lost)
            is_stuck = _newest_url(run.glances()) == _newest_url(snapshots)
            failures = _count_failure(run, config, lost, failures if is_stuck else 0)
        else:
            failures = 0
        attempt += 1


def on_cluster(config: Config) -> Means:
    """Gangs on the Ray session, and merge tasks while one waits: on its CPUs, which idle, if there are no others."""
    run_tasks = on_ray(config, num_cpus=lambda: 1 if free_cpus() >= 1 else 0)
    return Means(start_gang=_start_on_ray, run_tasks=run_tasks, answers_spikes=True)


def check_patiently(lease: Lease) -> None:
    """Fail closed, but leave a lease that expired while storage was away the time to be renewed."""
    ends_at = time.monotonic() + RENEWAL_SECONDS
    while True:
        try:
            lease.check()
        except (LeaseExpired, StorageError):
            if time.monotonic() > ends_at:
                raise
            time.sleep(1.0)
        else:
            return


def is_trained(snapshots: Sequence[Glance], config: Config) -> bool:
    """Whether the run's last step is among its living ``snapshots``, by step."""
    return bool(snapshots) and (snapshots[-1].step or 0) >= config.training.total_steps


def first_line(error: BaseException) -> str:
    """The last line of an error's text, which is where Ray puts the cause."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__


class EphemeralTidy:
    """Takes ephemeral snapshots away, beside training, once later ones stand."""

    def __init__(self, run: RunFolder, config: Config) -> None:
        seconds = config.snapshots.ephemeral_seconds
        self._run = run
        self._throttle = Throttle(math.inf if seconds is None else max(seconds, TIDY_SECONDS))

    def look(self) -> None:
        """Take away what is of no use any more, if it is time; storage that fails is left for the next time."""
        if not self._throttle.passes():
            return
        try:
            drop_ephemeral(self._run)
        except (LeaseHeld, LeaseLost, StorageError, CheckpointError) as error:
            logger.info("ephemeral snapshots stay for now: %s", error)


def _newest_url(snapshots: Sequence[Glance]) -> str | None:
    return snapshots[-1].url if snapshots else None


def _count_failure(run: RunFolder, config: Config, lost: WorkerLost, failures: int) -> int:
    with outages_logged("the record of a lost worker"):
        write_event(run.store, "worker-lost", {"attempt": failures, "message": str(lost)[:2000]})
    if failures >= config.training.max_restarts:
        raise GangFailed(
            f"workers failed {failures + 1} times without a new snapshot (training.max_restarts="
            f"{config.training.max_restarts}); the last failure: {first_line(lost.root)}. The committed snapshots are "
            "intact: mend the cause and run the same command again"
        ) from lost
    logger.warning("a worker was lost (%s); continuing from the newest snapshot", first_line(lost.root))
    return failures + 1


def _segment_task(run: RunFolder, config: Config, lease: Lease, means: Means, *, cause: str) -> Any:
    from tasks.training.worker import SegmentTask

    return SegmentTask(
        run_url=run.url,
        config=config_to_dict(config),
        lease_token=lease.token,
        cause=cause,
        launched=time.time(),
        answers_spikes=means.answers_spikes,
        request_key=f"requests/{secrets.token_hex(4)}.json",
    )


def _start_on_ray(task: Any, config: Config, name: str, on_wait: Callable[[], object]) -> dict[str, Any]:
    with_gpus = wants_gpus(config)
    size = choose_size(config, with_gpus=with_gpus)
    store = open_store(task.run_url)
    growth = GrowthWatch(config, store, task.request_key, size, slots=_free_beside(size, with_gpus=with_gpus))
    try:
        return run_gang(
            _train_segment,
            task,
            GangSize(
                num_workers=size,
                with_gpus=with_gpus,
                nodes=config.cluster.train_nodes,
                collective_timeout_seconds=config.training.collective_timeout_seconds,
            ),
            name=name,
            on_wait=_one_after_the_other(growth.look, on_wait),
            on_interrupt=lambda: _ask_to_stop(store, task.request_key),
        )
    finally:
        with outages_logged(f"the removal of {task.request_key}"):
            store.delete(task.request_key)


def _ask_to_stop(store: Store, request_key: str) -> None:
    with outages_logged("asking the gang to stop"):
        write_request(store, request_key, "stop")


def _free_beside(size: int, *, with_gpus: bool) -> Callable[[str | None], int]:
    """Room for a gang in place of one of ``size``: its own, and what nobody uses."""

    def slots(nodes: str | None) -> int:
        return min(listed_slots(nodes, with_gpus=with_gpus), size + free_cpus())

    return slots


def _one_after_the_other(*calls: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        for one in calls:
            one()

    return call


def _train_segment(task: Any) -> dict[str, Any]:
    entered = time.time()
    # Imported in the worker: the driver itself never needs torch.
    from tasks.training.segment import train_segment

    return train_segment(replace(task, entered=entered))


def _raise_if_final(lost: WorkerLost) -> None:
    """Raise the cause of a lost worker if starting again cannot help: storage, the user's mistake, a lost lease."""
    error: BaseException | None = lost.root
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        # A lease that merely expired in an outage is being renewed; the driver asks for it before the next gang.
        if isinstance(error, (StorageError, UserError, LeaseLost)) and not isinstance(error, LeaseExpired):
            raise error from lost
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
