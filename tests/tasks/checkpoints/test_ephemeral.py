"""Ephemeral snapshots go by themselves, and nothing else does."""

from __future__ import annotations

import uuid

import pytest
from retention_run import Clock, broken, commit, make_run, small_config, steps_left

from cluster.errors import LeaseHeld
from cluster.lease import Lease
from cluster.storage import Store
from configs.merging import RetentionConfig
from tasks.checkpoints.ephemeral import drop_ephemeral
from tasks.checkpoints.pins import GC_LEASE, hold_pins
from tasks.checkpoints.run_folder import RunFolder


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> Store:
    made = make_run(f"memory://{uuid.uuid4().hex}/run", (2, 4, 6), small_config(retention=RetentionConfig(keep_last=1)))
    for step in (3, 5, 7):
        commit(made, step, ephemeral=True)
    return made


def test_drop_takes_all_ephemeral_but_the_newest_and_no_other(store: Store, clock: Clock) -> None:
    run = RunFolder(store.url)
    assert drop_ephemeral(run, clock=clock) == ["snapshots/step-000000003", "snapshots/step-000000005"]
    assert steps_left(store) == [2, 4, 6, 7]
    assert broken(store) == []
    commit(store, 8)
    assert drop_ephemeral(run, clock=clock) == ["snapshots/step-000000007"]
    assert drop_ephemeral(run, clock=clock) == []
    assert steps_left(store) == [2, 4, 6, 8]


def test_drop_leaves_where_the_open_segment_began_until_it_is_closed(store: Store, clock: Clock) -> None:
    run = RunFolder(store.url)
    number = run.open_segment(cause="resume", start={"step": 5}, plan={})
    drop_ephemeral(run, clock=clock)
    assert steps_left(store) == [2, 4, 5, 6, 7]
    run.close_segment(number, reason="stopped", step=7)
    drop_ephemeral(run, clock=clock)
    assert steps_left(store) == [2, 4, 6, 7]


def test_drop_leaves_what_is_pinned(store: Store, clock: Clock) -> None:
    run = RunFolder(store.url)
    (three,) = [s for s in run.snapshots() if s.step == 3]
    with hold_pins([three], clock=clock):
        drop_ephemeral(run, clock=clock)
        assert steps_left(store) == [2, 3, 4, 6, 7]


def test_drop_beside_another_collection_is_refused(store: Store, clock: Clock) -> None:
    lease = Lease(store, GC_LEASE, clock)
    lease.acquire()
    with pytest.raises(LeaseHeld):
        drop_ephemeral(RunFolder(store.url), clock=clock)
    assert steps_left(store) == [2, 3, 4, 5, 6, 7]
