"""The sections of a configuration: every key, its unit, its default and the checks within a section.

Values are frozen; to change one use ``dataclasses.replace``. Fields marked ``execution()`` say how a
run is carried out (hosts, workers, tracking), never which bytes it makes: they may differ between
two invocations of the same run.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from configs.fields import execution, require
from configs.urls import require_no_credentials

MOE_FAMILIES = ("qwen3_moe",)
DENSE_FAMILIES = ("llama", "qwen3")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the network; built from `transformers` configuration classes by family name."""

    family: Literal["qwen3_moe", "llama", "qwen3"] = "qwen3_moe"
    """Architecture: ``qwen3_moe`` (mixture of experts), ``llama`` or ``qwen3`` (dense)."""
    vocab_size: int = 256
    """Number of token ids; 256 for the byte-level vocabulary."""
    hidden_size: int = 64
    """Width D of the residual stream."""
    num_layers: int = 2
    """Number of transformer layers L."""
    num_attention_heads: int = 4
    """Query heads N."""
    num_key_value_heads: int = 2
    """Key and value heads; divides ``num_attention_heads``."""
    head_size: int = 16
    """Width H of one attention head."""
    intermediate_size: int = 128
    """Hidden width of a dense feed-forward layer (unused by layers that are mixtures of experts)."""
    num_experts: int = 8
    """Experts E per layer; 0 for dense families."""
    num_experts_per_token: int = 2
    """Experts K that the router picks for a token (top-k)."""
    expert_intermediate_size: int = 64
    """Hidden width F of one expert."""
    router_loss_coefficient: float = 0.01
    """Weight of the load-balance loss in the training loss; 0 turns it off."""
    tie_embeddings: bool = False
    """Share the embedding matrix with the output head."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMS norms."""
    initializer_range: float = 0.02
    """Standard deviation of the normal distribution that weights start from."""
    experts_implementation: Literal["eager", "grouped_mm"] = "grouped_mm"
    """How transformers computes experts; both give the same function."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_layers", "num_attention_heads", "head_size", "intermediate_size",
            "expert_intermediate_size", "rope_theta", "norm_epsilon", "initializer_range",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"model.{name}", value, "needs a positive number")
        require(
            self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads == 0,
            "model.num_key_value_heads",
            self.num_key_value_heads,
            f"it must divide model.num_attention_heads={self.num_attention_heads}",
        )
        if self.family in MOE_FAMILIES:
            require(self.num_experts >= 2, "model.num_experts", self.num_experts, f"{self.family} needs at least 2")
            require(
                1 <= self.num_experts_per_token <= self.num_experts,
                "model.num_experts_per_token",
                self.num_experts_per_token,
                f"between 1 and model.num_experts={self.num_experts}",
            )
        else:
            require(self.num_experts == 0, "model.num_experts", self.num_experts, f"{self.family} is dense: use 0")
        require(
            self.router_loss_coefficient >= 0,
            "model.router_loss_coefficient",
            self.router_loss_coefficient,
            "needs 0 or more",
        )

    @property
    def is_moe(self) -> bool:
        """Whether layers hold experts and a router."""
        return self.family in MOE_FAMILIES


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it is split."""

    sources: tuple[str, ...] = ("python://stdlib",)
    """fsspec URLs, folders or globs of text files; ``python://stdlib`` is this interpreter's own library sources."""
    tokenizer: Literal["bytes"] = "bytes"
    """Vocabulary: ``bytes`` maps each byte of UTF-8 text to its value."""
    held_out_fraction: float = 0.05
    """Share of files, chosen by a hash of their path, that training never sees."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources", list(self.sources), "name at least one URL")
        for source in self.sources:
            require_no_credentials(source, "data.sources")
        require(
            0 < self.held_out_fraction < 1,
            "data.held_out_fraction",
            self.held_out_fraction,
            "a fraction between 0 and 1, both excluded",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Size of the run and of the gang that trains it."""

    total_tokens: int = 8_192_000
    """Tokens seen when the run ends."""
    num_workers: int = execution(2)
    """Workers of the gang; may change between segments of a run."""
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

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "in [0, 1)")
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


@dataclass(frozen=True, kw_only=True)
class AnnealConfig:
    """The annealing branch that the demo forks from the stable phase."""

    tokens: int = 2_048_000
    """Token budget of the branch; it ends where the trunk ends if forked that much earlier."""
    shape: Literal["cosine", "linear", "1-sqrt"] = "cosine"
    """Curve of the branch's decay."""
    final_learning_rate_fraction: float = 0.0
    """Learning rate at the end of the branch, as a fraction of the peak."""

    def __post_init__(self) -> None:
        require(self.tokens > 0, "anneal.tokens", self.tokens, "a positive number")
        require(
            0 <= self.final_learning_rate_fraction <= 1,
            "anneal.final_learning_rate_fraction",
            self.final_learning_rate_fraction,
            "between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss of snapshots and merged checkpoints."""

    slice_tokens: int = 32_768
    """Tokens of one held-out slice."""
    num_slices: int = 3
    """Disjoint slices; their spread is the noise that a gain is held against."""
    batch_sequences: int = execution(32)
    """Sequences of one forward pass."""
    while_training: bool = execution(True)
    """Evaluate snapshots and merges beside training; false leaves it to the end of the run."""

    def __post_init__(self) -> None:
        for name in ("slice_tokens", "num_slices", "batch_sequences"):
            require(getattr(self, name) > 0, f"evaluation.{name}", getattr(self, name), "a positive number")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow; a run never depends on it."""

    uri: str | None = execution(None)
    """Tracking URI; null keeps a sqlite database in the run folder (local runs only)."""
    experiment: str = execution("pmaflow")
    """MLflow experiment name."""
    registered_model: str | None = execution(None)
    """Registered model that receives merged checkpoints; null means ``pmaflow-<config name>``."""

    def __post_init__(self) -> None:
        if self.uri is not None:
            require_no_credentials(self.uri, "tracking.uri")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the work runs."""

    address: str | None = execution(None)
    """Ray address of a running cluster; null joins ``RAY_ADDRESS`` or starts Ray on this machine."""
    train_nodes: str | None = execution(None)
    """Label of the nodes that training workers run on, such as ``pool=train``; null means any."""
    merge_nodes: str | None = execution(None)
    """Label of the nodes that merges and evaluations run on, such as ``pool=merge``; null means any."""

    def __post_init__(self) -> None:
        for key in ("train_nodes", "merge_nodes"):
            value = getattr(self, key)
            require(
                value is None or re.fullmatch(r"[\w./-]+=[\w.-]+", value) is not None,
                f"cluster.{key}",
                value,
                "a label as key=value, or null",
            )
