"""Folders without a manifest: seen twice before they go, and never under a writer."""

from __future__ import annotations

import uuid

import pytest
from retention_run import HOUR, Clock, broken, commit, make_run, small_config, steps_left, visible
from turns import watched

from cluster.errors import LeaseLost, StorageError
from cluster.lease import EXPIRY_SECONDS, Lease
from cluster.storage import Store
from cluster.storage_fsspec import MemoryStore
from tasks.checkpoints.attempts import ATTEMPTS_KEY, GRACE_HOURS, find_attempts, remove_attempts
from tasks.checkpoints.pins import GC_LEASE, SKEW_SECONDS
from tasks.checkpoints.run_folder import snapshot_key

SHARD = f"{snapshot_key(7)}/model-00001-of-00001.safetensors"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> Store:
    store = make_run(f"memory://{uuid.uuid4().hex}/run", [6], small_config())
    store.put(SHARD, b"half")
    return store


def tidy(store: Store, clock: Clock) -> list[str]:
    """What a collection does about attempts."""
    lease = Lease(store, GC_LEASE, clock)
    lease.acquire()
    try:
        return remove_attempts(store, find_attempts(store, (), clock()), lease)
    finally:
        lease.release()


def test_attempts_are_found_with_their_bytes_and_why_they_stay(store: Store, clock: Clock) -> None:
    (attempt,) = find_attempts(store, (), clock())
    assert (attempt.name, attempt.bytes, attempt.is_removable) == (snapshot_key(7), 4, False)
    assert "never committed" in attempt.reason
    assert find_attempts(store, [snapshot_key(7)], clock()) == []


def test_attempts_go_once_a_day_passed_without_change(store: Store, clock: Clock) -> None:
    assert tidy(store, clock) == []
    clock.now += GRACE_HOURS * HOUR - 1
    assert tidy(store, clock) == []
    clock.now += 1
    assert tidy(store, clock) == [snapshot_key(7)]
    assert store.keys("snapshots/step-000000007") == []
    assert steps_left(store) == [6]


def test_attempts_grace_begins_again_with_every_change(store: Store, clock: Clock) -> None:
    tidy(store, clock)
    clock.now += GRACE_HOURS * HOUR
    store.put(f"{snapshot_key(7)}/another", b"more")
    assert tidy(store, clock) == []
    clock.now += GRACE_HOURS * HOUR
    assert tidy(store, clock) == [snapshot_key(7)]


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"snapshots/step-000000007": 1}'])
def test_attempts_forgotten_sightings_only_begin_the_grace_again(store: Store, clock: Clock, damage: bytes) -> None:
    tidy(store, clock)
    store.put(ATTEMPTS_KEY, damage)
    clock.now += GRACE_HOURS * HOUR
    assert tidy(store, clock) == []


@pytest.mark.parametrize("name", ["run", "merge-x", "whatever"])
def test_attempts_stay_while_anyone_holds_a_lease_on_the_run(store: Store, clock: Clock, name: str) -> None:
    tidy(store, clock)
    clock.now += GRACE_HOURS * HOUR
    Lease(store, name, clock).acquire()
    (attempt,) = find_attempts(store, (), clock())
    assert name in attempt.reason
    assert tidy(store, clock) == []
    clock.now += EXPIRY_SECONDS + SKEW_SECONDS + 1
    assert tidy(store, clock) == [snapshot_key(7)]


def test_attempts_a_writer_that_came_after_the_look_is_respected(store: Store, clock: Clock) -> None:
    tidy(store, clock)
    clock.now += GRACE_HOURS * HOUR
    lease = Lease(store, GC_LEASE, clock)
    lease.acquire()
    found = find_attempts(store, (), clock())
    Lease(store, "run", clock).acquire()
    assert remove_attempts(store, found, lease) == []
    assert store.exists(SHARD)


def test_attempts_lost_lease_removes_nothing(store: Store, clock: Clock) -> None:
    tidy(store, clock)
    clock.now += GRACE_HOURS * HOUR
    lease = Lease(store, GC_LEASE, clock)
    lease.acquire()
    clock.now += EXPIRY_SECONDS
    with pytest.raises(LeaseLost):
        remove_attempts(store, find_attempts(store, (), clock()), lease)
    assert store.exists(SHARD)


@pytest.fixture
def uncommitted(store: Store, clock: Clock) -> bytes:
    """A snapshot at step 8 that lacks only its manifest, seen a day ago; the manifest."""
    commit(store, 8)
    manifest = store.read(f"{snapshot_key(8)}/manifest.json")
    store.delete(f"{snapshot_key(8)}/manifest.json")
    tidy(store, clock)
    clock.now += GRACE_HOURS * HOUR
    return manifest


def test_attempts_committed_after_the_look_stay(store: Store, clock: Clock, uncommitted: bytes) -> None:
    lease = Lease(store, GC_LEASE, clock)
    lease.acquire()
    found = find_attempts(store, (), clock())
    store.create(f"{snapshot_key(8)}/manifest.json", uncommitted)
    assert remove_attempts(store, found, lease) == [snapshot_key(7)]
    assert steps_left(store) == [6, 8]
    assert broken(store) == []


def test_attempts_committed_a_day_late_leave_no_manifest_without_shards(
    store: Store, clock: Clock, uncommitted: bytes
) -> None:
    """A writer that stood still between its check and its manifest for a day goes on in the middle of the removal."""

    def commits(called: Store, method: str, key: str) -> None:
        if (
            method == "delete"
            and key.startswith(snapshot_key(8))
            and not store.exists(f"{snapshot_key(8)}/manifest.json")
        ):
            store.put(f"{snapshot_key(8)}/manifest.json", uncommitted)

    with watched(MemoryStore, commits), pytest.raises(StorageError, match="a day late"):
        tidy(store, clock)
    assert broken(store) == []
    assert visible(store) == [snapshot_key(6)]
