"""One driver at a time: who gets the lease, who loses it, and that nothing is published without it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cluster.errors import LeaseHeld, LeaseLost, StorageError
from cluster.lease import (
    EXPIRY_SECONDS,
    Lease,
    LeaseRecord,
    check_token,
    held_leases,
    is_free,
    lease_key,
    machine_identity,
)
from cluster.storage import Store, open_store
from tests.faulty_store import FaultyStore
from tests.lease_parts import NAME, Clock, stored, write_record


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


# Two holders


def test_acquire_free_lease_is_held(store: Store, lease: Lease, clock: Clock) -> None:
    record = stored(store)
    assert (record.token, record.pid, record.released) == (lease.token, os.getpid(), False)
    assert record.expires_at == clock.now + EXPIRY_SECONDS
    lease.check()


def test_acquire_held_lease_refused_naming_the_holder(store: Store, lease: Lease, clock: Clock) -> None:
    with pytest.raises(LeaseHeld, match=f"pid {os.getpid()}.*expires in 30 s") as caught:
        Lease(store, NAME, clock).acquire()
    assert lease.token not in str(caught.value)
    lease.check()


def test_acquire_other_name_is_independent(store: Store, lease: Lease, clock: Clock) -> None:
    Lease(store, "merge-x", clock).acquire()
    lease.check()


def test_acquire_same_lease_twice_refused(lease: Lease, clock: Clock) -> None:
    clock.now += 1
    with pytest.raises(LeaseHeld):
        lease.acquire()


def test_acquire_race_for_a_free_lease_has_one_winner(tmp_path: Path, clock: Clock, frequent_switches: None) -> None:
    for number in range(5):
        require_one_winner(open_store(str(tmp_path / str(number))), clock)


def test_acquire_race_for_an_expired_lease_has_one_winner(store: Store, clock: Clock, frequent_switches: None) -> None:
    for _ in range(5):
        write_record(store, expires_at=clock.now)
        require_one_winner(store, clock)


def require_one_winner(store: Store, clock: Clock, racers: int = 4) -> None:
    leases = [Lease(store, NAME, clock) for _ in range(racers)]
    start = threading.Barrier(racers)

    def acquire(lease: Lease) -> bool:
        start.wait()
        try:
            lease.acquire()
        except LeaseHeld:
            return False
        return True

    with ThreadPoolExecutor(racers) as pool:
        winners = [lease for lease, won in zip(leases, pool.map(acquire, leases), strict=True) if won]
    assert len(winners) == 1
    winners[0].check()


# Expiry and take-over


def test_acquire_shortly_before_expiry_refused(store: Store, clock: Clock) -> None:
    held = write_record(store)
    clock.now = held.expires_at - 0.001
    with pytest.raises(LeaseHeld, match="someone@elsewhere"):
        Lease(store, NAME, clock).acquire()


def test_acquire_at_expiry_taken_over(store: Store, clock: Clock) -> None:
    held = write_record(store)
    clock.now = held.expires_at
    lease = Lease(store, NAME, clock)
    lease.acquire()
    assert stored(store).token == lease.token


def test_take_over_old_holder_fails_closed(store: Store, lease: Lease, clock: Clock) -> None:
    clock.now += EXPIRY_SECONDS
    newer = Lease(store, NAME, clock)
    newer.acquire()
    with pytest.raises(LeaseLost, match="nothing was published"):
        lease.check()
    with pytest.raises(LeaseLost, match="taken over"):
        lease.renew()
    lease.release()
    newer.check()


def test_holder_whose_clock_is_an_hour_ahead_is_named_with_its_skew(store: Store, clock: Clock) -> None:
    ahead = Lease(store, "other", lambda: clock() + 3600)
    ahead.acquire()
    with pytest.raises(LeaseHeld, match=r"about 3600 s ahead of this machine's.*remove .*leases/other\.json"):
        Lease(store, "other", clock).acquire()


def test_holder_whose_clock_is_an_hour_behind_is_taken_over_and_publishes_nothing(store: Store, clock: Clock) -> None:
    behind = Lease(store, "other", lambda: clock() - 3600)
    behind.acquire()
    here = Lease(store, "other", clock)
    here.acquire()
    with pytest.raises(LeaseLost):
        behind.check()
    here.check()


def test_check_judges_a_slow_answer_by_the_time_it_came(store: Store, lease: Lease, clock: Clock) -> None:
    class Slow(FaultyStore):
        def read_if_present(self, key: str) -> bytes | None:
            data = self.inner.read_if_present(key)
            clock.now += EXPIRY_SECONDS + 1
            return data

    with pytest.raises(LeaseLost, match="expired"):
        check_token(Slow(store, lambda *_: False), NAME, lease.token, clock)


def test_check_token_in_a_worker_fails_closed(store: Store, lease: Lease, clock: Clock) -> None:
    check_token(store, NAME, lease.token, clock)
    for token in ("", "other", lease.token.upper() + "x"):
        with pytest.raises(LeaseLost):
            check_token(store, NAME, token, clock)


def test_check_missing_object_fails_closed(store: Store, lease: Lease) -> None:
    store.delete(lease_key(NAME))
    with pytest.raises((LeaseLost, StorageError)):
        lease.check()


def test_check_own_expired_lease_fails_closed(lease: Lease, clock: Clock) -> None:
    clock.now += EXPIRY_SECONDS
    with pytest.raises(LeaseLost):
        lease.check()


# Release


def test_release_lease_is_free_at_once(store: Store, lease: Lease, clock: Clock) -> None:
    lease.release()
    with pytest.raises(LeaseLost):
        lease.check()
    newer = Lease(store, NAME, clock)
    newer.acquire()
    newer.check()


def test_release_twice_leaves_the_next_holder_alone(store: Store, lease: Lease, clock: Clock) -> None:
    lease.release()
    newer = Lease(store, NAME, clock)
    newer.acquire()
    lease.release()
    newer.check()


# Processes that are gone


def test_acquire_dead_local_process_taken_over_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from cluster.lease import Lease; from cluster.storage import open_store; "
        f"Lease(open_store(sys.argv[1]), {NAME!r}).acquire()"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    store = open_store(str(tmp_path))
    left_behind = stored(store)
    assert not psutil.pid_exists(left_behind.pid)
    lease = Lease(store, NAME, lambda: left_behind.expires_at - EXPIRY_SECONDS)
    lease.acquire()
    lease.check()


def test_acquire_zombie_process_taken_over(store: Store, clock: Clock) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        record = write_record(
            store, machine=machine_identity(), pid=child.pid, process_started=psutil.Process(child.pid).create_time()
        )
        assert not is_free(record, clock.now)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_free(record, clock.now)
        Lease(store, NAME, clock).acquire()


def test_is_free_living_process_of_this_machine_is_not(clock: Clock, store: Store) -> None:
    started = psutil.Process().create_time()
    record = write_record(store, machine=machine_identity(), pid=os.getpid(), process_started=started)
    assert not is_free(record, clock.now)


def test_is_free_recycled_pid_is(clock: Clock, store: Store) -> None:
    record = write_record(store, machine=machine_identity(), pid=os.getpid(), process_started=12.0)
    assert is_free(record, clock.now)


def test_is_free_dead_pid_of_another_machine_is_not(clock: Clock, store: Store) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert not is_free(write_record(store, pid=child.pid), clock.now)


# Damaged objects

WHOLE = dataclasses.asdict(
    LeaseRecord(token="t", owner="o", machine="m", pid=1, process_started=1.0, expires_at=2_000_000.0)
)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not JSON",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        json.dumps({key: value for key, value in WHOLE.items() if key != "token"}).encode(),
        json.dumps({**WHOLE, "unheard_of": 1}).encode(),
    ],
    ids=["empty", "text", "binary", "list", "null", "no fields", "field missing", "field unknown"],
)
def test_damaged_object_named_by_every_reader(store: Store, clock: Clock, data: bytes) -> None:
    require_damage_is_named(store, clock, data)


@pytest.mark.parametrize("change", [{"expires_at": "soon"}, {"expires_at": None}])
def test_damaged_object_wrong_types_named(store: Store, clock: Clock, change: dict[str, object]) -> None:
    require_damage_is_named(store, clock, json.dumps({**WHOLE, **change}).encode())


def require_damage_is_named(store: Store, clock: Clock, data: bytes) -> None:
    store.put(lease_key(NAME), data)
    for read in (
        lambda: Lease(store, NAME, clock).acquire(),
        lambda: held_leases(store, clock.now),
        lambda: check_token(store, NAME, "t", clock),
    ):
        with pytest.raises(StorageError, match="damaged"):
            read()
    assert store.read(lease_key(NAME)) == data


# Status


def test_held_leases_lists_only_those_in_force(store: Store, lease: Lease, clock: Clock) -> None:
    released = Lease(store, "released", clock)
    released.acquire()
    released.release()
    store.put(lease_key("expired"), dataclasses.replace(stored(store), expires_at=clock.now).encode())
    clock.now += 10
    assert held_leases(store, clock.now) == [
        {
            "name": NAME,
            "owner": stored(store).owner,
            "age_seconds": 10.0,
            "expires_in_seconds": EXPIRY_SECONDS - 10,
        }
    ]
    assert lease.token not in json.dumps(held_leases(store, clock.now))


def test_held_leases_run_without_leases_is_empty(store: Store, clock: Clock) -> None:
    assert held_leases(store, clock.now) == []
