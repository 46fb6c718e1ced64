"""A lease kept by its holder: renewal, outages of storage meanwhile, and the block that holds one."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cluster.errors import LeaseExpired, LeaseHeld, LeaseLost, StorageError
from cluster.lease import EXPIRY_SECONDS, RENEWAL_SECONDS, RETRY_SECONDS, Lease, check_token, hold_lease, lease_key
from cluster.storage import Store
from tests.faulty_store import FaultyStore
from tests.lease_parts import NAME, Clock, stored, write_record


class Ticks:
    """Stands in for the event that ends renewal: ``wait`` calls back instead of waiting, ``count`` times."""

    def __init__(self, count: int, on_tick: Callable[[int], None]) -> None:
        self.count = count
        self.on_tick = on_tick
        self.waited: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        if len(self.waited) > self.count:
            return True
        self.on_tick(len(self.waited))
        return False


class BrokenStore:
    """A store whose compare-and-swap fails, as when the network is away."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def replace(self, key: str, *_: bytes) -> bool:
        raise StorageError(f"{key}: storage is away")


# The block


def test_hold_lease_block_holds_and_releases(store: Store, clock: Clock) -> None:
    with hold_lease(store, NAME, clock=clock) as lease:
        lease.check()
        with pytest.raises(LeaseHeld), hold_lease(store, NAME, clock=clock):
            pass
        lease.check()
    assert stored(store).released
    assert f"lease-{NAME}" not in {thread.name for thread in threading.enumerate()}


def test_hold_lease_exception_in_the_block_releases(store: Store, clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="on purpose"), hold_lease(store, NAME, clock=clock):
        raise RuntimeError("on purpose")
    assert stored(store).released


# Renewal


def test_renew_pushes_the_expiry_out(store: Store, lease: Lease, clock: Clock) -> None:
    clock.now += RENEWAL_SECONDS
    lease.renew()
    assert stored(store).expires_at == clock.now + EXPIRY_SECONDS
    lease.check()


def test_renew_never_acquired_refused(store: Store, clock: Clock) -> None:
    with pytest.raises(LeaseLost):
        Lease(store, NAME, clock).renew()


def test_renewal_runs_until_stopped(store: Store, lease: Lease, clock: Clock) -> None:
    lost: list[str] = []

    def advance(_: int) -> None:
        clock.now += RENEWAL_SECONDS

    ticks = Ticks(5, advance)
    lease.renew_until(ticks, lambda: lost.append("lost"))
    assert ticks.waited == [RENEWAL_SECONDS] * 6
    assert stored(store).expires_at == clock.now + EXPIRY_SECONDS
    assert not lost


def test_renewal_after_take_over_says_lost_and_ends(store: Store, lease: Lease, clock: Clock) -> None:
    lost: list[str] = []

    def take_over(tick: int) -> None:
        if tick == 2:
            write_record(store)

    ticks = Ticks(9, take_over)
    lease.renew_until(ticks, lambda: lost.append("lost"))
    assert (len(ticks.waited), lost, stored(store).token) == (2, ["lost"], "theirs")


def test_renewal_outage_of_ten_minutes_is_outlived_and_nothing_published_meanwhile(
    store: Store, lease: Lease, clock: Clock
) -> None:
    lost: list[str] = []
    refused: list[type[Exception]] = []
    lease.store = BrokenStore(store)

    def advance(tick: int) -> None:
        clock.now += RENEWAL_SECONDS
        if tick > EXPIRY_SECONDS / RENEWAL_SECONDS:
            for check in (lease.check, lambda: check_token(store, NAME, lease.token, clock)):
                with pytest.raises(LeaseLost) as caught:
                    check()
                refused.append(caught.type)
        if tick == 60:
            lease.store = store

    ticks = Ticks(60, advance)
    lease.renew_until(ticks, lambda: lost.append("lost"))
    assert (lost, lease.is_lost()) == ([], False)
    assert refused == [LeaseExpired] * 2 * 57
    assert ticks.waited == [RENEWAL_SECONDS, *[RETRY_SECONDS] * 59, RENEWAL_SECONDS]
    assert stored(store).expires_at == clock.now + EXPIRY_SECONDS
    check_token(store, NAME, lease.token, clock)


