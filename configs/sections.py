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

NEWEST_ALIAS = "pma-latest"
"""Alias of the newest registered version of a model."""


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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What weights and arithmetic are in; losses are summed in float64 either way."""
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
    champion_alias: str | None = execution("champion")
    """Alias of the registered version whose held-out loss is proven lowest (``docs/tracking.md``); null: nothing is promoted."""
    champion_margin_errors: float = execution(1.0)
    """Standard errors, paired over held-out slices, by which a version must beat the champion to take its place."""

    def __post_init__(self) -> None:
        if self.uri is not None:
            require_no_credentials(self.uri, "tracking.uri")
        require(
            self.champion_alias is None
            or (
                re.fullmatch(r"[\w-]{1,255}", self.champion_alias) is not None
                and re.fullmatch(r"(?i:latest)|[vV]\d+", self.champion_alias) is None
                and self.champion_alias != NEWEST_ALIAS
            ),
            "tracking.champion_alias",
            self.champion_alias,
            f"letters, digits, '_' and '-', not latest, {NEWEST_ALIAS} or v1, which mean something else; or null",
        )
        require(
            0 <= self.champion_margin_errors < math.inf,
            "tracking.champion_margin_errors",
            self.champion_margin_errors,
            "a number from 0 on",
        )


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
