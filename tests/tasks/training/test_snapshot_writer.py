"""Snapshots beside training, on real storage that fails and stands still where a test says; ranks are threads here."""

from __future__ import annotations

import gc
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from cluster.errors import LeaseLost, StorageDenied, StorageError, StorageFull
from cluster.storage import open_store
from tasks.checkpoints.manifest import read_manifest
from tasks.checkpoints.run_folder import RunFolder, snapshot_key
from tasks.merging.verify import verify_checkpoint
from tasks.training import snapshot_flight
from tasks.training.share import HostShare
from tasks.training.snapshot_board import Outcome, SnapshotBoard
from tasks.training.snapshot_flight import SnapshotFailed, Terms
from tasks.training.snapshot_writer import SnapshotWriter
from tests.faulty_proxy import faulty_proxy, seeded_faults
from tests.faulty_store import FaultyStore, Sometimes
from tests.snapshot_parts import WORLD_SIZE, facts_at, lease_in_force, share_of, written_synchronously

NO_PAUSE = (0.0,) * 7
PATIENCE_SECONDS = 60
"""Longer than any of this takes; what is waited for comes, or the test fails."""


def healthy(method: str, key: str) -> bool:
    return False


def no_streams(method: str, _key: str) -> bool:
    return method == "create_stream"


class Gate:
    """A ``fail`` that makes one call stand still until it is opened, and never fails."""

    def __init__(self, method: str, ending: str) -> None:
        self.method, self.ending = method, ending
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def __call__(self, method: str, key: str) -> bool:
        if method == self.method and key.endswith(self.ending):
            self.is_reached.set()
            assert self.is_open.wait(PATIENCE_SECONDS)
        return False


class Gang:
    """Ranks that share a run folder and a board, each with a store and a writer of its own."""

    def __init__(
        self,
        url: str,
        *fails: Callable[[str, str], bool],
        pauses_seconds: tuple[float, ...] = NO_PAUSE,
        patience_seconds: float = PATIENCE_SECONDS,
        check_lease: Callable[[], None] = lease_in_force,
        boards: Sequence[Any] = (),
    ) -> None:
        boards = boards or [HashStore()] * len(fails)
        self.stores = [FaultyStore(open_store(url), fail) for fail in fails]
        self.writers = [
            SnapshotWriter(
                store,
                Terms(
                    board=SnapshotBoard(boards[rank], rank, len(fails)),
                    check_lease=check_lease,
                    pauses_seconds=pauses_seconds,
                    patience_seconds=patience_seconds,
                ),
            )
            for rank, store in enumerate(self.stores)
        ]

    def begin(self, step: int, **fields: Any) -> None:
        for rank, writer in enumerate(self.writers):
            writer.begin(share_of(rank, step, len(self.writers)), facts_at(step, **fields))

    def errors(self) -> list[Exception]:
        """What every rank raises at the end; a rank that raises nothing fails the test."""
        return [self._error(writer) for writer in self.writers]

    @staticmethod
    def _error(writer: SnapshotWriter) -> Exception:
        with pytest.raises(Exception) as caught:
            writer.finish()
        return caught.value


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Committed


def test_snapshot_is_byte_for_byte_what_a_synchronous_write_makes(tmp_path: Path) -> None:
    written_synchronously(str(tmp_path / "sync"), 7)
    gang = Gang(str(tmp_path / "run"), healthy, healthy)
    gang.begin(7)
    metrics = [dict(writer.finish()) for writer in gang.writers]
    expected = contents(tmp_path / "sync" / snapshot_key(7))
    assert contents(tmp_path / "run" / snapshot_key(7)) == expected
    assert len(expected) == 4 + 4
    assert metrics[0] == metrics[1]
    assert metrics[0]["snapshot/bytes"] == sum(len(data) for name, data in expected.items() if "0000" in name)
    assert verify_checkpoint(str(tmp_path / "run" / snapshot_key(7))).problems == []


