"""Pins against dooms: whoever comes second sees the other, in every order of their calls."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from retention_run import Clock, begin_run, broken, commit, make_run, small_config, snapshot_url, steps_left
from turns import Turns, watched

from cluster.errors import LeaseLost, ObjectMissing, StorageDenied, StorageError
from cluster.lease import EXPIRY_SECONDS, Lease, hold_lease, lease_key, read_record
from cluster.storage import Store, open_store
from cluster.storage_fsspec import MemoryStore
from configs.merging import MergeConfig
from configs.schema import Config
from pipelines.gc import gc, survey
from tasks.checkpoints import pins
from tasks.checkpoints.collect import collect
from tasks.checkpoints.dooms import DOOMS_KEY, Doom, DoomList, names_going, read_dooms
from tasks.checkpoints.manifest import Manifest
from tasks.checkpoints.pins import (
    GC_LEASE,
    SKEW_SECONDS,
    InputCollected,
    checkpoint_name,
    hold_pins,
    pins_in_force,
)
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.retention import RetentionPlan
from tasks.checkpoints.run_folder import RunFolder, Snapshot, snapshot_key

STEPS = range(1, 6)
SEEDS = range(100)


def idle_config() -> Config:
    """A run whose schedule needs nothing: only the newest snapshot stays."""
    return small_config(steps=5, merge=MergeConfig(count=50))


IDLE = idle_config()


@pytest.fixture
def store() -> Store:
    return make_run(f"memory://{uuid.uuid4().hex}/run", STEPS, idle_config())


@pytest.fixture
def clock() -> Clock:
    return Clock()


def snapshots(store: Store, *steps: int) -> list[Snapshot]:
    return [snapshot for snapshot in RunFolder(store.url).snapshots() if snapshot.step in steps]


def doom(store: Store, manifest: Manifest, **fields: Any) -> Doom:
    assert manifest.step is not None
    made = Doom(
        name=snapshot_key(manifest.step), step=manifest.step, digest=manifest.digest, created=manifest.created,
        token="gc", doomed_at=1.0, **fields,
    )  # fmt: skip
    DoomList(store).write([made])
    return made


def pin_keys(store: Store) -> list[str]:
    return [key for key in store.keys("leases") if pins.is_pin(key)]


# What a pin is


def test_hold_pins_names_snapshots_while_it_is_held_and_leaves_nothing(store: Store, clock: Clock) -> None:
    with hold_pins(snapshots(store, 2, 3), clock=clock):
        assert set(pins_in_force(store, clock())) == {snapshot_key(2), snapshot_key(3)}
    assert pins_in_force(store, clock()) == {}
    assert pin_keys(store) == []


def test_hold_pins_in_each_run_that_owns_an_input(store: Store, clock: Clock) -> None:
    other = make_run(f"memory://{uuid.uuid4().hex}/other", [1], idle_config())
    with hold_pins([*snapshots(store, 2), *snapshots(other, 1)], clock=clock):
        assert set(pins_in_force(store, clock())) == {snapshot_key(2)}
        assert set(pins_in_force(other, clock())) == {snapshot_key(1)}


def test_hold_pins_of_a_folder_outside_runs_writes_nothing(clock: Clock) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}/plain")
    commit(store, 1)
    before = store.keys()
    with hold_pins([open_checkpoint(snapshot_url(store, 1))], clock=clock):
        assert store.keys() == before


def test_hold_pins_released_after_an_error(store: Store, clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="on purpose"), hold_pins(snapshots(store, 2), clock=clock):
        raise RuntimeError("on purpose")
    assert pin_keys(store) == []


def test_pins_of_a_dead_holder_expire_with_a_margin_for_clocks(store: Store, clock: Clock) -> None:
    pin = Lease(store, "pin-dead", clock, (snapshot_key(2),))
    pin.acquire()
    clock.now += EXPIRY_SECONDS + SKEW_SECONDS - 1
    assert set(pins_in_force(store, clock())) == {snapshot_key(2)}
    clock.now += 2
    assert pins_in_force(store, clock()) == {}


def test_expired_pin_is_not_revived(store: Store, clock: Clock) -> None:
    pin = Lease(store, "pin-late", clock, (snapshot_key(2),))
    pin.acquire()
    clock.now += EXPIRY_SECONDS
    with pytest.raises(LeaseLost, match="expired"):
        pin.renew()
    lease = Lease(store, "run", clock)
    lease.acquire()
    clock.now += EXPIRY_SECONDS
    lease.renew()


def test_renewed_pin_keeps_its_names(store: Store, clock: Clock) -> None:
    pin = Lease(store, "pin-a", clock, (snapshot_key(2),))
    pin.acquire()
    clock.now += 10
    pin.renew()
    assert read_record(store.read(lease_key("pin-a"))).pins == (snapshot_key(2),)


def test_damaged_pin_is_an_error_and_never_no_pin(store: Store, clock: Clock) -> None:
    store.put(lease_key("pin-damaged"), b"{}")
    with pytest.raises(StorageError, match="damaged"):
        pins_in_force(store, clock())
    with pytest.raises(StorageError, match="damaged"):
        gc(store.url, apply=True, clock=clock)
    assert steps_left(store) == list(STEPS)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("/a/run/snapshots/step-1", ("/a/run", "snapshots/step-1")),
        ("s3://b/run/merged/sma", ("s3://b/run", "merged/sma")),
        ("/a/snapshots/run/branches/b/snapshots/step-1", ("/a/snapshots/run/branches/b", "snapshots/step-1")),
        ("/a/run/trials/x/y", None),
        ("/a/snapshots", None),
        ("/plain", None),
    ],
)
def test_checkpoint_name(url: str, place: tuple[str, str] | None) -> None:
    assert checkpoint_name(url) == place


# What a doom does to a reader


def test_hold_pins_of_what_is_being_collected_fails_before_the_block(store: Store, clock: Clock) -> None:
    (snapshot,) = snapshots(store, 2)
    doom(store, snapshot.manifest)
    Lease(store, GC_LEASE, clock).acquire()
    with pytest.raises(InputCollected, match="being collected by retention"), hold_pins([snapshot], clock=clock):
        pytest.fail("the block ran")
    assert pin_keys(store) == []
    with hold_pins(snapshots(store, 3), clock=clock):
        pass  # another snapshot of the run is not touched by it


def test_hold_pins_of_what_was_collected_says_when(store: Store, clock: Clock) -> None:
    (snapshot,) = snapshots(store, 2)
    doom(store, snapshot.manifest, collected_at=0.0)
    with pytest.raises(InputCollected, match="1970-01-01"), hold_pins([snapshot], clock=clock):
        pytest.fail("the block ran")


def test_hold_pins_of_a_later_commit_of_the_same_name_is_free(store: Store, clock: Clock) -> None:
    (snapshot,) = snapshots(store, 2)
    doom(store, dataclasses.replace(snapshot.manifest, created=5.0), collected_at=6.0)
    with hold_pins([snapshot], clock=clock):
        pass


def test_doom_of_a_dead_gc_is_lifted_by_the_reader(store: Store, clock: Clock) -> None:
    (snapshot,) = snapshots(store, 2)
    Lease(store, GC_LEASE, clock).acquire()
    doom(store, snapshot.manifest)
    clock.now += EXPIRY_SECONDS + SKEW_SECONDS + 1
    with hold_pins([snapshot], clock=clock):
        assert read_dooms(store) == {}
        assert 2 in steps_left(store)
        gc(store.url, apply=True, clock=clock)
        assert steps_left(store) == [2, 5]
    assert broken(store) == []


def test_doom_of_a_dead_gc_that_had_begun_is_not_lifted(store: Store, clock: Clock) -> None:
    (snapshot,) = snapshots(store, 2)
    doom(store, snapshot.manifest)
    store.delete(f"{snapshot_key(2)}/manifest.json")
    with pytest.raises(InputCollected, match="stopped"), hold_pins([snapshot], clock=clock):
        pytest.fail("the block ran")


def test_reader_that_lifts_a_doom_fences_the_gc_that_left_it(store: Store, clock: Clock) -> None:
    (snapshot,) = snapshots(store, 2)
    late = Lease(store, GC_LEASE, clock)
    late.acquire()
    doom(store, snapshot.manifest)
    clock.now += EXPIRY_SECONDS + SKEW_SECONDS + 1
    with hold_pins([snapshot], clock=clock), pytest.raises(LeaseLost):
        late.check()


def test_gc_that_stood_still_deletes_nothing_of_what_readers_took_back(store: Store, clock: Clock) -> None:
    """It is suspended after the second look, right before its last check; a reader comes a minute later."""
    with ExitStack() as stack:

        def suspend(_: Store, method: str, key: str) -> None:
            if method == "put" and key.startswith("retention/collected/"):
                clock.now += EXPIRY_SECONDS + SKEW_SECONDS + 1
                stack.enter_context(hold_pins(snapshots(store, 1, 2, 3, 4), clock=clock))

        with watched(MemoryStore, suspend), pytest.raises(LeaseLost):
            take_away(store, clock)
        assert steps_left(store) == list(STEPS)
        assert names_going(store) == set()


def test_damaged_dooms_are_an_error(store: Store, clock: Clock) -> None:
    for data in (b"", b"[]", b"{}", json.dumps({"format_version": 1, "dooms": [{"name": 1}]}).encode()):
        store.put(DOOMS_KEY, data)
        with pytest.raises(StorageError, match="damaged"), hold_pins(snapshots(store, 2), clock=clock):
            pytest.fail("the block ran")


def test_storage_that_cannot_be_written_is_read_without_a_pin(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Store, key: str, data: bytes) -> None:
        raise StorageDenied(f"{key}: read-only")

    monkeypatch.setattr(MemoryStore, "create", refuse)
    (snapshot,) = snapshots(store, 2)
    with caplog.at_level(logging.WARNING), hold_pins([snapshot], clock=clock):
        pass
    assert "without a pin" in caplog.text
    with pytest.raises(InputCollected, match="no pin was in force"), hold_pins([snapshot], clock=clock):
        collect_meanwhile(store, snapshot, monkeypatch)


def collect_meanwhile(store: Store, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process dooms the snapshot, deletes it, and a reader comes upon the gap."""
    monkeypatch.undo()
    doom(store, snapshot.manifest)
    store.read("snapshots/step-000000002/gone.safetensors")


