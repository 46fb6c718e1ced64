"""Stages whose arms train in this process, from the snapshots of one small run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cluster.journal import read_journal
from configs.load import config_to_dict
from configs.schema import Config
from pipelines.initial import begin_with
from pipelines.scheduled import unevaluated
from pipelines.stages import Pair, StageRequest, plan_stage
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import EvaluationTask, evaluate_checkpoints
from tests.local_gang import train
from tests.short_run import begin, small

SHORT = ("training.total_tokens=2560", "seed=7")
"""20 steps with a snapshot every 10."""


def make_parent(folder: Path) -> RunFolder:
    """A run of 40 steps on the data of another seed, with a snapshot every 10, to take weights from."""
    run, config = begin(folder, "training.total_tokens=5120")
    train(run, config)
    return run


def ask(
    tmp_path: Path, init: str, control: str | None = None, *overrides: str, seeds: tuple[int, ...] = ()
) -> list[Pair]:
    """The arms of a stage below ``tmp_path``, put on record and not trained."""
    request = StageRequest(stage="continue-training", init=init, control=control, seeds=seeds)
    pairs = plan_stage(RunFolder(str(tmp_path / "stage")), small(*SHORT, *overrides), request)
    for pair in pairs:
        for arm in pair.arms:
            begin_with(arm)
    return pairs


def losses(run: RunFolder) -> list[float]:
    """Training loss by step."""
    return [row.metrics["train/loss"] for row in read_journal(run.store) if "train/loss" in row.metrics]


def plain_copy(snapshot: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """The weights of a snapshot as a foreign Hugging Face folder: one file, no manifest."""
    folder.mkdir()
    tensors = {}
    for file in sorted(Path(snapshot).glob("model*.safetensors")):
        tensors |= load_file(file)
    save_file(
        {name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    shutil.copy(Path(snapshot) / "config.json", folder)
    return str(folder)


def weights_of(url: str) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(url).glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def evaluate(run: RunFolder, config: Config) -> None:
    """Evaluate, in this process, what a driver would evaluate beside training."""
    task = EvaluationTask(
        run_url=run.url,
        config=config_to_dict(config),
        urls=tuple(unevaluated(run, config)),
        start=run.identity().start,
    )
    evaluate_checkpoints(task)
