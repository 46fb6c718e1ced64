"""One segment of training, as every rank runs it: find where to go on, train, publish snapshots, journal, watch.

The gang gets nothing but names (URLs, a lease token); it decides by itself, from committed manifests and recoveries,
where the run stands, so a gang that is started again simply continues.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch.distributed as dist

from cluster.journal import JournalWriter, write_event
from tasks.recovery.record import alarm_fields
from tasks.recovery.rule import Alarm
from tasks.training.resume import ResumePoint
from tasks.training.router_health import router_metrics
from tasks.training.schedule import step_learning_rate
from tasks.training.signals import Signals
from tasks.training.snapshot import LossWindow, publish_snapshot
from tasks.training.spike_watch import SpikeWatch
from tasks.training.worker import SegmentTask, StepResult, Worker


def train_segment(task: SegmentTask) -> dict[str, Any]:
    """Train until the run has seen its tokens, or a spike is found; returns where and why it ended."""
    worker = Worker(task)
    point = worker.restore()
    segment = _open_segment(worker, point)
    scribe = Scribe(worker, segment) if worker.rank == 0 else None
    window = LossWindow()
    signals = Signals(has_alarm=scribe is not None and scribe.watch.alarm is not None)
    step_started = time.perf_counter()
    while not worker.is_done:
        result = worker.train_step(signals)
        if result.signals.has_alarm:
            break
        window.add(result.loss, result.gradient_norm)
        seconds = time.perf_counter() - step_started
        step_started = time.perf_counter()
        if scribe:
            signals = Signals(has_alarm=scribe.note(result, seconds) is not None)
        if worker.is_snapshot_due():
            if scribe:
                # What was measured up to a snapshot is on record before it: whoever resumes there watches on from it.
                scribe.journal.flush()
            publish_snapshot(worker, window, segment)
            window = LossWindow()
            step_started = time.perf_counter()
    reason = scribe.close() if scribe else ""
    dist.barrier()
    return {"step": worker.step, "tokens_seen": worker.tokens_seen, "segment": segment, "reason": reason}


class Scribe:
    """Rank 0's records of a segment: the journal, the watch for spikes, and how it ended."""

    def __init__(self, worker: Worker, segment: int) -> None:
        self.worker = worker
        self.segment = segment
        self.journal = JournalWriter(worker.run.store, segment)
        self.watch = SpikeWatch(worker.run.store, worker.config, worker.recovery, worker.step)

    def note(self, result: StepResult, seconds: float) -> Alarm | None:
        """Journal a step; the alarm, once there is one."""
        self.journal.log(self.worker.step, self.worker.tokens_seen, step_metrics(self.worker, result, seconds))
        return self.watch.observe(self.worker.step, result.loss, result.gradient_norm)

    def close(self) -> str:
        """Put on record why the segment ended; returns that."""
        self.journal.flush()
        alarm = self.watch.alarm
        if alarm is None or self.worker.is_done:
            self.worker.run.close_segment(self.segment, reason="completed", step=self.worker.step)
            return "completed"
        fields = alarm_fields(alarm)
        self.worker.run.close_segment(self.segment, reason="spike", step=alarm.alarm_step, alarm=fields)
        details = {"segment": self.segment, "step": alarm.alarm_step, "reason": alarm.reason, "alarm": fields}
        write_event(self.worker.run.store, "spike", details)
        return "spike"


def step_metrics(worker: Worker, result: StepResult, seconds: float) -> dict[str, float]:
    """What is journalled of a step."""
    metrics = {
        "train/loss": result.loss,
        "train/gradient_norm": result.gradient_norm,
        "train/learning_rate": step_learning_rate(worker.config, worker.step, worker.recovery),
        "train/tokens_per_second": worker.config.training.batch_tokens / max(seconds, 1e-9),
    }
    if not result.is_applied:
        metrics["train/skipped_steps"] = 1.0
    if result.expert_counts is not None:
        metrics |= router_metrics(result.expert_counts)
    return {name: value if math.isfinite(value) else math.nan for name, value in metrics.items()}


def _open_segment(worker: Worker, point: ResumePoint) -> int:
    number = [0]
    if worker.rank == 0 and not worker.is_done:
        worker.check_lease()
        recovery = worker.recovery
        number[0] = worker.run.open_segment(
            cause=worker.task.cause,
            start={
                "step": worker.step,
                "tokens_seen": worker.tokens_seen,
                "from": point.url or "fresh weights",
                "data_position": worker.step * worker.config.training.batch_sequences,
            },
            plan={
                "world_size": worker.world_size,
                "peak_learning_rate": worker.config.schedule.peak_learning_rate,
                "learning_rate_scale": recovery.learning_rate_scale if recovery else 1.0,
                "rewarm_tokens": recovery.rewarm_tokens if recovery else 0,
                "optimizer_moments": "restored" if worker.step and point.with_moments else "fresh",
                "data": "continued" if recovery is None or not recovery.skips else "continued, with stretches skipped",
                "recovery": worker.recovery_number,
                "startup_seconds": round(time.time() - worker.task.launched, 3),
            },
        )
    elif worker.rank == 0:
        number[0] = len(worker.run.segments())
    dist.broadcast_object_list(number, src=0)
    return number[0]