def test_denied_local_storage_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(str(tmp_path / "run"), [1], idle_config())

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(StorageDenied, match="Permission denied"):
        run.put("leases/pin-x.json", b"{}")


# Every order of their calls


def read_everything(store: Store, items: list[Snapshot]) -> str:
    """Read all that the snapshots list, for as long as a merge would; any object that is missing raises."""
    for item in 3 * items:
        for listed in (*item.manifest.shards, *item.manifest.files):
            assert len(store.read(f"{snapshot_key(item.step)}/{listed.key}")) == listed.bytes
    return "read"


def pinned_reader(store: Store, clock: Clock) -> Callable[[], object]:
    items = snapshots(store, 2, 3)

    def read() -> object:
        with hold_pins(items, clock=clock):
            return read_everything(store, items)

    return read


def race_with_gc(seed: int, reader: Callable[[Store, Clock], Callable[[], object]]) -> tuple[Any, Store, list[str]]:
    """Run ``reader`` beside a collection; what became of the reader."""
    store, clock = make_run(f"memory://{uuid.uuid4().hex}/run", STEPS, IDLE), Clock()
    turns = Turns(seed)
    program = reader(store, clock)
    with watched(MemoryStore, lambda _, method, key: turns.step(method, key)):
        results = turns.run({"gc": lambda: take_away(store, clock), "reader": program})
    if isinstance(results["gc"], Exception):
        raise results["gc"]
    assert broken(store) == []
    return results["reader"], store, turns.trace


