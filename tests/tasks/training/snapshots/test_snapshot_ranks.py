"""Snapshots beside the steps of real gloo ranks: storage slow and failing, a rank that cannot write, a gang that is killed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.storage import open_store
from tasks.checkpoints.manifest import read_manifest
from tasks.checkpoints.run_folder import RunFolder, snapshot_key
from tasks.merging.verify import verify_checkpoint
from tests.gloo_ranks import end_ranks, start_ranks
from tests.snapshot_parts import WORLD_SIZE, written_synchronously

SLOW_WRITE_SECONDS = 0.02
"""Eight writes of a rank's share: a hundred times as long as a step."""
# One rank: steps that all-reduce on the default group, a snapshot begun at every second of them.
MEMBER = """
import sys, time
from pathlib import Path
import torch, torch.distributed as dist
from cluster.storage import open_store
from tasks.training.snapshots.board import open_board
from tasks.training.snapshots.flight import Terms
from tasks.training.snapshots.writer import SnapshotWriter
from tests.faulty_store import FaultyStore, Sometimes
from tests.gloo_ranks import gloo_rank
from tests.snapshot_parts import WORLD_SIZE, facts_at, lease_in_force, share_of
rank, (url, kind, slow, sign) = int(sys.argv[1]), sys.argv[4:]

def stand_still(method, key):
    if rank == 1 and method == "write" and "state-" in key:
        Path(sign).touch()
        time.sleep(1000)
    return False

def cannot_write(method, key):
    return rank == 1 and method == "create_stream" and "step-000000004" in key

def train():
    fail = {"flaky": Sometimes(0.2, 7 + rank), "hang": stand_still, "broken": cannot_write, "well": lambda *_: False}[kind]
    store = FaultyStore(open_store(url), fail, slow_write_seconds=float(slow) if kind == "flaky" else 0.0)
    terms = Terms(board=open_board(rank, WORLD_SIZE), check_lease=lease_in_force, pauses_seconds=(0.01,) * 7)
    writer = SnapshotWriter(store, terms)
    step, waits = 0, []
    try:
        while step < 12 or kind == "hang":
            step += 1
            message = torch.tensor([1.0, float(writer.has_failed)])
            dist.all_reduce(message)
            assert message[0] == WORLD_SIZE
            if message[1]:
                writer.wait()
            writer.poll()
            if step % 2 == 0 and step <= 12:
                waits.append(writer.begin(share_of(rank, step), facts_at(step)))
        writer.finish()
        if kind == "flaky":
            print(*waits)
    except Exception as error:
        print(f"rank {rank} at step {step}: {type(error).__name__}: {error}", flush=True)

with gloo_rank():
    train()
    dist.barrier()
"""
PATIENCE_SECONDS = 120
StartGang = Callable[[str, str], list[subprocess.Popen[str]]]


@pytest.fixture
def start_gang(tmp_path: Path) -> StartGang:
    def start(url: str, kind: str) -> list[subprocess.Popen[str]]:
        sign = str(tmp_path / "uploading")
        return start_ranks(["-c", MEMBER], WORLD_SIZE, tmp_path, url, kind, str(SLOW_WRITE_SECONDS), sign)

    return start


def outputs(members: list[subprocess.Popen[str]]) -> list[str]:
    """What each rank printed; a rank that ended badly fails the test."""
    return end_ranks(members, timeout_seconds=PATIENCE_SECONDS)


def test_storage_slower_than_steps_that_fails_a_fifth_of_requests_makes_late_and_right_snapshots(
    tmp_path: Path, start_gang: StartGang
) -> None:
    waits = [[float(word) for word in out.split()] for out in outputs(start_gang(str(tmp_path / "run"), "flaky"))]
    # All but the first had to wait: storage is slower than the snapshots follow one another.
    assert all(sum(later) > SLOW_WRITE_SECONDS for _, *later in waits)
    found = RunFolder(str(tmp_path / "run")).snapshots()
    assert [s.step for s in found] == [2, 4, 6, 8, 10, 12]
    for snapshot in found:
        assert verify_checkpoint(snapshot.url).problems == []
        expected, _ = read_manifest(written_synchronously(str(tmp_path / "sync"), snapshot.step))
        assert (snapshot.digest, snapshot.manifest.state_digest) == (expected.digest, expected.state_digest)


def test_rank_that_cannot_write_ends_all_ranks_at_one_step(tmp_path: Path, start_gang: StartGang) -> None:
    first, second = outputs(start_gang(str(tmp_path / "run"), "broken"))
    assert "rank 1 failed: StorageError" in first
    assert snapshot_key(4) in first
    assert first.replace("rank 0 at", "rank 1 at") == second
    assert [s.step for s in RunFolder(str(tmp_path / "run")).snapshots()] == [2]


def test_gang_killed_during_an_upload_leaves_nothing_to_be_seen_and_the_next_attempt_commits(
    tmp_path: Path, start_gang: StartGang
) -> None:
    url = str(tmp_path / "run")
    members = start_gang(url, "hang")
    ends_at = time.monotonic() + PATIENCE_SECONDS
    while not (tmp_path / "uploading").exists():
        assert time.monotonic() < ends_at, "no upload began"
        time.sleep(0.05)
    for member in members:
        member.kill()
        member.communicate()
    assert RunFolder(url).snapshots() == []
    # Whole objects or none: what was half-written has no name.
    left = open_store(url).keys()
    assert not [key for key in left if "state-00002" in key]
    assert outputs(start_gang(url, "well")) == ["", ""]
    found = RunFolder(url).snapshots()
    assert [s.step for s in found] == [2, 4, 6, 8, 10, 12]
    assert verify_checkpoint(found[0].url).problems == []
