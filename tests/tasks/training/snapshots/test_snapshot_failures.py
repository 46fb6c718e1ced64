"""Snapshots that fail: never a manifest, and the same error on every rank; ranks are threads here."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from cluster.errors import LeaseExpired, LeaseLost, StorageDenied, StorageError, StorageFull
from cluster.storage import open_store
from tasks.checkpoints.run_folder import RunFolder, snapshot_key
from tasks.training.snapshots import flight as snapshot_flight
from tasks.training.snapshots.board import Outcome, SnapshotBoard
from tasks.training.snapshots.flight import SnapshotFailed, Terms
from tasks.training.snapshots.share import HostShare
from tasks.training.snapshots.writer import SnapshotWriter
from tests.snapshot_parts import (
    PATIENCE_SECONDS,
    Gang,
    Gate,
    contents,
    facts_at,
    healthy,
    lease_in_force,
    no_streams,
    share_of,
)


def test_rank_that_cannot_write_fails_every_rank_naming_itself_place_and_cause(tmp_path: Path) -> None:
    gang = Gang(str(tmp_path), healthy, lambda method, key: method == "complete" and "state-" in key)
    gang.begin(1)
    errors = gang.errors()
    assert [type(error) for error in errors] == [StorageError, StorageError]
    expected = (
        f"the snapshot of step 1 at {tmp_path}/snapshots/step-000000001 was not committed: rank 1 failed: StorageError: "
        f"{tmp_path}/snapshots/step-000000001/state-00002-of-00002.safetensors: complete failed on purpose"
    )
    assert [str(error) for error in errors] == [expected, expected]
    assert RunFolder(str(tmp_path)).snapshots() == []
    # It stays so: nobody goes on as if nothing had been.
    for writer in gang.writers:
        assert writer.has_failed
        assert dict(writer.poll()) == {}
        with pytest.raises(StorageError, match="rank 1 failed"):
            writer.wait()
        with pytest.raises(StorageError, match="rank 1 failed"):
            writer.begin(share_of(0, 2), facts_at(2))


def test_rank_hears_of_a_failure_while_its_own_upload_stands_still(tmp_path: Path) -> None:
    gate = Gate("write", "model-00001-of-00002.safetensors")
    gang = Gang(str(tmp_path), gate, no_streams)
    gang.begin(1)
    assert [str(error) for error in gang.errors()] == [str(gang.errors()[0])] * 2
    assert gate.is_reached.is_set()
    gate.is_open.set()


def test_upload_ends_once_the_snapshot_failed_elsewhere(tmp_path: Path) -> None:
    gate = Gate("create_stream", "model-00001-of-00002.safetensors")
    gang = Gang(str(tmp_path), gate, no_streams)
    gang.begin(1)
    gang.errors()
    gate.is_open.set()
    for thread in threading.enumerate():
        if thread.name.startswith("snapshot-"):
            thread.join(PATIENCE_SECONDS)
    assert open_store(str(tmp_path)).keys() == []


@pytest.mark.parametrize("kind", [StorageFull, StorageDenied])
def test_what_another_attempt_does_not_mend_is_not_tried_again(tmp_path: Path, kind: type[StorageError]) -> None:
    calls = []

    def fail(method: str, key: str) -> bool:
        if method == "create_stream":
            calls.append(key)
            raise kind("no")
        return False

    gang = Gang(str(tmp_path), healthy, fail)
    gang.begin(1)
    assert [type(error) for error in gang.errors()] == [kind, kind]
    assert len(calls) == 1


def test_outage_longer_than_the_retries_fails_after_the_last_of_them(tmp_path: Path) -> None:
    calls = []

    def fail(method: str, key: str) -> bool:
        calls.append(method)
        return True

    gang = Gang(str(tmp_path), fail, pauses_seconds=(0.0, 0.0))
    gang.begin(1)
    gang.errors()
    assert calls == ["create_stream"] * 3


@pytest.mark.parametrize("lost_at", [1, 2])
def test_lost_lease_publishes_nothing_and_every_rank_says_so(tmp_path: Path, lost_at: int) -> None:
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) >= lost_at:
            raise LeaseLost("taken over")

    gang = Gang(str(tmp_path), healthy, healthy, check_lease=check)
    gang.begin(1)
    assert [type(error) for error in gang.errors()] == [LeaseLost, LeaseLost]
    assert len(asked) == lost_at
    assert RunFolder(str(tmp_path)).snapshots() == []


class LeaseAt:
    """A lease that is expired when it is asked for the ``expired`` first times, and then ``after``."""

    def __init__(self, expired: int, after: type[Exception] | None) -> None:
        self.expired, self.after, self.asked = expired, after, 0

    def __call__(self) -> None:
        self.asked += 1
        if self.asked <= self.expired:
            raise LeaseExpired("not renewed")
        if self.after:
            raise self.after("taken over")


def test_lease_renewed_after_an_outage_lets_the_snapshot_be_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_flight, "LEASE_LOOK_SECONDS", 0.0)
    lease = LeaseAt(expired=5, after=None)
    gang = Gang(str(tmp_path), healthy, healthy, check_lease=lease)
    gang.begin(1)
    for writer in gang.writers:
        writer.finish()
    assert lease.asked == 5 + 2
    assert [s.step for s in RunFolder(str(tmp_path)).snapshots()] == [1]


def test_lease_taken_over_after_its_expiry_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_flight, "LEASE_LOOK_SECONDS", 0.0)
    lease = LeaseAt(expired=5, after=LeaseLost)
    gang = Gang(str(tmp_path), healthy, healthy, check_lease=lease)
    gang.begin(1)
    assert [type(error) for error in gang.errors()] == [LeaseLost, LeaseLost]
    assert lease.asked == 6
    assert RunFolder(str(tmp_path)).snapshots() == []


def test_lease_that_stays_expired_fails_when_patience_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_flight, "LEASE_LOOK_SECONDS", 0.01)
    lease = LeaseAt(expired=1_000_000, after=None)
    gang = Gang(str(tmp_path), healthy, healthy, check_lease=lease, patience_seconds=0.2)
    gang.begin(1)
    assert [type(error) for error in gang.errors()] == [LeaseExpired, LeaseExpired]
    assert lease.asked > 2
    assert RunFolder(str(tmp_path)).snapshots() == []


def test_other_content_that_is_committed_already_is_kept(tmp_path: Path) -> None:
    first, second = Gang(str(tmp_path), healthy), Gang(str(tmp_path), healthy)
    first.begin(1)
    first.writers[0].finish()
    before = contents(tmp_path / snapshot_key(1))
    second.writers[0].begin(share_of(5, 1, 1), facts_at(1))
    (error,) = second.errors()
    assert isinstance(error, SnapshotFailed)
    assert "CommitConflict" in str(error)
    after = contents(tmp_path / snapshot_key(1))
    assert {name: after[name] for name in before} == before


def test_same_content_that_is_committed_already_is_success(tmp_path: Path) -> None:
    for _ in range(2):
        gang = Gang(str(tmp_path), healthy, healthy)
        gang.begin(1)
        for writer in gang.writers:
            writer.finish()
    assert [s.step for s in RunFolder(str(tmp_path)).snapshots()] == [1]


def test_mistake_in_the_program_fails_every_rank(tmp_path: Path) -> None:
    gang = Gang(str(tmp_path), healthy, healthy)
    gang.writers[0].begin(share_of(0, 1), facts_at(1))
    odd = HostShare(number=2, of=2, model={"x": torch.zeros(2, dtype=torch.complex64)}, state={})
    gang.writers[1].begin(odd, facts_at(1))
    assert {(type(error), "rank 1 failed: KeyError" in str(error)) for error in gang.errors()} == {
        (SnapshotFailed, True)
    }


def test_rank_that_never_reports_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_flight, "LINGER_SECONDS", 0.5)
    gang = Gang(str(tmp_path), healthy, healthy, healthy, patience_seconds=0.1)
    for rank in (0, 1):
        gang.writers[rank].begin(share_of(rank, 1, 3), facts_at(1))
    error = Gang.error_of(gang.writers[0])
    assert "no word from ranks [2]" in str(error)
    assert str(Gang.error_of(gang.writers[1])) == str(error)
    assert RunFolder(str(tmp_path)).snapshots() == []


def test_board_that_is_gone_fails_the_snapshot(tmp_path: Path) -> None:
    class Gone(SnapshotBoard):
        def report(self, *_: Any) -> None:
            raise ConnectionError("rank 0 is gone")

        def settle(self, *_: Any) -> Any:
            raise ConnectionError("rank 0 is gone")

    terms = Terms(board=Gone(HashStore(), 1, 2), check_lease=lease_in_force)
    writer = SnapshotWriter(open_store(str(tmp_path)), terms)
    writer.begin(share_of(1, 1), facts_at(1))
    with pytest.raises(SnapshotFailed, match="rank 1 heard no outcome"):
        writer.finish()


def test_rank_that_looks_late_finds_the_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_flight, "LINGER_SECONDS", 0.05)
    may_look = threading.Event()

    class Late(SnapshotBoard):
        def outcome(self, number: int) -> Outcome | None:
            return super().outcome(number) if may_look.is_set() else None

    store = HashStore()
    boards = [SnapshotBoard(store, 0, 2), Late(store, 1, 2)]
    writers = [
        SnapshotWriter(open_store(str(tmp_path)), Terms(board=board, check_lease=lease_in_force)) for board in boards
    ]
    for rank, writer in enumerate(writers):
        writer.begin(share_of(rank, 1), facts_at(1))
    writers[0].finish()
    assert writers[1].is_busy
    may_look.set()
    assert writers[1].finish()["snapshot/bytes"] > 0


def test_board_holds_nothing_of_snapshots_that_are_over(tmp_path: Path) -> None:
    board = HashStore()
    terms = Terms(board=SnapshotBoard(board, 0, 1), check_lease=lease_in_force)
    writer = SnapshotWriter(open_store(str(tmp_path)), terms)
    before = board.num_keys()
    for step in (1, 2, 3):
        writer.begin(share_of(0, step, 1), facts_at(step))
    writer.finish()
    assert board.num_keys() == before
