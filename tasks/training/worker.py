"""One worker's life: find where to go on, train, publish snapshots, journal. Every rank runs this.

The gang gets nothing but names (URLs, a lease token); it decides by itself, from committed manifests,
where the run stands, so a gang that is started again simply continues.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cluster.journal import JournalWriter
from cluster.lease import check_token
from configs.load import config_from_dict
from configs.schema import Config
from tasks.checkpoints.reader import Checkpoint, open_checkpoint
from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder, RunIdentity
from tasks.data.batches import rank_batch
from tasks.data.corpus import Corpus, read_corpus
from tasks.training.rank_state import restore_rank
from tasks.training.router_health import expert_counts, load_balance_loss, router_metrics
from tasks.training.schedule import step_learning_rate
from tasks.training.sharded_model import ShardedModel, build_sharded_model
from tasks.training.snapshot import LossWindow, publish_snapshot


@dataclass(frozen=True, kw_only=True)
class SegmentTask:
    """What a gang is told; plain values, so that it travels to any worker."""

    run_url: str
    """The run to continue."""
    config: dict[str, Any]
    """Its resolved configuration."""
    lease_token: str
    """Token of the driver's lease; publishing is refused once it changed."""
    cause: str
    """Why this gang was started: ``start``, ``resume``, ``worker lost``."""
    launched: float
    """Unix seconds when the driver asked for the gang, to account for its start-up."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Measured on one step; equal on every rank."""

    loss: float
    """Mean cross-entropy in nats per token, without the load-balance loss."""
    gradient_norm: float
    """Global norm before clipping."""
    expert_counts: torch.Tensor | None
    """Global tokens per expert ``[L, E]`` on steps that measure router health."""


class Worker:
    """State of one rank during a segment."""

    def __init__(self, task: SegmentTask) -> None:
        self.task = task
        self.config: Config = config_from_dict(task.config)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.run = RunFolder(task.run_url)
        self.identity: RunIdentity = self.run.identity()
        self.corpus: Corpus = read_corpus(self.config.data, "train")
        self.model: ShardedModel = build_sharded_model(self.config, self.rank, self.world_size)
        self.step = 0

    def restore(self) -> str:
        """Load the newest committed snapshot of the run, else its start point; returns what was found.

        Rank 0 decides and tells the others, so that all ranks take the same one.
        """
        choice: list[str | None] = [self._newest_url() if self.rank == 0 else None]
        dist.broadcast_object_list(choice, src=0)
        if choice[0] is None:
            return "fresh weights"
        checkpoint: Checkpoint = open_checkpoint(choice[0])
        assert checkpoint.manifest is not None and checkpoint.manifest.step is not None
        self.step = checkpoint.manifest.step
        restore_rank(self.model, checkpoint, with_moments=True, optimizer_steps=self.step)
        return checkpoint.url

    def train_step(self) -> StepResult:
        """One optimizer step over the global batch."""
        training = self.config.training
        torch.manual_seed(self._fold_seed())
        tokens_BS = self._batch()
        outputs = self.model.network(input_ids=tokens_BS[:, :-1], use_cache=False)
        loss = torch.nn.functional.cross_entropy(outputs.logits.float().flatten(0, 1), tokens_BS[:, 1:].flatten())
        objective = loss
        if self.config.model.is_moe and self.config.model.router_loss_coefficient:
            balance = load_balance_loss(outputs.router_logits, self.config.model.num_experts_per_token)
            objective = loss + self.config.model.router_loss_coefficient * balance
        torch.autograd.backward(objective)
        norm = self.model.gradient_norm()
        if training.max_gradient_norm is not None:
            self.model.clip_gradients(training.max_gradient_norm, norm)
        self.step += 1
        self.model.step(step_learning_rate(self.config, self.step))
        mean_loss = loss.detach() / self.world_size
        dist.all_reduce(mean_loss)
        return StepResult(loss=float(mean_loss), gradient_norm=float(norm), expert_counts=self._count_experts(outputs))

    @property
    def tokens_seen(self) -> int:
        """Tokens of all completed steps."""
        return self.step * self.config.training.batch_tokens

    @property
    def is_done(self) -> bool:
        """Whether the run has seen all its tokens."""
        return self.step >= self.config.training.total_steps

    def is_snapshot_due(self) -> bool:
        """Whether the step just completed is to be published."""
        return self.is_done or self.tokens_seen % self.config.snapshots.interval_tokens == 0

    def check_lease(self) -> None:
        """Fail closed if another driver has taken the run over."""
        check_token(self.run.store, RUN_LEASE, self.task.lease_token)

    def _newest_url(self) -> str | None:
        snapshots = self.run.snapshots()
        if snapshots:
            return snapshots[-1].url
        return self.identity.start.url if self.identity.start else None

    def _batch(self) -> torch.Tensor:
        training = self.config.training
        rows = rank_batch(
            self.corpus.tokens,
            seed=self.config.seed,
            step=self.step,
            batch_sequences=training.batch_sequences,
            sequence_length=training.sequence_length,
            rank=self.rank,
            world_size=self.world_size,
        )
        return torch.from_numpy(rows)

    def _fold_seed(self) -> int:
        # Random draws are a function of (seed, step, rank), so they need no saved generator state.
        return ((self.config.seed * 1_000_003 + self.step) * 65_537 + self.rank) % 2**63

    def _count_experts(self, outputs: Any) -> torch.Tensor | None:
        if not self.config.model.is_moe or self.step % self.config.training.log_interval_steps:
            return None
        counts_LE = torch.stack(
            [
                expert_counts(logits.detach(), self.config.model.num_experts_per_token)
                for logits in outputs.router_logits
            ]
        )
        dist.all_reduce(counts_LE)
        return counts_LE


