"""One rank of a gang: restore the newest state, and make optimizer steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.lease import check_token
from configs.load import config_from_dict
from configs.schema import Config
from tasks.checkpoints.course import AS_CONFIGURED, course_of, read_course
from tasks.checkpoints.manifest import LossStatistics
from tasks.checkpoints.reader import Checkpoint, open_checkpoint
from tasks.checkpoints.recoveries import Recovery
from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder, RunIdentity
from tasks.checkpoints.tied import without_tied
from tasks.data.batch import Batch
from tasks.data.prefetch import Prefetcher
from tasks.data.sequences import Stream
from tasks.data.skips import skip_to
from tasks.training.drill import corrupt, is_corruption_due, poison
from tasks.training.initial_weights import require_same_weights
from tasks.training.rank_zero import told_by_rank_zero
from tasks.training.resume import ResumePoint, find_resume_point, read_scalars
from tasks.training.roll_call import RollCall
from tasks.training.router_balance import RouterBalance
from tasks.training.schedule import step_learning_rate
from tasks.training.sharding.rank_state import restore_rank
from tasks.training.sharding.sharded_model import ShardedModel, build_sharded_model
from tasks.training.signals import Signals, share_signals
from tasks.training.state import build_scalars, read_parameter_steps
from tasks.training.step_guard import build_guard
from tasks.workload import Batches, ForwardPass, Rows, Workload, files_of, open_workload


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
    entered: float = 0.0
    """Unix seconds when the rank's process began with it; 0 where that is not known."""
    answers_spikes: bool = False
    """Whether the driver decides recoveries while the gang waits."""
    request_key: str = ""
    """Object below the run that appears once the driver wants something; empty for never."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Measured on one step; equal on every rank."""

    loss: float
    """The workload's: of language models the mean cross-entropy in nats per token, without the load-balance loss."""
    gradient_norm: float
    """Global norm before clipping."""
    is_applied: bool
    """Whether the guard let the optimizer step."""
    expert_counts: torch.Tensor | None
    """Global tokens per expert ``[L, E]``, of each layer that has experts; None for a dense network."""
    signals: Signals
    """What any rank had to say."""