def test_ranks_meet_over_tcp_as_they_do_in_a_real_gang(tmp_path: Path) -> None:
    server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    boards = [server.clone(), TCPStore("127.0.0.1", server.port, None, False).clone()]
    gang = Gang(str(tmp_path / "well"), healthy, healthy, boards=boards)
    before = server.num_keys()
    for step in (1, 2, 3):
        gang.begin(step)
    for writer in gang.writers:
        writer.finish()
    assert [s.step for s in RunFolder(str(tmp_path / "well")).snapshots()] == [1, 2, 3]
    assert server.num_keys() == before
    failing = Gang(str(tmp_path / "badly"), healthy, no_streams, boards=boards)
    failing.begin(1)
    assert [type(error) for error in failing.errors()] == [StorageError, StorageError]


def test_training_goes_on_while_storage_stands_still_and_hears_of_the_commit_once(tmp_path: Path) -> None:
    gate = Gate("write", "model-00002-of-00002.safetensors")
    gang = Gang(str(tmp_path), healthy, gate)
    gang.begin(1)
    assert gate.is_reached.wait(PATIENCE_SECONDS)
    for _ in range(3):
        assert [dict(writer.poll()) for writer in gang.writers] == [{}, {}]
    assert [writer.is_busy for writer in gang.writers] == [True, True]
    assert RunFolder(str(tmp_path)).snapshots() == []
    gate.is_open.set()
    gang.writers[0].wait()
    assert gang.writers[0].poll()["snapshot/publish_seconds"] > 0
    assert dict(gang.writers[0].poll()) == {}
    assert [s.step for s in RunFolder(str(tmp_path)).snapshots()] == [1]
    gang.writers[1].finish()
    assert not gang.writers[1].is_busy


