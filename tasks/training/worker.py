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
from tasks.checkpoints.manifest import LossStatistics
from tasks.checkpoints.reader import Checkpoint, open_checkpoint
from tasks.checkpoints.recoveries import Recovery
from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder, RunIdentity
from tasks.data.batches import num_windows, read_windows, window_indices
from tasks.data.corpus import Corpus, read_corpus
from tasks.data.skips import skip_to
from tasks.training.drill import corrupt, poison
from tasks.training.rank_state import restore_rank
from tasks.training.resume import ResumePoint, agree_on_resume_point, read_scalars
from tasks.training.roll_call import RollCall
from tasks.training.router_health import expert_counts, load_balance_loss
from tasks.training.schedule import step_learning_rate
from tasks.training.sharded_model import ShardedModel, build_sharded_model
from tasks.training.signals import Signals, share_signals
from tasks.training.state import build_scalars
from tasks.training.step_guard import build_guard


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
    """Mean cross-entropy in nats per token, without the load-balance loss."""
    gradient_norm: float
    """Global norm before clipping."""
    is_applied: bool
    """Whether the guard let the optimizer step."""
    expert_counts: torch.Tensor | None
    """Global tokens per expert ``[L, E]`` on steps that measure router health."""
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
        self.corpus: Corpus = read_corpus(self.config.data, "train")
        self.model: ShardedModel = build_sharded_model(self.config, self.rank, self.world_size)
        self.guard = build_guard(self.config.optimizer)
        self.recovery: Recovery | None = None
        self.carried: LossStatistics | None = None
        self.step = 0
        self.optimizer_steps = 0
        self.startup_phases["build_seconds"] = round(time.perf_counter() - started, 3)

    def restore(self) -> ResumePoint:
        """Load the newest committed snapshot of the run, else its start point; returns what was found."""
        started = time.perf_counter()
        point = agree_on_resume_point(self.run, self.rank)
        self.recovery = point.recovery
        # A gang that goes on after a spike has all of these from before it.
        self.model.optimizer.state.clear()
        self.guard = build_guard(self.config.optimizer)
        if point.url is None:
            return point
        checkpoint: Checkpoint = open_checkpoint(point.url)
        assert checkpoint.manifest is not None and checkpoint.manifest.step is not None
        scalars = read_scalars(checkpoint)
        self.step = checkpoint.manifest.step
        self.carried = checkpoint.manifest.loss if checkpoint.manifest.ephemeral else None
        self.optimizer_steps = int(scalars["optimizer"]["steps"]) if point.with_moments else 0
        restore_rank(self.model, checkpoint, with_moments=point.with_moments, optimizer_steps=self.optimizer_steps)
        if guard := scalars.get("guard"):
            self.guard.restore(guard)
        self.startup_phases["restore_seconds"] = round(time.perf_counter() - started, 3)
        return point

    def train_step(self, signals: Signals) -> StepResult:
        """One optimizer step over the global batch; ``signals`` are told to all ranks on the way."""
        training = self.config.training
        torch.manual_seed(self._fold_seed())
        self._strike()
        self.roll_call.note(self.step, "reading data")
        tokens_BS = self._batch()
        self.roll_call.note(self.step, "in forward and backward")
        outputs = self.model.network(input_ids=tokens_BS[:, :-1], use_cache=False)
        loss = torch.nn.functional.cross_entropy(outputs.logits.float().flatten(0, 1), tokens_BS[:, 1:].flatten())
        objective = loss
        if self.config.model.is_moe and self.config.model.router_loss_coefficient:
            balance = load_balance_loss(outputs.router_logits, self.config.model.num_experts_per_token)
            objective = loss + self.config.model.router_loss_coefficient * balance
        torch.autograd.backward(objective)
        norm = self.model.gradient_norm()
        mean_loss, heard = share_signals(loss.detach() / self.world_size, signals)
        decision = self.guard.observe(mean_loss, float(norm))
        limits = [limit for limit in (training.max_gradient_norm, decision.max_norm) if limit is not None]
        self.step += 1
        if decision.apply:
            if limits:
                self.model.clip_gradients(min(limits), norm)
            self.model.step(step_learning_rate(self.config, self.step, self.recovery))
            self.optimizer_steps += 1
        else:
            self.model.network.zero_grad(set_to_none=True)
        return StepResult(
            loss=mean_loss,
            gradient_norm=float(norm),
            is_applied=decision.apply,
            expert_counts=self._count_experts(outputs),
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
            corpus_digest=self.corpus.digest,
            optimizer_steps=self.optimizer_steps,
            guard=self.guard.state(),
            recovery=self.recovery,
        )

    def _batch(self) -> torch.Tensor:
        training = self.config.training
        share = training.batch_sequences // self.world_size
        first = self.step * training.batch_sequences + self.rank * share
        skips = self.recovery.skips if self.recovery else ()
        positions = skip_to(np.arange(first, first + share, dtype=np.int64), skips)
        windows = np.concatenate(
            [
                window_indices(
                    seed=self.config.seed,
                    first_sequence=int(position),
                    count=1,
                    windows=num_windows(len(self.corpus.tokens), training.sequence_length),
                )
                for position in positions
            ]
        )
        tokens_BS = torch.from_numpy(read_windows(self.corpus.tokens, windows, training.sequence_length))
        return poison(
            tokens_BS, positions, self.config.drill, vocab_size=self.config.model.vocab_size, seed=self.config.seed
        )

    def _strike(self) -> None:
        """The drill's silent corruption, if this is the step for it."""
        drill = self.config.drill
        if drill.corruption == "none" or self.recovery is not None or self.step != drill.corruption_step:
            return
        if self.rank == drill.corruption_rank % self.world_size:
            parameters = [(item.name, item.local) for item in self.model.slices]
            corrupt(parameters, self.model.optimizer, drill, rank=self.rank, seed=self.config.seed)

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