class Worker:
    """State of one rank during a segment."""

    def __init__(self, task: SegmentTask, roll_call: RollCall) -> None:
        self.task = task
        self.roll_call = roll_call
        self.asked_for = task.launched
        self.startup_phases: dict[str, float] = {}
        if task.entered:
            self.startup_phases["ray_train_seconds"] = round(task.entered - task.launched, 3)
            self.startup_phases["import_seconds"] = round(time.time() - task.entered, 3)
        started = time.perf_counter()
        self.config: Config = config_from_dict(task.config)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.run = RunFolder(task.run_url)
        self.identity: RunIdentity = self.run.identity()
        self.workload: Workload = open_workload(self.config)
        self.stream: Batches = self.workload.batches(self.config, "train")
        self.prefetcher: Prefetcher | None = None
        self.files = files_of(self.config) if self.rank == 0 else {}
        self.model: ShardedModel = build_sharded_model(self.config, self.rank, self.world_size, self.workload)
        self.balance = RouterBalance(self.model.network, self.config.model)
        self.guard = build_guard(self.config.optimizer)
        self.recovery: Recovery | None = None
        self.course = AS_CONFIGURED
        self.num_restores = 0
        self.carried: LossStatistics | None = None
        self.step = 0
        self.optimizer_steps = 0
        self.startup_phases["build_seconds"] = round(time.perf_counter() - started, 3)

    def restore(self) -> ResumePoint:
        """Load the newest committed snapshot of the run, else its start point; returns what was found."""
        started = time.perf_counter()
        point = self._restore_state()
        self.close()
        self.prefetcher = Prefetcher(
            self.stream,
            first_step=self.step,
            end_step=self.config.training.total_steps,
            batch_sequences=self.config.training.batch_sequences,
            rank=self.rank,
            world_size=self.world_size,
            skips=self.course.skips,
        )
        self.startup_phases["restore_seconds"] = round(time.perf_counter() - started, 3)
        return point

    def close(self) -> None:
        """End what reads beside training."""
        if self.prefetcher is not None:
            self.prefetcher.close()

    def _restore_state(self) -> ResumePoint:
        self.num_restores += 1
        point = told_by_rank_zero(f"resume/{self.num_restores}", lambda: find_resume_point(self.run))
        self.recovery = point.recovery
        self.course = course_of(point.recovery) if point.recovery else AS_CONFIGURED
        # A gang that goes on after a spike has all of these from before it.
        self.model.optimizer.state.clear()
        self.guard = build_guard(self.config.optimizer)
        if point.url is None:
            return point
        checkpoint: Checkpoint = open_checkpoint(point.url)
        if point.initial is not None:
            key = f"initial/{self.num_restores}"
            require_same_weights(checkpoint, point.initial, self.rank, self.world_size, key)
            self.step, self.optimizer_steps, self.carried = 0, 0, None
            restore_rank(self.model, without_tied(checkpoint), with_moments=False)
            return point
        assert checkpoint.manifest is not None and checkpoint.manifest.step is not None
        scalars = read_scalars(checkpoint)
        if point.recovery is None:
            # A branch keeps what recoveries changed in the run that it was forked from.
            self.course = read_course(scalars)
        self.step = checkpoint.manifest.step
        self.carried = checkpoint.manifest.loss if checkpoint.manifest.ephemeral else None
        self.optimizer_steps = int(scalars["optimizer"]["steps"]) if point.with_moments else 0
        steps = read_parameter_steps(scalars, (item.name for item in self.model.slices))
        restore_rank(self.model, checkpoint, with_moments=point.with_moments, parameter_steps=steps)
        guard = scalars.get("guard", {})
        # A fork may have another guard than its run, which begins afresh.
        if guard.get("guard") == self.config.optimizer.guard:
            self.guard.restore(guard)
        return point

    def train_step(self, signals: Signals) -> StepResult:
        """One optimizer step over the global batch; ``signals`` are told to all ranks on the way."""
        torch.manual_seed(self._fold_seed())
        self._strike()
        self.roll_call.note(self.step, "reading data")
        batch = self._batch()
        self.roll_call.note(self.step, "in forward and backward")
        loss_share = self._forward_and_backward(batch) / self.world_size
        norm = self.model.gradient_norm()
        mean_loss, heard = share_signals(loss_share, signals)
        decision = self.guard.observe(mean_loss, float(norm))
        self.step += 1
        if decision.apply:
            limits = [x for x in (self.config.training.max_gradient_norm, decision.max_norm) if x is not None]
            if limits:
                self.model.clip_gradients(min(limits), norm)
            self.model.step(step_learning_rate(self.config, self.step, self.course))
            self.optimizer_steps += 1
        else:
            self.model.drop_gradients()
        return StepResult(
            loss=mean_loss,
            gradient_norm=float(norm),
            is_applied=decision.apply,
            expert_counts=self.balance.finish_step(is_applied=decision.apply),
            signals=heard,
        )

    @property
    def tokens_seen(self) -> int:
        """Tokens of all completed steps."""
        return self.step * self.config.training.batch_tokens

    @property
    def recovery_number(self) -> int:
        """Recoveries in force."""
        return self.recovery.number if self.recovery else 0

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

    def scalars(self) -> dict[str, Any]:
        """Content of ``state.json`` at the step just completed."""
        return build_scalars(
            self.config,
            step=self.step,
            corpus_digest=self.stream.digest,
            optimizer_steps=self.optimizer_steps,
            # Of a language model every parameter is in every loss.
            parameter_steps={} if self.config.workload.is_language_model else self.model.parameter_steps(),
            guard=self.guard.state(),
            recovery=self.recovery,
            course=self.course,
        )

    def _forward_and_backward(self, batch: Rows) -> torch.Tensor:
        """Gradients of this rank's sequences; its loss, whose mean over ranks is the global batch's."""
        count = self.config.training.micro_batches
        this = ForwardPass(
            config=self.config,
            step=self.step,
            micro_batches=count,
            world_size=self.world_size,
            weight=self._weigh(batch),
            device=self.model.device,
        )
        total = torch.zeros((), device=self.model.device)
        for rows in self.model.micro_batches(torch.arange(len(batch)), count):
            part = batch.rows(int(rows[0]), int(rows[-1]) + 1)
            loss = self.workload.loss(self.model.network, part, this)
            objective = loss + self.balance.loss(num_sequences=len(rows)) / count
            torch.autograd.backward(objective)
            total += loss.detach()
        return total

    def _weigh(self, batch: Rows) -> float | None:
        """What the global batch counts for; None where all its sequences count alike."""
        own = batch.weight
        if own is None:
            return None
        weight = torch.tensor(own, device=self.model.device)
        dist.all_reduce(weight)
        return float(weight)

    def _batch(self) -> Rows:
        """The rank's rows of the global batch, after the drill had its way with them."""
        assert self.prefetcher is not None
        batch = self.prefetcher.take(self.step)
        drill = self.config.drill
        if drill.poison == "none":
            return batch
        assert isinstance(batch, Batch) and isinstance(self.stream, Stream), "refused for other workloads"
        first = self.step * self.config.training.batch_sequences + self.rank * len(batch.tokens_BS1)
        positions = skip_to(np.arange(first, first + len(batch.tokens_BS1), dtype=np.int64), self.course.skips)
        poisoned = poison(
            torch.from_numpy(batch.tokens_BS1),
            positions,
            drill,
            vocab_size=self.config.model.vocab_size,
            seed=self.config.seed,
        )
        return self.stream.replace_tokens(batch, poisoned.numpy())

    def _strike(self) -> None:
        """The drill's silent corruption, if this is the step for it."""
        drill = self.config.drill
        if is_corruption_due(
            drill, step=self.step, recoveries=self.recovery_number, rank=self.rank, world_size=self.world_size
        ):
            parameters = [(item.name, item.local) for item in self.model.slices]
            corrupt(parameters, self.model.optimizer, drill, rank=self.rank, seed=self.config.seed)

    def _fold_seed(self) -> int:
        # Random draws are a function of (seed, step, rank), so they need no saved generator state.
        return ((self.config.seed * 1_000_003 + self.step) * 65_537 + self.rank) % 2**63
