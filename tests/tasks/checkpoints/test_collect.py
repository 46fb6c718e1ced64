"""Taking away, apart from what is chosen: other commits, merges under way, dooms that were left behind."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

import pytest
from retention_run import Clock, broken, commit, make_run, small_config, steps_left

from cluster.errors import LeaseHeld, LeaseLost
from cluster.lease import EXPIRY_SECONDS, Lease
from cluster.storage import Store
from configs.merging import RetentionConfig
from tasks.checkpoints.catalog import Glance, glance_at
from tasks.checkpoints.collect import ATTEMPT_KEY, Collection, collect
from tasks.checkpoints.collected import kept_manifest_key, open_collected
from tasks.checkpoints.dooms import DOOMS_KEY, Doom, DoomList, merges_made, names_going, read_dooms, without_doomed
from tasks.checkpoints.manifest import Manifest, Source
from tasks.checkpoints.pins import GC_LEASE
from tasks.checkpoints.retention import Holdings, RetentionPlan, plan_retention
from tasks.checkpoints.run_folder import RunFolder, snapshot_key
from tasks.merging import merge

MERGE = "merged/sma"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> Store:
    return make_run(f"memory://{uuid.uuid4().hex}/run", range(1, 4), small_config())


def plan_of(store: Store, keep: int = 1, surplus: tuple[str, ...] = ()) -> RetentionPlan:
    """Keep the newest snapshots and every merge that is no surplus."""
    run = RunFolder(store.url)
    snapshots = tuple(glance_at(s.manifest, s.url) for s in run.snapshots())
    merged: dict[str, Glance] = {n: glance_at(m, f"{store.url}/merged/{n}") for n, m in run.merged().items()}
    held = Holdings(snapshots=snapshots, merged=merged, needed={}, surplus=surplus)
    return plan_retention(held, RetentionConfig(keep_last=keep), interval_tokens=100, now=0.0)


def take_away(store: Store, clock: Clock, **choice: Any) -> Collection:
    return collect(store, lambda: plan_of(store, **choice), clock=clock)


def make_merge(store: Store) -> None:
    """A merged checkpoint: the bytes of a snapshot under another name."""
    for key in store.keys(snapshot_key(1)):
        store.create(key.replace(snapshot_key(1), MERGE), store.read(key))


def doom_of(manifest: Manifest, name: str, **fields: Any) -> Doom:
    return Doom(
        name=name,
        step=manifest.step,
        digest=manifest.digest,
        created=manifest.created,
        token="t",
        doomed_at=1.0,
        **fields,
    )


def test_collect_keeps_manifests_aside_and_dooms_as_the_record(store: Store, clock: Clock) -> None:
    before = store.read(f"{snapshot_key(1)}/manifest.json")
    done = take_away(store, clock)
    assert [doom.step for doom in done.collected] == [1, 2]
    assert store.read(kept_manifest_key(snapshot_key(1))) == before
    assert {name: doom.collected_at for name, doom in read_dooms(store).items()} == {
        snapshot_key(1): clock(), snapshot_key(2): clock(),
    }  # fmt: skip
    assert names_going(store) == set()


def test_without_doomed_leaves_out_what_goes_or_went_and_keeps_a_later_commit(store: Store) -> None:
    first, second, third = RunFolder(store.url).snapshots()
    remade = dataclasses.replace(doom_of(third.manifest, snapshot_key(3), collected_at=2.0), created=0.0)
    went = doom_of(first.manifest, snapshot_key(1), collected_at=2.0)
    DoomList(store).write([went, doom_of(second.manifest, snapshot_key(2)), remade])
    assert without_doomed(store, [first, second, third]) == [third]
    DoomList(store).write([])
    assert without_doomed(store, [first, second, third]) == [first, second, third]


def test_collect_nothing_to_do_writes_no_record(store: Store, clock: Clock) -> None:
    take_away(store, clock, keep=3)
    assert not store.exists(DOOMS_KEY)


def test_collect_merge_that_another_is_making_is_left(store: Store, clock: Clock) -> None:
    make_merge(store)
    maker = Lease(store, "merge-sma", clock)
    maker.acquire()
    done = take_away(store, clock, keep=3, surplus=("sma",))
    assert done.collected == ()
    assert "left for now" in done.notes[0]
    assert read_dooms(store) == {}
    assert broken(store) == []
    maker.release()
    assert [doom.name for doom in take_away(store, clock, keep=3, surplus=("sma",)).collected] == [MERGE]
    assert merges_made(store, ["other"]) == {"other", "sma"}


def test_collect_stopped_merge_whose_name_is_in_use_again_is_not_touched(store: Store, clock: Clock) -> None:
    """A collection was stopped after it deleted a merge; the merge is being made anew under the same keys."""
    make_merge(store)
    data = store.read(f"{MERGE}/manifest.json")
    manifest = RunFolder(store.url).merged()["sma"]
    DoomList(store).write([doom_of(manifest, MERGE)])
    store.put(kept_manifest_key(MERGE), data)
    store.delete(f"{MERGE}/manifest.json")
    store.put(f"{MERGE}/{ATTEMPT_KEY}", b"identity")
    before = store.keys(MERGE)
    take_away(store, clock, keep=3)
    assert store.keys(MERGE) == before
    store.create(f"{MERGE}/manifest.json", data)
    assert broken(store) == []


def test_attempt_key_is_the_merges() -> None:
    assert merge.ATTEMPT_KEY == ATTEMPT_KEY


def test_collect_other_commit_of_a_doomed_name_is_left(store: Store, clock: Clock) -> None:
    plans = [plan_of(store), plan_of(store)]

    def survey() -> RetentionPlan:
        if len(plans) == 1:
            # Between announcement and deletion the name gets another commit, which no plan speaks of.
            for key in store.keys(snapshot_key(1)):
                store.delete(key)
            commit(store, 1, created=1.0)
        return plans.pop()

    done = collect(store, survey, clock=clock)
    assert steps_left(store) == [1, 3]
    assert "not what was planned" in done.notes[0]
    assert snapshot_key(1) not in read_dooms(store)


def test_collect_name_that_was_committed_again_can_be_collected_again(store: Store, clock: Clock) -> None:
    take_away(store, clock)
    commit(store, 1, created=1.0)
    assert open_collected(f"{store.url}/{snapshot_key(1)}") is None
    assert [doom.step for doom in take_away(store, clock).collected] == [1]
    assert read_dooms(store)[snapshot_key(1)].created == 1.0


def test_collect_adopted_is_refused_even_if_a_plan_gives_it_up(store: Store, clock: Clock, tmp_path: Any) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"theirs")
    commit(store, 9, kind="adopted", source=Source(url=str(tmp_path), format="hf"), created=5.0)
    plan = plan_of(store)
    rows = tuple(dataclasses.replace(row, action="delete") if row.step == 9 else row for row in plan.rows)
    done = collect(store, lambda: dataclasses.replace(plan, rows=rows), clock=clock)
    assert 9 in steps_left(store)
    assert "left alone" in done.notes[0]
    assert (tmp_path / "weights.safetensors").exists()


def test_collect_leaves_what_the_manifest_does_not_list(store: Store, clock: Clock) -> None:
    store.put(f"{snapshot_key(1)}/notes.txt", b"mine")
    take_away(store, clock)
    assert store.keys(snapshot_key(1)) == [f"{snapshot_key(1)}/notes.txt"]


def test_collect_under_another_lease_is_refused(store: Store, clock: Clock) -> None:
    Lease(store, GC_LEASE, clock).acquire()
    with pytest.raises(LeaseHeld):
        take_away(store, clock)


def test_collect_that_lost_its_lease_deletes_nothing_more(store: Store, clock: Clock) -> None:
    looks = 0

    def survey() -> RetentionPlan:
        nonlocal looks
        looks += 1
        if looks == 2:
            clock.now += EXPIRY_SECONDS
            Lease(store, GC_LEASE, clock).acquire()
        return plan_of(store)

    with pytest.raises(LeaseLost):
        collect(store, survey, clock=clock)
    assert steps_left(store) == [1, 2, 3]


def test_dooms_changed_by_another_are_not_overwritten(store: Store) -> None:
    first, second = DoomList(store), DoomList(store)
    manifest = RunFolder(store.url).snapshots()[0].manifest
    first.write([doom_of(manifest, "a")])
    with pytest.raises(LeaseLost):
        second.write([doom_of(manifest, "b")])
    assert list(read_dooms(store)) == ["a"]
