"""A lease lets one driver act on a run: an object with owner, token and expiry.

Taken by create-if-absent, renewed by a thread, taken over by compare-and-swap once it expired or its
holder on this machine is gone. Whoever publishes calls :meth:`Lease.check` (or, in a worker,
:func:`check_token`) right before, and fails closed.

Storage that stays away does not take a lease from its holder. Renewal goes on past the expiry, and its
compare-and-swap succeeds only if nobody took over meanwhile; until then every check raises
:class:`cluster.errors.LeaseExpired`. Pins alone are lost at their expiry: what they named may be gone by then.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.errors import LeaseExpired, LeaseHeld, LeaseLost, ObjectExists, StorageError
from cluster.outages import outages_logged
from cluster.storage import Store
from configs.typed import parse_record

EXPIRY_SECONDS = 30.0
RENEWAL_SECONDS = 10.0
RETRY_SECONDS = 2.0
"""After a renewal that storage refused: what waits for it to be back waits no longer than it must."""
SKEW_SECONDS = 20.0
"""Clocks that differ by less than this do no harm: a holder that renews on time is never taken over."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """What the lease object holds."""

    token: str
    """Secret of this incarnation of the holder; changes with every take-over."""
    owner: str
    """``user@host pid N``, for people."""
    machine: str
    """Identity of the machine and process namespace that the pid belongs to."""
    pid: int
    """Process that holds the lease."""
    process_started: float
    """Start time of that process, so that a recycled pid is not mistaken for it."""
    expires_at: float
    """Unix seconds after which anyone may take over."""
    released: bool = False
    """Set by the holder when it is done."""
    acquired_at: float = 0.0
    """Unix seconds when this incarnation took it."""
    pins: tuple[str, ...] = ()
    """Folders below the run that retention must leave alone while this is in force."""

    def encode(self) -> bytes:
        """Canonical JSON, the unit of compare-and-swap."""
        return json.dumps(asdict(self), sort_keys=True).encode()


def lease_key(name: str) -> str:
    """Key of the lease ``name`` below a run."""
    return f"leases/{name}.json"


@contextmanager
def hold_lease(
    store: Store,
    name: str,
    *,
    clock: Callable[[], float] = time.time,
    on_lost: Callable[[], None] = lambda: None,
    pins: tuple[str, ...] = (),
) -> Iterator[Lease]:
    """Hold the lease ``name`` for the length of the block; :class:`LeaseHeld` if another driver has it.

    ``on_lost`` runs in the renewal thread once another driver has taken over, or pins have expired. Storage that is away when
    the block ends is logged, and the lease left to expire.
    """
    lease = Lease(store, name, clock, pins)
    lease.acquire()
    stop = threading.Event()
    renewal = threading.Thread(target=lease.renew_until, args=(stop, on_lost), daemon=True, name=f"lease-{name}")
    renewal.start()
    try:
        yield lease
    finally:
        stop.set()
        renewal.join()
        with outages_logged(f"giving back the lease {name!r} of {store.url}, which expires in {EXPIRY_SECONDS:.0f} s,"):
            lease.release()


class Lease:
    """One incarnation's claim on a name."""

    def __init__(
        self, store: Store, name: str, clock: Callable[[], float] = time.time, pins: tuple[str, ...] = ()
    ) -> None:
        self.store = store
        self.name = name
        self.clock = clock
        self.pins = pins
        self.token = secrets.token_hex(8)
        self.was_given_back = False
        self._acquired_at = 0.0
        self._lost = threading.Event()
        self._held: bytes | None = None

    def acquire(self) -> None:
        """Take the lease, or raise :class:`LeaseHeld` naming the holder."""
        self._acquired_at = self.clock()
        mine = self._record().encode()
        try:
            self.store.create(lease_key(self.name), mine)
        except ObjectExists:
            # None: its holder was done just now, and removed it.
            current = self.store.read_if_present(lease_key(self.name))
            if current is not None and not is_free(held := read_record(current), self.clock()):
                raise LeaseHeld(self._describe(held)) from None
            if current is None or not self.store.replace(lease_key(self.name), mine, current):
                raise LeaseHeld(
                    f"lease {self.name!r} of {self.store.url} was taken or given back by another driver just now; "
                    "run the same command again"
                ) from None
        self._held = mine

    def renew(self) -> None:
        """Push the expiry out; :class:`LeaseLost` if someone took over, or if what has pins expired: they count no more.

        May be called again after a :class:`StorageError`, however long ago the lease expired.
        """
        if not self._swap() and not (self._adopt() and self._swap()):
            raise LeaseLost(f"lease {self.name!r} of {self.store.url} was taken over by another driver")

    def _swap(self) -> bool:
        """Whether a new expiry took the place of the bytes that we wrote last."""
        if self._held is None:
            return False
        if self.pins and self.clock() >= read_record(self._held).expires_at:
            raise LeaseLost(f"the pins of {self.name!r} on {self.store.url} expired before they were renewed")
        mine = self._record().encode()
        if not self.store.replace(lease_key(self.name), mine, self._held):
            return False
        self._held = mine
        return True

    def _adopt(self) -> bool:
        """Whether what stands is ours after all: a renewal whose answer was lost may have been carried out."""
        current = self.store.read_if_present(lease_key(self.name)) if self._held is not None else None
        if current is None or not _carries(current, self.token):
            return False
        self._held = current
        return True

    def check(self) -> None:
        """Fail closed: :class:`LeaseLost` unless the stored token is ours and unexpired; as for :func:`check_token`."""
        current = self.store.read_if_present(lease_key(self.name))
        # The clock after the read: an answer that took longer than the lease lasts says nothing about now.
        _require_in_force(self.store, self.name, current, self.token, self.clock())

    def is_lost(self) -> bool:
        """Whether the renewal thread found that another driver took over, or that pins expired: stop working."""
        return self._lost.is_set()

    def release(self) -> None:
        """Give the lease back; a lost one is left alone."""
        if self._held is not None:
            record = self._record(released=True)
            self.was_given_back = self.store.replace(lease_key(self.name), record.encode(), self._held)
            self._held = None

    def renew_until(self, stop: threading.Event, on_lost: Callable[[], None]) -> None:
        """Renew every :data:`RENEWAL_SECONDS` until ``stop``, or until the lease is lost: then call ``on_lost``.

        While storage is away, try again every :data:`RETRY_SECONDS` for as long as it takes.
        """
        failures = 0
        while not stop.wait(RETRY_SECONDS if failures else RENEWAL_SECONDS):
            try:
                self.renew()
            except LeaseLost:
                self._lost.set()
                on_lost()
                return
            except StorageError as error:
                if not failures:
                    logger.warning(
                        "lease %r of %s could not be renewed (%s); trying on", self.name, self.store.url, error
                    )
                failures += 1
            else:
                if failures:
                    logger.info("lease %r of %s is renewed after %d failures", self.name, self.store.url, failures)
                failures = 0

    def _record(self, *, released: bool = False) -> LeaseRecord:
        process = psutil.Process()
        return LeaseRecord(
            token=self.token,
            owner=f"{getpass.getuser()}@{socket.gethostname()} pid {process.pid}",
            machine=machine_identity(),
            pid=process.pid,
            process_started=process.create_time(),
            expires_at=self.clock() + EXPIRY_SECONDS,
            released=released,
            acquired_at=self._acquired_at,
            pins=self.pins,
        )

    def _describe(self, held: LeaseRecord) -> str:
        left = held.expires_at - self.clock()
        if left > EXPIRY_SECONDS + SKEW_SECONDS:
            return (
                f"{self.store.url} is being worked on by {held.owner} (lease {self.name!r}), whose clock is about "
                f"{left - EXPIRY_SECONDS:.0f} s ahead of this machine's: set the clocks right. If that driver is surely "
                f"gone, remove {self.store.url}/{lease_key(self.name)} and run the same command again"
            )
        return (
            f"{self.store.url} is being worked on by {held.owner} (lease {self.name!r}, "
            f"expires in {left:.0f} s unless renewed); wait for it or stop it, then run the same command again"
        )


