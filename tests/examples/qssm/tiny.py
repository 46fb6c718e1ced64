"""The example's configuration with a circuit of 4 qubits and 30 steps: seconds in one process."""

from __future__ import annotations

from configs.load import load_config
from configs.schema import Config
from tests.conftest import ROOT

TINY = (
    "workload.options.qubits=4", "workload.options.joint_fraction=0.3", "training.total_tokens=7680",
    "training.sequence_length=32", "training.batch_tokens=256", "training.num_workers=1",
    "schedule.warmup_tokens=0", "snapshots.interval_tokens=1280", "merge.count=3", "anneal.tokens=1280",
    "evaluation.slice_tokens=32",
)  # fmt: skip


def tiny(*overrides: str) -> Config:
    """``examples/qssm/ghz.yaml``, made small."""
    return load_config(str(ROOT / "examples/qssm/ghz.yaml"), (*TINY, *overrides)).config