def test_renewal_take_over_during_an_outage_says_lost_once_storage_is_back(
    store: Store, lease: Lease, clock: Clock
) -> None:
    lost_at: list[float] = []
    began = clock.now
    lease.store = BrokenStore(store)
    newer = Lease(store, NAME, clock)

    def advance(tick: int) -> None:
        clock.now += RENEWAL_SECONDS
        if tick == 5:
            newer.acquire()
        if tick == 7:
            lease.store = store

    lease.renew_until(Ticks(9, advance), lambda: lost_at.append(clock.now - began))
    assert (lost_at, lease.is_lost()) == ([7 * RENEWAL_SECONDS], True)
    assert stored(store).token == newer.token
    with pytest.raises(LeaseLost) as caught:
        lease.check()
    assert caught.type is LeaseLost


def test_renewal_of_pins_during_an_outage_ends_at_their_expiry(store: Store, clock: Clock) -> None:
    pin = Lease(store, "pin", clock, ("snapshots/step-000000001",))
    pin.acquire()
    pin.store = BrokenStore(store)
    lost_at: list[float] = []
    began = clock.now

    def advance(_: int) -> None:
        clock.now += RENEWAL_SECONDS

    pin.renew_until(Ticks(9, advance), lambda: lost_at.append(clock.now - began))
    assert lost_at == [EXPIRY_SECONDS]


class AnswerLost(BrokenStore):
    """A store that carries a compare-and-swap out and loses the answer."""

    def replace(self, key: str, *data: bytes) -> bool:
        self.store.replace(key, *data)
        raise StorageError(f"{key}: no answer")


def test_renewal_whose_answer_was_lost_is_recognised_as_ours(store: Store, lease: Lease, clock: Clock) -> None:
    for late in (RENEWAL_SECONDS, 10 * EXPIRY_SECONDS):
        lease.store = AnswerLost(store)
        clock.now += RENEWAL_SECONDS
        with pytest.raises(StorageError):
            lease.renew()
        lease.store = store
        clock.now += late
        lease.renew()
        assert stored(store).expires_at == clock.now + EXPIRY_SECONDS
        lease.check()


@pytest.mark.parametrize("change", [{"token": "theirs"}, {"released": True}])
def test_renewal_whose_answer_was_lost_then_changed_by_others_is_lost(
    store: Store, lease: Lease, clock: Clock, change: dict[str, Any]
) -> None:
    lease.store = AnswerLost(store)
    clock.now += RENEWAL_SECONDS
    with pytest.raises(StorageError):
        lease.renew()
    lease.store = store
    theirs = dataclasses.replace(stored(store), **change).encode()
    store.put(lease_key(NAME), theirs)
    with pytest.raises(LeaseLost, match="taken over"):
        lease.renew()
    assert store.read(lease_key(NAME)) == theirs


def test_hold_lease_storage_away_at_the_end_hides_neither_success_nor_error(store: Store, clock: Clock) -> None:
    with hold_lease(store, NAME, clock=clock) as lease:
        lease.store = BrokenStore(store)
    assert not lease.was_given_back
    broken = FaultyStore(store, lambda method, _: method == "replace")
    with pytest.raises(RuntimeError, match="on purpose"), hold_lease(broken, "other", clock=clock):
        raise RuntimeError("on purpose")


def test_renewal_storage_back_in_time_goes_on(store: Store, lease: Lease, clock: Clock) -> None:
    lost: list[str] = []

    def advance(tick: int) -> None:
        clock.now += RENEWAL_SECONDS
        lease.store = BrokenStore(store) if tick <= 2 else store

    lease.renew_until(Ticks(4, advance), lambda: lost.append("lost"))
    assert not lost
    assert stored(store).expires_at == clock.now + EXPIRY_SECONDS