def take_away(store: Store, clock: Clock) -> None:
    run = RunFolder(store.url)
    collect(store, lambda: survey(run, IDLE, clock()), clock=clock)


def is_fair(outcome: Any) -> bool:
    return outcome == "read" or (isinstance(outcome, InputCollected) and "while it was read" not in str(outcome))


def test_race_reader_reads_everything_or_begins_nothing() -> None:
    outcomes = []
    for seed in SEEDS:
        outcome, store, trace = race_with_gc(seed, pinned_reader)
        assert is_fair(outcome), (seed, outcome, trace)
        outcomes.append(outcome if outcome == "read" else "refused")
        # Once the reader has gone, the next collection takes what it held.
        take_away(store, Clock())
        assert steps_left(store) == [5], seed
    assert {"read", "refused"} == set(outcomes), "both ends of the race are seen"


def unpinned_reader(store: Store, clock: Clock) -> Callable[[], object]:
    items = snapshots(store, 2, 3)
    return lambda: read_everything(store, items)


def test_race_control_a_reader_without_a_pin_is_robbed() -> None:
    outcomes = (race_with_gc(seed, unpinned_reader)[0] for seed in SEEDS)
    assert any(isinstance(outcome, ObjectMissing) for outcome in outcomes)


def test_control_a_reader_that_asks_before_it_pins_is_robbed(store: Store, clock: Clock) -> None:
    """The wrong order: dooms first, pin second. All of a collection fits in between."""
    items = snapshots(store, 2, 3)
    assert not read_dooms(store)
    take_away(store, clock)
    pinned = (snapshot_key(2), snapshot_key(3))
    with hold_lease(store, "pin-wrong", clock=clock, pins=pinned), pytest.raises(ObjectMissing):
        read_everything(store, items)


