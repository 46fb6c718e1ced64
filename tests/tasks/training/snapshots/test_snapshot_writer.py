"""Snapshots beside training, on real storage that fails and stands still where a test says; ranks are threads here."""

from __future__ import annotations

import gc
import time
import uuid
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from cluster.errors import StorageError
from cluster.storage import open_store
from tasks.checkpoints.manifest import read_manifest
from tasks.checkpoints.run_folder import RunFolder, snapshot_key
from tasks.merging.verify import verify_checkpoint
from tasks.training.snapshots.share import HostShare
from tests.faulty_proxy import faulty_proxy, seeded_faults
from tests.faulty_store import Sometimes
from tests.snapshot_parts import (
    PATIENCE_SECONDS,
    WORLD_SIZE,
    Gang,
    Gate,
    contents,
    facts_at,
    healthy,
    no_streams,
    share_of,
    written_synchronously,
)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


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
