"""Stages from every kind of checkpoint, and a stage that meets a loss spike of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_gang import train
from short_run import NAN_AT_45, small
from stage_arms import ask, losses, make_parent, plain_copy, weights_of

from pipelines.adopt import adopt
from pipelines.driven import Driven
from pipelines.export import export
from pipelines.gc import gc
from pipelines.initial import begin_with
from pipelines.plan import plan
from pipelines.stages import StageRequest, plan_stage
from pipelines.units import evaluation_units, snapshot_units
from tasks.checkpoints.digest import content_digest
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.run_folder import RunFolder


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_parent(tmp_path_factory.mktemp("sources") / "parent")


@pytest.fixture(scope="module")
def first_losses(parent: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the stage that begins with the parent's own last snapshot."""
    (pair,) = ask(tmp_path_factory.mktemp("expected"), parent.snapshots()[-1].url)
    train(pair.init.run, pair.init.config)
    return losses(pair.init.run)


@pytest.mark.parametrize("kind", ["hf", "dcp", "adopted hf", "adopted dcp"])
def test_stage_from_a_foreign_checkpoint_trains_as_from_the_snapshot_itself(
    kind: str, parent: RunFolder, first_losses: list[float], tmp_path: Path
) -> None:
    snapshot = parent.snapshots()[-1].url
    format_ = "dcp" if kind.endswith("dcp") else "hf"
    init = str(tmp_path / "foreign-7")
    if format_ == "hf":
        plain_copy(snapshot, Path(init))
    else:
        export(snapshot, init, format_="dcp", dtype=None, max_shard=None, workers="local")
    if kind.startswith("adopted"):
        done = adopt(str(tmp_path / "adopted"), f"{tmp_path}/foreign-{{step}}", format_=format_, tokens_per_step=128)  # type: ignore[arg-type]
        init = done["adopted"][0]["url"]
    (pair,) = ask(tmp_path, init)
    assert pair.init.start.digest == parent.snapshots()[-1].digest
    train(pair.init.run, pair.init.config)
    assert losses(pair.init.run) == first_losses


def test_digest_of_a_folder_without_a_manifest_is_the_content_digest(parent: RunFolder, tmp_path: Path) -> None:
    manifest = open_checkpoint(parent.snapshots()[0].url).manifest
    assert manifest is not None
    (pair,) = ask(tmp_path, plain_copy(parent.snapshots()[0].url, tmp_path / "foreign"))
    assert pair.init.start.digest == content_digest(manifest.model_tensors())


def test_spike_in_a_stage_is_answered_with_its_own_snapshots(parent: RunFolder, tmp_path: Path) -> None:
    config = small("seed=7", *NAN_AT_45)
    request = StageRequest(stage="continue-training", init=parent.snapshots()[-1].url)
    (pair,) = plan_stage(RunFolder(str(tmp_path / "stage")), config, request)
    begin_with(pair.init)
    run = pair.init.run
    train(run, config)
    assert run.snapshots()[-1].step == 80
    (recovery,) = run.recoveries()
    assert recovery.start.url.startswith(f"{run.url}/")
    assert not recovery.start.weights_only
    merged = open_checkpoint(recovery.start.url).manifest
    assert merged is not None
    assert merged.merge is not None
    assert all(item.url.startswith(f"{run.url}/snapshots/") for item in merged.merge.inputs)


def test_plan_counts_the_stage_from_zero_and_lists_further_arms(parent: RunFolder, tmp_path: Path) -> None:
    early, late = parent.snapshots()[0].url, parent.snapshots()[-1].url
    (pair,) = ask(tmp_path, late, early)
    driven = Driven(run=pair.init.run, config=pair.init.config, start=pair.init.start)
    assert [unit.name for unit in snapshot_units(driven)] == ["step-000000010", "step-000000020"]
    names = [unit.name for unit in evaluation_units(driven)]
    assert names[-1] == "init"
    steps = plan("continue-training", pair.init.config, pair.init.run.url)["steps"]
    assert [(row["step"], row["state"]) for row in steps][::3] == [("train", "due"), ("control/train", "due")]
    assert len(steps) == 6


def test_gc_of_a_stage_keeps_nothing_of_the_other_run_and_that_run_nothing_of_its_branches(
    parent: RunFolder, tmp_path: Path
) -> None:
    (pair,) = ask(tmp_path, parent.snapshots()[-1].url, parent.snapshots()[0].url)
    train(pair.init.run, pair.init.config)
    rows = gc(pair.init.run.url, apply=False, overrides=("retention.keep_last=1", "recovery.policy=ignore"))["rows"]
    assert [(row["step"], row["action"]) for row in rows] == [(10, "delete"), (20, "keep")]
    assert weights_of(parent.snapshots()[0].url)
