"""A study's folder: a trunk per seed with its annealing branches, arms of later stages, spiking runs, and step records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.lease import Lease
from cluster.storage import Store, open_store
from configs.load import load_config
from configs.schema import Config
from configs.study import StageConfig, Start, StudyConfig
from pipelines.anneal import branch_name
from pipelines.stages import Stage
from tasks.checkpoints.run_folder import RunFolder
from tasks.merging.selection import WindowRule

STAGES: dict[str, Stage] = {"continued": "continue-training", "sft": "sft"}
"""Section of a study to the command that its arms are."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where a study lies and what it consists of."""

    url: str
    """Its folder."""
    config: StudyConfig
    """What was asked for."""
    lease: Lease | None = None
    """Of the driver that is at work."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """What steps before have measured, by step."""

    @property
    def store(self) -> Store:
        """Where step records go."""
        return open_store(self.url)

    def trunk_config(self, seed: int) -> Config:
        """Configuration of the trunk of ``seed``."""
        return load_config(self.config.base, (*self.config.overrides, f"seed={seed}")).config

    def trunk(self, seed: int) -> RunFolder:
        """Pre-training at constant learning rate."""
        return RunFolder(f"{self.store.url}/seed-{seed}")

    def last_branch(self, seed: int) -> RunFolder:
        """The annealing branch that ends with the trunk."""
        return self.trunk(seed).branch(branch_name(self.config.forks[-1]))

    def stage_config(self, stage: StageConfig, number: int, seed: int) -> Config:
        """Configuration of the ``number``-th arm of ``stage``."""
        arm = stage.arms[number]
        return load_config(stage.config, (*stage.overrides, *arm.overrides, f"seed={seed}")).config

    def stage_run(self, kind: str, arm: str, seed: int) -> RunFolder:
        """One arm of continued training or SFT."""
        return RunFolder(f"{self.store.url}/{kind}/{arm}-seed-{seed}")

    def start_url(self, start: Start, seed: int) -> str:
        """The weights that an arm begins with, of the trunk of ``seed`` or of its last anneal, at their end."""
        if start in ("raw", "annealed"):
            run = self.trunk(seed) if start == "raw" else self.last_branch(seed)
            return run.snapshots()[-1].url
        if start == "merged":
            return f"{self.trunk(seed).url}/merged/{self.trunk_rule(seed).output_name(self.last_step(seed))}"
        return f"{self.last_branch(seed).url}/merged/{self.inside_rule(seed).output_name(self.last_step(seed))}"

    def last_step(self, seed: int) -> int:
        """At which trunk and last anneal end."""
        return self.trunk_config(seed).training.total_steps

    def trunk_rule(self, seed: int) -> WindowRule:
        """The scheduled merge of the trunk."""
        config = self.trunk_config(seed)
        return WindowRule(
            method=config.merge.method,
            count=config.merge.count,
            interval_tokens=config.merge_interval_tokens,
            alpha=config.merge.alpha if config.merge.method == "ema" else None,
        )

    def inside_rule(self, seed: int) -> WindowRule:
        """The merge inside the anneal."""
        interval = self.trunk_config(seed).snapshots.interval_tokens
        return WindowRule(method="sma", count=self.config.inside_count, interval_tokens=interval, alpha=None)
