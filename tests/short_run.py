"""A run of 80 steps with a snapshot every 10: as small as a run with a spike can be."""

from __future__ import annotations

from pathlib import Path

from configs.load import load_config
from configs.schema import Config
from tasks.checkpoints.run_folder import RunFolder

SMALL = (
    "model.hidden_size=32", "model.num_experts=4", "model.expert_intermediate_size=32", "model.num_layers=1",
    "training.sequence_length=32", "training.batch_tokens=128", "training.total_tokens=10240",
    "training.num_workers=1", "schedule.warmup_tokens=1280", "snapshots.interval_tokens=1280", "anneal.tokens=1280",
    "evaluation.slice_tokens=1024", "data.sources=['tests/*.py']", "data.held_out_fraction=0.2",
)  # fmt: skip
NAN_AT_45 = ("drill.corruption=nan-weights", "drill.corruption_step=45")


def small(*overrides: str) -> Config:
    """The demo's configuration, made small."""
    return load_config("tiny", (*SMALL, *overrides)).config


def begin(folder: Path, *overrides: str) -> tuple[RunFolder, Config]:
    """A run that is there and has not been trained."""
    run, config = RunFolder(str(folder)), small(*overrides)
    run.begin(config)
    return run, config
