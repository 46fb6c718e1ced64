"""Runs elsewhere that begin with a checkpoint of a run, on record where retention looks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cluster.errors import StorageDenied
from cluster.storage_local import LocalStore
from tasks.checkpoints.dependents import Dependent, read_dependents, reasons_of_dependents, register_dependent
from tasks.checkpoints.ephemeral import drop_ephemeral
from tasks.checkpoints.run_folder import RunFolder
from tasks.checkpoints.start_point import StartPoint
from tests.retention_run import commit, make_run, snapshot_url


def start_at(url: str, digest: str = "d") -> StartPoint:
    return StartPoint(url=url, digest=digest, step=0, tokens_seen=0, weights_only=True)


def test_run_is_on_record_once_however_often_it_begins(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"), range(1, 4))
    for _ in range(2):
        register_dependent(start_at(snapshot_url(store, 2)), str(tmp_path / "stage"))
    expected = Dependent(run=f"{tmp_path}/stage", checkpoint="snapshots/step-000000002", digest="d")
    assert read_dependents(store) == [expected]
    register_dependent(start_at(snapshot_url(store, 2)), str(tmp_path / "other"))
    reasons = reasons_of_dependents(read_dependents(store))
    assert {folder: sorted(why) for folder, why in reasons.items()} == {
        "snapshots/step-000000002": [f"start of {tmp_path}/other", f"start of {tmp_path}/stage"]
    }


@pytest.mark.parametrize("place", ["folder/model", "elsewhere/snapshots/step-000000001"])
def test_checkpoint_that_lies_in_no_run_is_left_alone(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(parents=True)
    register_dependent(start_at(str(tmp_path / place)), str(tmp_path / "stage"))
    assert not list(tmp_path.rglob("dependents"))


def test_run_that_may_only_be_read_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_run(str(tmp_path / "run"), (1,))

    def refuse(*_: object) -> None:
        raise StorageDenied("no write access")

    monkeypatch.setattr(LocalStore, "create", refuse)
    with caplog.at_level(logging.WARNING):
        register_dependent(start_at(snapshot_url(store, 1)), str(tmp_path / "stage"))
    assert (
        f"retention of {store.url} will not know that {tmp_path}/stage begins with snapshots/step-000000001"
        in caplog.text
    )
    assert read_dependents(store) == []


def test_ephemeral_snapshot_that_a_run_elsewhere_began_with_stays(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"), ())
    for step, ephemeral in ((1, True), (2, True), (3, False)):
        commit(store, step, ephemeral=ephemeral)
    register_dependent(start_at(snapshot_url(store, 1)), str(tmp_path / "stage"))
    assert drop_ephemeral(RunFolder(store.url)) == ["snapshots/step-000000002"]
