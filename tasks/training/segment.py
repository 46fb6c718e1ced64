"""One segment of training, as every rank runs it: find where to go on, train, publish snapshots, journal, watch.

The gang gets nothing but names (URLs, a lease token); it decides by itself, from committed manifests and recoveries,
where the run stands, so a gang that is started again simply continues.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import StorageError
from cluster.preemption import stop_requested
from configs.load import config_from_dict
from tasks.training.await_recovery import await_recovery
from tasks.training.memory import explain_out_of_memory
from tasks.training.resume import ResumePoint
from tasks.training.roll_call import open_roll_call
from tasks.training.scribe import Scribe
from tasks.training.signals import Signals, share_signals
from tasks.training.snapshots.flight import SnapshotFailed
from tasks.training.snapshots.take import LossWindow, begin_snapshot, open_writer
from tasks.training.worker import SegmentTask, Worker

logger = logging.getLogger(__name__)


def train_segment(task: SegmentTask) -> dict[str, Any]:
    """Train until the run has seen its tokens, or something ends the segment; returns where and why it ended.

    After a spike the ranks stay, if the task says that the driver answers it: once the recovery is on record they go on
    from its start as a further segment, without being started, built and connected anew. Raises
    :class:`tasks.training.roll_call.RankHung` naming the rank that the others waited for in vain, and what
    :meth:`tasks.training.snapshots.writer.SnapshotWriter.wait` raises for a snapshot that could not be published.
    """
    roll_call = open_roll_call(dist.get_rank(), dist.get_world_size())
    try:
        worker = Worker(task, roll_call)
        while True:
            segment = Segment(worker, worker.restore())
            reason = segment.train()
            dist.barrier()
            if reason != "spike" or not task.answers_spikes or not await_recovery(worker, segment.number):
                break
            worker.asked_for, worker.startup_phases = time.time(), {}
    except RuntimeError as error:
        explained = roll_call.explain(error) or explain_out_of_memory(
            error, config_from_dict(task.config), rank=roll_call.rank, step=roll_call.place[0]
        )
        if explained is not None:
            raise explained from error
        raise
    finally:
        roll_call.end()
    return {"step": worker.step, "tokens_seen": worker.tokens_seen, "segment": segment.number, "reason": reason}


class Segment:
    """One rank's view of a segment that is under way."""

    def __init__(self, worker: Worker, point: ResumePoint) -> None:
        self.worker = worker
        self.number = open_segment(worker, point)
        self.scribe = Scribe(worker, self.number) if worker.rank == 0 else None
        self.writer = open_writer(worker, self.number)
        self.window = LossWindow(worker.carried)

    def train(self) -> str:
        """The loop; returns why it ended."""
        worker, reason = self.worker, "completed"
        signals = self._signals()
        started = time.perf_counter()
        while not worker.is_done:
            result = worker.train_step(signals)
            heard = result.signals
            if heard.has_failed_snapshot:
                self.writer.wait()  # Raises, on every rank at this step.
            if heard.has_alarm or heard.is_resize_due:
                reason = "spike" if heard.has_alarm else "resized"
                break
            self.window.add(result.loss, result.gradient_norm)
            if self.scribe:
                self.scribe.note(result, time.perf_counter() - started, self.writer.poll())
            started = time.perf_counter()
            if worker.is_snapshot_due():
                self._publish(ephemeral=False)
            elif heard.should_stop or heard.is_ephemeral_due:
                self._publish(ephemeral=True)
            if heard.should_stop:
                reason = "stopped"
                break
            signals = self._signals()
        worker.close()
        if reason == "completed" and self._is_alarmed_at_the_end():
            reason = "spike"
        last = self._finish_snapshots(reason)
        if self.scribe:
            self.scribe.close(reason, last)
        return reason

    def _is_alarmed_at_the_end(self) -> bool:
        """Whether the last step of all was the one that gave an alarm, which no further step could tell."""
        _, heard = share_signals(torch.zeros((), device=self.worker.model.device), self._signals())
        return heard.has_alarm

    def _finish_snapshots(self, reason: str) -> Mapping[str, float]:
        """Wait for the snapshot in flight; after a spike one that fails is of no use anyway."""
        try:
            return self.writer.finish()
        except (StorageError, SnapshotFailed) as error:
            if reason != "spike":
                raise
            logger.warning("the snapshot in flight when the spike was found is lost: %s", error)
            return {}

    def _signals(self) -> Signals:
        """What this rank has to say at the next step."""
        told_to_stop = stop_requested()
        if self.scribe is None:
            return Signals(should_stop=told_to_stop, has_failed_snapshot=self.writer.has_failed)
        request = self.scribe.requests.found
        seconds = self.worker.config.snapshots.ephemeral_seconds
        return Signals(
            has_alarm=self.scribe.watch.alarm is not None,
            should_stop=told_to_stop or request == "stop",
            is_resize_due=request == "resize" and self.worker.is_snapshot_due(),
            has_failed_snapshot=self.writer.has_failed,
            is_ephemeral_due=self.writer.is_ephemeral_due(seconds, time.monotonic()),
        )

    def _publish(self, *, ephemeral: bool) -> None:
        """Begin the snapshot of the step just completed; training goes on beside its upload."""
        self.worker.roll_call.note(self.worker.step, "at a snapshot")
        if self.scribe:
            # What was measured up to a snapshot is on record before it: whoever resumes there watches on from it.
            self.scribe.journal.flush()
        metrics = begin_snapshot(self.worker, self.writer, self.window, self.number, ephemeral=ephemeral)
        if not ephemeral:
            self.window = LossWindow()
        if self.scribe:
            self.scribe.pending |= metrics


def open_segment(worker: Worker, point: ResumePoint) -> int:
    """Put the segment on record by rank 0; its number, on every rank."""
    number = [0]
    if worker.rank == 0 and not worker.is_done:
        worker.check_lease()
        number[0] = worker.run.open_segment(
            cause=cause_of(worker),
            start={
                "step": worker.step,
                "tokens_seen": worker.tokens_seen,
                "from": point.url or "fresh weights",
                "data_position": worker.step * worker.config.training.batch_sequences,
            },
            plan={
                "world_size": worker.world_size,
                "peak_learning_rate": worker.config.schedule.peak_learning_rate,
                "learning_rate_scale": worker.course.learning_rate_scale,
                "rewarm_tokens": worker.course.rewarm_tokens,
                "optimizer_moments": "restored" if worker.step and point.with_moments else "fresh",
                "data": "continued, with stretches skipped" if worker.course.skips else "continued",
                "recovery": worker.recovery_number,
                "startup_seconds": round(time.time() - worker.asked_for, 3),
                "startup_phases": worker.startup_phases,
            },
        )
    elif worker.rank == 0:
        newest = worker.run.newest_segment()
        number[0] = newest["segment"] if newest else 0
    dist.broadcast_object_list(number, src=0)
    return number[0]


def cause_of(worker: Worker) -> str:
    """Why the segment begins: a recovery that no segment began with yet, or what the driver started the gang for."""
    recovery, newest = worker.recovery, worker.run.newest_segment()
    if recovery is not None and (newest is None or newest["plan"].get("recovery", 0) < recovery.number):
        return f"recovery {recovery.number}"
    return worker.task.cause