def check_token(store: Store, name: str, token: str, clock: Callable[[], float] = time.time) -> None:
    """Raise :class:`LeaseLost` unless the lease ``name`` still carries ``token`` and has not expired by ``clock``.

    If it carries the token and expired, that is :class:`LeaseExpired`: its holder may renew it yet, if nobody takes over first.
    """
    data = store.read_if_present(lease_key(name))
    # The clock is read after the answer came: a slow one must not pass for a fresh one.
    _require_in_force(store, name, data, token, clock())


def _require_in_force(store: Store, name: str, data: bytes | None, token: str, now: float) -> None:
    if data is None:
        raise LeaseLost(f"lease {name!r} of {store.url} was taken over by a driver that is done; nothing was published")
    current = read_record(data)
    if current.token != token or current.released:
        raise LeaseLost(f"lease {name!r} of {store.url} now belongs to {current.owner}; nothing was published")
    if now >= current.expires_at:
        raise LeaseExpired(
            f"lease {name!r} of {store.url} expired {now - current.expires_at:.0f} s ago without being renewed; "
            "nothing was published"
        )


def _carries(data: bytes, token: str) -> bool:
    """Whether a lease object is that of ``token`` and not given back; a damaged one is nobody's."""
    try:
        held = read_record(data)
    except StorageError:
        return False
    return held.token == token and not held.released


def read_record(data: bytes) -> LeaseRecord:
    """Parse a lease object."""
    try:
        return parse_record(LeaseRecord, json.loads(data))
    except (ValueError, TypeError) as error:
        raise StorageError(f"a lease object is damaged ({error}); remove it once no driver is running") from error


def is_free(held: LeaseRecord, now: float) -> bool:
    """Whether anyone may take the lease: released, expired, or held by a process of this machine that is gone."""
    return held.released or now >= held.expires_at or (held.machine == machine_identity() and not _is_alive(held))


def held_leases(store: Store, now: float) -> list[dict[str, object]]:
    """Leases that are in force, for status: name, owner and seconds left."""
    rows: list[dict[str, object]] = []
    for key in store.keys("leases"):
        data = store.read_if_present(key) if key.endswith(".json") else None
        if data is not None and not is_free(held := read_record(data), now):
            name = key.removeprefix("leases/").removesuffix(".json")
            rows.append(
                {
                    "name": name,
                    "owner": held.owner,
                    "age_seconds": round(now - held.acquired_at, 1),
                    "expires_in_seconds": round(held.expires_at - now, 1),
                }
            )
    return rows


def machine_identity() -> str:
    """Boot id and pid namespace: two processes with the same value can judge each other's pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


def _is_alive(held: LeaseRecord) -> bool:
    try:
        process = psutil.Process(held.pid)
        return abs(process.create_time() - held.process_started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