def test_begin_waits_for_the_snapshot_before(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    gate = Gate("create", "step-000000001/manifest.json")
    gate_at_manifest = Gate("create_stream", "step-000000002/model-00001-of-00001.safetensors")
    gate_at_manifest.is_open.set()

    def both(method: str, key: str) -> bool:
        return gate(method, key) or gate_at_manifest(method, key)

    gang = Gang(str(tmp_path), both)
    gang.begin(1)
    assert gate.is_reached.wait(PATIENCE_SECONDS)
    waited: Future[float] = threads.submit(gang.writers[0].begin, share_of(0, 2, 1), facts_at(2))
    assert not gate_at_manifest.is_reached.wait(0.2)
    assert not waited.done()
    gate.is_open.set()
    assert waited.result(PATIENCE_SECONDS) >= 0.2
    gang.writers[0].finish()
    assert [s.step for s in RunFolder(str(tmp_path)).snapshots()] == [1, 2]


def test_slow_storage_is_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Gang(str(tmp_path), healthy).writers[0]
    for waited in (0.0, 5.0, 5.0):
        writer.warn_if_slow(waited)
    assert [record.message for record in caplog.records if "stood still for 5.0 s" in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1


def test_ephemeral_is_due_when_the_last_was_begun_so_long_ago_and_none_is_on_its_way(tmp_path: Path) -> None:
    gate = Gate("create", "manifest.json")
    gang = Gang(str(tmp_path), gate)
    writer = gang.writers[0]
    opened = time.monotonic()
    assert not writer.is_ephemeral_due(None, opened + 1e9)
    assert [writer.is_ephemeral_due(600.0, opened + seconds) for seconds in (0, 599, 601)] == [False, False, True]
    gang.begin(1)
    assert not writer.is_ephemeral_due(600.0, opened + 1e9)
    gate.is_open.set()
    writer.wait()
    assert not writer.is_ephemeral_due(600.0, opened + 599)
    assert writer.is_ephemeral_due(600.0, time.monotonic() + 601)


def test_host_copies_are_given_up_before_the_commit(tmp_path: Path) -> None:
    gate = Gate("create", "manifest.json")
    gang = Gang(str(tmp_path), gate)
    share = share_of(0, 1, 1)
    copies = [weakref.ref(tensor) for tensor in (*share.model.values(), *share.state.values())]
    gang.writers[0].begin(share, facts_at(1))
    del share
    assert gate.is_reached.wait(PATIENCE_SECONDS)
    gc.collect()
    assert [copy() for copy in copies] == [None] * 6
    gate.is_open.set()
    gang.writers[0].finish()


def test_rank_that_owns_nothing_takes_part(tmp_path: Path) -> None:
    gang = Gang(str(tmp_path), healthy, healthy)
    gang.writers[0].begin(share_of(0, 1, 1), facts_at(1))
    gang.writers[1].begin(HostShare(number=0, of=1, model={}, state={}), facts_at(1))
    for writer in gang.writers:
        writer.finish()
    (snapshot,) = RunFolder(str(tmp_path)).snapshots()
    assert [shard.key for shard in snapshot.manifest.shards] == [
        f"{p}-00001-of-00001.safetensors" for p in ("model", "state")
    ]


def test_ephemeral_is_said_in_the_manifest_and_otherwise_not_mentioned(tmp_path: Path) -> None:
    gang = Gang(str(tmp_path), healthy)
    gang.begin(1)
    gang.begin(2, ephemeral=True)
    gang.writers[0].finish()
    texts = [(tmp_path / snapshot_key(step) / "manifest.json").read_text() for step in (1, 2)]
    assert ["ephemeral" in text for text in texts] == [False, True]
    assert [s.ephemeral for s in RunFolder(str(tmp_path)).snapshots()] == [False, True]


# Storage that fails and comes back


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_fifth_of_all_requests_failing_makes_snapshots_late_never_wrong(tmp_path: Path, seed: int) -> None:
    fails = [Sometimes(0.2, 10 * seed + rank) for rank in range(WORLD_SIZE)]
    gang = Gang(str(tmp_path), *fails)
    for step in range(1, 9):
        gang.begin(step)
    for writer in gang.writers:
        writer.finish()
    assert all(fail.failures >= 3 for fail in fails)
    found = RunFolder(str(tmp_path)).snapshots()
    assert [s.step for s in found] == list(range(1, 9))
    for snapshot in found:
        assert verify_checkpoint(snapshot.url).problems == []
    expected, _ = read_manifest(written_synchronously(str(tmp_path / "sync"), 8))
    assert (found[-1].digest, found[-1].manifest.state_digest) == (expected.digest, expected.state_digest)


def test_s3_that_breaks_a_fifth_of_all_requests_makes_right_snapshots(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in s3_environment.items():
        monkeypatch.setenv(key, value)
    url = f"s3://runs/{uuid.uuid4().hex}/run"
    with faulty_proxy(s3_environment["AWS_ENDPOINT_URL"]) as proxy:
        proxy.choose = seeded_faults(20261121, 0.2)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        gang = Gang(url, healthy, healthy)
        for step in (1, 2, 3):
            gang.begin(step)
        for writer in gang.writers:
            writer.finish()
        assert proxy.faults
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_environment["AWS_ENDPOINT_URL"])
    found = RunFolder(url).snapshots()
    assert [s.step for s in found] == [1, 2, 3]
    assert [s.url for s in found if verify_checkpoint(s.url).problems] == []


def test_object_that_appeared_though_its_answer_was_lost_is_written_again_beside(tmp_path: Path) -> None:
    inner = open_store(str(tmp_path))
    inner.put(f"{snapshot_key(1)}/model-00001-of-00001.safetensors", b"left by an earlier attempt")
    gang = Gang(str(tmp_path), healthy)
    gang.begin(1)
    gang.writers[0].finish()
    (snapshot,) = RunFolder(str(tmp_path)).snapshots()
    assert verify_checkpoint(snapshot.url).problems == []
    assert inner.read(f"{snapshot_key(1)}/model-00001-of-00001.safetensors") == b"left by an earlier attempt"


# Failures, on every rank


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
    error = Gang._error(gang.writers[0])
    assert "no word from ranks [2]" in str(error)
    assert str(Gang._error(gang.writers[1])) == str(error)
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