@pytest.fixture
def hasty_gc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A collection that does not look again after it announced its dooms."""
    from tasks.checkpoints import collect

    monkeypatch.setattr(collect, "_withdraw", lambda *_: None)
    return iter(())


def collect_with_a_pin_after_the_first_look(store: Store, clock: Clock) -> list[int]:
    """Steps left after a collection during which a reader came between plan and announcement."""
    looks = 0
    with ExitStack() as stack:

        def look() -> RetentionPlan:
            nonlocal looks
            plan = survey(RunFolder(store.url), IDLE, clock())
            if not looks:
                stack.enter_context(hold_pins(snapshots(store, 2), clock=clock))
            looks += 1
            return plan

        collect(store, look, clock=clock)
        return steps_left(store)


def test_collect_respects_a_pin_that_came_after_its_plan(store: Store, clock: Clock) -> None:
    assert collect_with_a_pin_after_the_first_look(store, clock) == [2, 5]
    assert names_going(store) == set()


@pytest.mark.usefixtures("hasty_gc")
def test_control_a_gc_that_does_not_look_again_takes_what_is_pinned(store: Store, clock: Clock) -> None:
    assert collect_with_a_pin_after_the_first_look(store, clock) == [5]


# Branches: what a reader leaves behind takes over from its pin


def forking(store: Store, clock: Clock, *, with_pin: bool) -> Callable[[], object]:
    (start,) = snapshots(store, 2)

    def fork() -> object:
        branch = store.child("branches/anneal")
        point = {"url": start.url, "digest": start.digest, "step": 2, "tokens_seen": 200}
        if not with_pin:
            begin_run(branch, IDLE, point)
            return "forked"
        with hold_pins([start], clock=clock):
            begin_run(branch, IDLE, point)
        return "forked"

    return fork


@pytest.mark.parametrize("with_pin", [True, False])
def test_race_a_branch_that_is_on_record_has_its_start(with_pin: bool) -> None:
    lost = 0
    for seed in SEEDS[:25]:
        outcome, store, _ = race_with_gc(seed, lambda s, c: forking(s, c, with_pin=with_pin))
        if outcome == "forked":
            lost += 2 not in steps_left(store)
        else:
            assert isinstance(outcome, InputCollected), outcome
            assert not store.exists("branches/anneal/run.json")
    assert bool(lost) == (not with_pin)