def train_segment(task: SegmentTask) -> dict[str, Any]:
    """Train until the run has seen its tokens; returns where it ended."""
    worker = Worker(task)
    source = worker.restore()
    segment = _open_segment(worker, source)
    journal = JournalWriter(worker.run.store, segment) if worker.rank == 0 else None
    window = LossWindow()
    step_started = time.perf_counter()
    while not worker.is_done:
        result = worker.train_step()
        window.add(result.loss, result.gradient_norm)
        seconds = time.perf_counter() - step_started
        step_started = time.perf_counter()
        metrics = _step_metrics(worker, result, seconds)
        if worker.is_snapshot_due():
            metrics["snapshot/seconds"] = publish_snapshot(worker, window, segment)
            window = LossWindow()
            step_started = time.perf_counter()
        if journal:
            journal.log(worker.step, worker.tokens_seen, metrics)
    if journal:
        journal.flush()
        worker.run.close_segment(segment, reason="completed", step=worker.step)
    dist.barrier()
    return {"step": worker.step, "tokens_seen": worker.tokens_seen, "segment": segment}


def _open_segment(worker: Worker, source: str) -> int:
    number = [0]
    if worker.rank == 0 and not worker.is_done:
        worker.check_lease()
        number[0] = worker.run.open_segment(
            cause=worker.task.cause,
            start={
                "step": worker.step,
                "tokens_seen": worker.tokens_seen,
                "from": source,
                "data_position": worker.step * worker.config.training.batch_sequences,
            },
            plan={
                "world_size": worker.world_size,
                "peak_learning_rate": worker.config.schedule.peak_learning_rate,
                "optimizer_moments": "restored" if worker.step else "fresh",
                "data": "continued",
                "startup_seconds": round(time.time() - worker.task.launched, 3),
            },
        )
    elif worker.rank == 0:
        number[0] = len(worker.run.segments())
    dist.broadcast_object_list(number, src=0)
    return number[0]


def _step_metrics(worker: Worker, result: StepResult, seconds: float) -> dict[str, float]:
    metrics = {
        "train/loss": result.loss,
        "train/gradient_norm": result.gradient_norm,
        "train/learning_rate": step_learning_rate(worker.config, worker.step),
        "train/tokens_per_second": worker.config.training.batch_tokens / max(seconds, 1e-9),
    }
    if result.expert_counts is not None:
        metrics |= router_metrics(result.expert_counts)
    return {name: value if math.isfinite(value) else math.nan for name, value in metrics.items()}
