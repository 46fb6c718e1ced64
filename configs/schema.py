"""The typed schema of a run: all sections, and the checks across them."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.data import DataConfig
from configs.fields import execution, require
from configs.merging import MergeConfig, RetentionConfig
from configs.model import ModelConfig
from configs.recovery import DrillConfig, RecoveryConfig
from configs.sections import AnnealConfig, ClusterConfig, EvaluationConfig, TrackingConfig
from configs.training import OptimizerConfig, ScheduleConfig, SnapshotConfig, TrainingConfig
from configs.workload import WorkloadConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run of pmaflow, fully resolved."""

    name: str = ""
    """Short name; the default run folder is ``runs/<name>``."""
    notes: str = execution("")
    """Where the numbers come from: the paper's, or ours."""
    seed: int = 1
    """Decides initial weights, data order and every other draw."""
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    """What is trained, if it is not a language model."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the network."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus and split."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Size of run and gang."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate."""
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    """When checkpoints are published."""
    merge: MergeConfig = field(default_factory=MergeConfig)
    """Merges on schedule."""
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    """What `pma gc` may remove."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """What is done about a loss spike."""
    drill: DrillConfig = field(default_factory=DrillConfig)
    """Faults made on purpose."""
    anneal: AnnealConfig = field(default_factory=AnnealConfig)
    """Annealing branch."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out loss."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Ray."""

    def __post_init__(self) -> None:
        self._check_identity()
        self._check_workload()
        self._check_schedule()
        self._check_windows()

    def _check_identity(self) -> None:
        require(
            bool(self.name) and all(c.isalnum() or c in "._-" for c in self.name),
            "name",
            self.name,
            "letters, digits, '.', '_' and '-' only, at least one",
        )
        require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2**32 - 1")
        if self.data.tokenizer == "bytes":
            require(self.model.vocab_size >= 256, "model.vocab_size", self.model.vocab_size, "bytes need at least 256")

    def _check_workload(self) -> None:
        """What only language models have is refused beside another workload, not ignored."""
        if self.workload.is_language_model:
            return
        for key, value, without in (
            ("training.expert_parallel", self.training.expert_parallel, 1),
            ("training.activation_checkpointing", self.training.activation_checkpointing, "none"),
            ("training.compile", self.training.compile, False),
            ("drill.poison", self.drill.poison, "none"),
        ):
            require(value == without, key, value, f"{without!r} beside workload.entry: language models alone have that")

    def _check_schedule(self) -> None:
        total = self.training.total_tokens
        require(
            self.schedule.warmup_tokens + self.schedule.decay_tokens <= total,
            "schedule.decay_tokens",
            self.schedule.decay_tokens,
            f"warmup ({self.schedule.warmup_tokens}) and decay together must fit training.total_tokens={total}",
        )
        batch = self.training.batch_tokens
        for key, value in (
            ("snapshots.interval_tokens", self.snapshots.interval_tokens),
            ("anneal.tokens", self.anneal.tokens),
        ):
            require(value > 0 and value % batch == 0, key, value, f"a multiple of training.batch_tokens={batch}")
        require(
            self.snapshots.interval_tokens <= total,
            "snapshots.interval_tokens",
            self.snapshots.interval_tokens,
            f"at most training.total_tokens={total}",
        )

    def _check_windows(self) -> None:
        interval = self.merge_interval_tokens
        require(
            interval > 0 and interval % self.snapshots.interval_tokens == 0,
            "merge.interval_tokens",
            interval,
            f"a multiple of snapshots.interval_tokens={self.snapshots.interval_tokens}",
        )
        for number, row in enumerate(self.merge.schedule):
            require(
                (row.interval_tokens or 0) % self.snapshots.interval_tokens == 0,
                f"merge.schedule[{number}].interval_tokens",
                row.interval_tokens,
                f"a multiple of snapshots.interval_tokens={self.snapshots.interval_tokens}, or null",
            )
        require(
            self.evaluation.slice_tokens % self.training.sequence_length == 0,
            "evaluation.slice_tokens",
            self.evaluation.slice_tokens,
            f"a multiple of training.sequence_length={self.training.sequence_length}",
        )

    @property
    def merge_interval_tokens(self) -> int:
        """The paper's V, with its default applied."""
        return self.snapshots.interval_tokens if self.merge.interval_tokens is None else self.merge.interval_tokens
