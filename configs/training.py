"""Size of a run and its gang, optimizer, learning rate and snapshots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from configs.fields import execution, require


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Size of the run and of the gang that trains it."""

    total_tokens: int = 8_192_000
    """Tokens seen when the run ends."""
    num_workers: int = execution(2)
    """Workers of the gang; may change between segments of a run."""
    min_workers: int | None = execution(None)
    """Fewest workers to go on with after nodes were lost, growing again later; null waits for ``num_workers``."""
    collective_timeout_seconds: float = execution(120.0)
    """How long a rank waits for the others before the gang is given up and the silent rank named."""
    sequence_length: int = 128
    """Tokens S of one training sequence."""
    batch_tokens: int = 2048
    """Tokens of one global batch, over all workers."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward; master weights and moments are float32 always."""
    max_gradient_norm: float | None = 1.0
    """Global gradient-norm clip; null turns clipping off."""
    fsdp_unit: Literal["model", "layer"] = execution("layer")
    """What FSDP2 gathers at once: each layer (large models) or the whole model (tiny ones)."""
    device: Literal["auto", "cpu", "cuda"] = execution("auto")
    """Where workers compute: ``cuda`` (NCCL), ``cpu`` (gloo), or ``auto``: CUDA where a worker sees a GPU."""
    data_parallel_replicas: int = execution(1)
    """Whole copies of the model, each sharded over workers / replicas of them (hybrid sharding); 1 is plain FSDP."""
    expert_parallel: int = execution(1)
    """Workers that share out the experts of a layer and send each other tokens; 1 keeps every expert under FSDP alone."""
    micro_batches: int = execution(1)
    """Forward and backward passes of one worker per optimizer step; more of them need less memory for activations."""
    reduce_each_micro_batch: bool = execution(False)
    """Reduce gradients after every micro batch (memory of one FSDP unit) or once a step (fewer bytes over the network,
    but whole gradients on every worker)."""
    activation_checkpointing: Literal["none", "layer"] = execution("none")
    """``layer`` keeps a layer's input alone and computes the layer again in the backward pass."""
    compile: bool = execution(False)
    """Compile each layer with torch.compile; the first steps take minutes on large models."""
    log_interval_steps: int = execution(10)
    """Steps between router-health measurements; loss and gradient norm are logged for every step."""
    max_restarts: int = execution(3)
    """How often a gang that lost a worker is started again before the run fails."""

    def __post_init__(self) -> None:
        require(self.num_workers >= 1, "training.num_workers", self.num_workers, "at least 1")
        require(self.sequence_length >= 2, "training.sequence_length", self.sequence_length, "at least 2")
        require(
            self.batch_tokens > 0 and self.batch_tokens % self.sequence_length == 0,
            "training.batch_tokens",
            self.batch_tokens,
            f"a multiple of training.sequence_length={self.sequence_length}",
        )
        require(
            self.batch_sequences % self.num_workers == 0,
            "training.num_workers",
            self.num_workers,
            f"it must divide the {self.batch_sequences} sequences of a batch "
            "(training.batch_tokens / training.sequence_length)",
        )
        require(
            self.total_tokens > 0 and self.total_tokens % self.batch_tokens == 0,
            "training.total_tokens",
            self.total_tokens,
            f"a multiple of training.batch_tokens={self.batch_tokens}",
        )
        require(
            self.max_gradient_norm is None or self.max_gradient_norm > 0,
            "training.max_gradient_norm",
            self.max_gradient_norm,
            "a positive number, or null for no clipping",
        )
        for name in ("data_parallel_replicas", "expert_parallel", "micro_batches"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        require(
            self.min_workers is None or 1 <= self.min_workers <= self.num_workers,
            "training.min_workers",
            self.min_workers,
            f"between 1 and training.num_workers={self.num_workers}, or null",
        )
        require(
            1 <= self.collective_timeout_seconds < math.inf,
            "training.collective_timeout_seconds",
            self.collective_timeout_seconds,
            "at least 1",
        )
        require(self.log_interval_steps >= 1, "training.log_interval_steps", self.log_interval_steps, "at least 1")
        require(self.max_restarts >= 0, "training.max_restarts", self.max_restarts, "0 or more")

    @property
    def batch_sequences(self) -> int:
        """Sequences of one global batch."""
        return self.batch_tokens // self.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.total_tokens // self.batch_tokens


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019) on float32 master weights."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors (norms, biases) are not decayed."""
    guard: Literal["none", "skip-step", "zclip"] = "none"
    """What is done about an unusual update: ``skip-step`` refuses it (OLMo-core), ``zclip`` clips it (arXiv 2504.02507)."""
    guard_window_steps: int = 128
    """Steps whose losses and gradient norms ``skip-step`` compares with; OLMo-core's default."""
    guard_sigma: float = 6.0
    """Standard deviations from which ``skip-step`` refuses an update; OLMo-core's default."""
    zclip_decay: float = 0.97
    """Decay of ``zclip``'s mean and variance, the paper's alpha."""
    zclip_threshold: float = 2.5
    """z-score from which ``zclip`` clips; the paper's default."""
    zclip_warmup_steps: int = 25
    """Steps whose gradient norms give ``zclip`` its first mean and variance; the paper's default."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "zclip_decay"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "in [0, 1)")
        for name in ("guard_sigma", "zclip_threshold"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"optimizer.{name}", value, "a positive number")
        for name in ("guard_window_steps", "zclip_warmup_steps"):
            require(getattr(self, name) >= 2, f"optimizer.{name}", getattr(self, name), "at least 2 steps")
        require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "a positive number")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warmup-stable-decay learning rate, measured in tokens."""

    peak_learning_rate: float = 3e-3
    """Learning rate of the stable phase."""
    warmup_tokens: int = 204_800
    """Tokens of linear warmup from 0."""
    decay_tokens: int = 0
    """Tokens of decay at the end of the run; 0 keeps the stable phase to the end."""
    decay_shape: Literal["cosine", "linear", "1-sqrt"] = "cosine"
    """Curve of the decay."""
    final_learning_rate_fraction: float = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak."""

    def __post_init__(self) -> None:
        require(
            0 < self.peak_learning_rate < math.inf, "schedule.peak_learning_rate", self.peak_learning_rate, "above 0"
        )
        require(self.warmup_tokens >= 0, "schedule.warmup_tokens", self.warmup_tokens, "0 or more")
        require(self.decay_tokens >= 0, "schedule.decay_tokens", self.decay_tokens, "0 or more")
        require(
            0 <= self.final_learning_rate_fraction <= 1,
            "schedule.final_learning_rate_fraction",
            self.final_learning_rate_fraction,
            "between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """When a checkpoint is published."""

    interval_tokens: int = 102_400
    """Tokens between snapshots; the last step of a run is always published."""
    ephemeral_seconds: float | None = execution(None)
    """Seconds of wall clock after which a further, ephemeral snapshot is taken in between, to resume from alone; null: none."""

    def __post_init__(self) -> None:
        seconds = self.ephemeral_seconds
        require(
            seconds is None or 0 < seconds < math.inf,
            "snapshots.ephemeral_seconds",
            seconds,
            "a positive number of seconds, or null",
        )
