"""Rank 0's records of a segment: the journal, the watch for spikes, requests of the driver, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cluster.journal import JournalWriter, write_event
from tasks.recovery.record import alarm_fields
from tasks.training.requests import RequestWatch
from tasks.training.router_health import router_metrics
from tasks.training.schedule import step_learning_rate
from tasks.training.spike_watch import SpikeWatch
from tasks.training.worker import StepResult, Worker


class Scribe:
    """Writes down what one segment does."""

    def __init__(self, worker: Worker, segment: int) -> None:
        self.worker = worker
        self.segment = segment
        self.journal = JournalWriter(worker.run.store, segment)
        self.watch = SpikeWatch(worker.run.store, worker.config, worker.recovery, worker.step)
        self.requests = RequestWatch(worker.run.store, worker.task.request_key)
        self.pending: dict[str, float] = {}
        """Metrics for the next line of the journal."""

    def note(self, result: StepResult, seconds: float, snapshot: Mapping[str, float]) -> None:
        """Journal a step and show it to the watch; ``snapshot`` are metrics of one that was committed since the last."""
        metrics = {**step_metrics(self.worker, result, seconds), **self.pending, **snapshot}
        self.pending = {}
        self.journal.log(self.worker.step, self.worker.tokens_seen, metrics)
        self.watch.observe(self.worker.step, result.loss, result.gradient_norm)

    def close(self, reason: str, snapshot: Mapping[str, float]) -> None:
        """Put on record why the segment ended."""
        self.requests.end()
        if last := {**self.pending, **snapshot}:
            self.journal.log(self.worker.step, self.worker.tokens_seen, last)
        self.journal.flush()
        alarm = self.watch.alarm
        if reason != "spike" or alarm is None:
            self.worker.run.close_segment(self.segment, reason=reason, step=self.worker.step)
            return
        fields = alarm_fields(alarm)
        self.worker.run.close_segment(self.segment, reason=reason, step=alarm.alarm_step, alarm=fields)
        details = {"segment": self.segment, "step": alarm.alarm_step, "reason": alarm.reason, "alarm": fields}
        write_event(self.worker.run.store, "spike", details)


def step_metrics(worker: Worker, result: StepResult, seconds: float) -> dict[str, float]:
    """What is journalled of a step."""
    metrics = {
        "train/loss": result.loss,
        "train/gradient_norm": result.gradient_norm,
        "train/learning_rate": step_learning_rate(worker.config, worker.step, worker.course),
        "train/tokens_per_second": worker.config.training.batch_tokens / max(seconds, 1e-9),
    }
    if not result.is_applied:
        metrics["train/skipped_steps"] = 1.0
    if result.expert_counts is not None and worker.step % worker.config.training.log_interval_steps == 0:
        metrics |= router_metrics(result.expert_counts, worker.balance.layers)
    return {name: value if math.isfinite(value) else math.nan for name, value in metrics.items()}
