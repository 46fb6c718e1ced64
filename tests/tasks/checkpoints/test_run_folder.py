"""A run as its URL shows it: one identity, committed snapshots only, segments in order."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.data import DataConfig
from configs.errors import UserError
from configs.merging import MergeConfig
from configs.schema import Config
from tasks.checkpoints.manifest import MANIFEST_KEY, Manifest
from tasks.checkpoints.run_folder import RunFolder, snapshot_key
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.start_point import StartPoint

CONFIG = Config(name="x")
START = StartPoint(url="/other/snapshots/step-000000100", digest="d", step=100, tokens_seen=204_800)


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


# Identity


def test_begin_new_run_and_again_is_the_same_run(run: RunFolder) -> None:
    first = run.begin(CONFIG)
    assert run.begin(CONFIG) == first == run.identity()
    assert (first.config, first.start) == (CONFIG, None)


def test_begin_keeps_start_point_and_configuration(run: RunFolder) -> None:
    config = dataclasses.replace(CONFIG, data=DataConfig(sources=("a", "b")), merge=MergeConfig(method="ema"))
    run.begin(config, START)
    assert (run.identity().config, run.identity().start) == (config, START)


def test_begin_other_configuration_refused_field_by_field(run: RunFolder) -> None:
    before = run.begin(CONFIG)
    other = dataclasses.replace(CONFIG, seed=2, merge=MergeConfig(count=4))
    with pytest.raises(UserError) as caught:
        run.begin(other)
    assert "  seed: run has 1, asked for 2" in str(caught.value)
    assert "  merge.count: run has 10, asked for 4" in str(caught.value)
    assert str(caught.value).count("run has") == 2
    assert run.identity() == before


def test_begin_other_start_refused(run: RunFolder) -> None:
    run.begin(CONFIG, START)
    with pytest.raises(UserError, match="start: run has"):
        run.begin(CONFIG, dataclasses.replace(START, step=200))
    with pytest.raises(UserError, match="start: run has"):
        run.begin(CONFIG)


def test_begin_other_execution_is_the_same_run(run: RunFolder) -> None:
    first = run.begin(CONFIG)
    moved = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, num_workers=4), notes="moved")
    assert run.begin(moved).run_id == first.run_id


def test_identity_no_run_refused_with_its_url(run: RunFolder) -> None:
    with pytest.raises(UserError, match="holds no run"):
        run.identity()


# Snapshots and merged checkpoints


def commit_at(run: RunFolder, commit_snapshot: Callable[..., Manifest], folder: str, step: int) -> Manifest:
    return commit_snapshot(run.store.child(folder), {"a": torch.full((2,), float(step))}, step=step)


def test_snapshots_committed_ones_by_step(run: RunFolder, commit_snapshot: Callable[..., Manifest]) -> None:
    manifests = {step: commit_at(run, commit_snapshot, snapshot_key(step), step) for step in (200, 1000, 90)}
    run.store.put(f"{snapshot_key(300)}/model-00001-of-00001.safetensors", b"half")
    found = run.snapshots()
    assert [item.step for item in found] == [90, 200, 1000]
    assert [item.manifest for item in found] == [manifests[90], manifests[200], manifests[1000]]
    assert found[0].url == f"{run.url}/snapshots/step-000000090"


def test_snapshots_committed_later_show_up(run: RunFolder, commit_snapshot: Callable[..., Manifest]) -> None:
    assert run.snapshots() == []
    commit_at(run, commit_snapshot, snapshot_key(1), 1)
    assert [item.step for item in run.snapshots()] == [1]
    commit_at(run, commit_snapshot, snapshot_key(2), 2)
    assert [item.step for item in run.snapshots()] == [1, 2]


def test_snapshots_damaged_manifest_is_named(run: RunFolder) -> None:
    run.store.put(f"{snapshot_key(1)}/{MANIFEST_KEY}", b"{")
    with pytest.raises(CheckpointError, match=snapshot_key(1)):
        run.snapshots()


def test_merged_committed_ones_by_name(run: RunFolder, commit_snapshot: Callable[..., Manifest]) -> None:
    manifest = commit_at(run, commit_snapshot, "merged/sma-n3", 3)
    run.store.put("merged/unfinished/receipts/attempt", b"")
    assert run.merged() == {"sma-n3": manifest}


def test_branches_are_runs_of_their_own(run: RunFolder) -> None:
    run.begin(CONFIG)
    branch = run.branch("anneal-100")
    branch.begin(dataclasses.replace(CONFIG, seed=2), START)
    assert run.branches() == ["anneal-100"]
    assert (branch.identity().config.seed, run.identity().config.seed) == (2, 1)


# Segments


def test_segments_are_numbered_and_closed(run: RunFolder) -> None:
    plan: dict[str, Any] = {"total_steps": 10}
    assert run.open_segment(cause="start", start={"step": 0}, plan=plan) == 1
    run.close_segment(1, reason="finished", step=10)
    assert run.open_segment(cause="resume", start={"step": 10}, plan=plan) == 2
    first, second = run.segments()
    assert (first["segment"], first["cause"], first["end"]["reason"], first["end"]["step"]) == (
        1,
        "start",
        "finished",
        10,
    )
    assert (second["segment"], second["start"], second["end"]) == (2, {"step": 10}, None)


def test_segments_one_left_open_is_closed_as_interrupted(run: RunFolder) -> None:
    run.open_segment(cause="start", start={"step": 0}, plan={})
    run.open_segment(cause="resume", start={"step": 7}, plan={})
    assert (run.segments()[0]["end"]["reason"], run.segments()[0]["end"]["step"]) == ("interrupted", 7)


def test_segments_beyond_nine_stay_in_order(run: RunFolder) -> None:
    for number in range(1, 12):
        run.open_segment(cause="resume", start={"step": number}, plan={})
    assert [item["segment"] for item in run.segments()] == list(range(1, 12))


def test_run_json_is_readable_by_others(run: RunFolder) -> None:
    run.begin(CONFIG)
    values = json.loads(run.store.read("run.json"))
    assert values["config"]["training"]["batch_tokens"] == CONFIG.training.batch_tokens
    assert {"run_id", "config", "code_version", "created"} <= set(values)
