"""A lease at hand: a clock that a test moves, what is stored, and what another machine may have stored."""

from __future__ import annotations

import dataclasses

from cluster.lease import EXPIRY_SECONDS, LeaseRecord, lease_key, read_record
from cluster.storage import Store

NAME = "run"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def stored(store: Store) -> LeaseRecord:
    return read_record(store.read(lease_key(NAME)))


def write_record(store: Store, **changes: object) -> LeaseRecord:
    """A lease of a living process on another machine, with ``changes``."""
    record = LeaseRecord(
        token="theirs",
        owner="someone@elsewhere pid 7",
        machine="elsewhere",
        pid=7,
        process_started=1.0,
        expires_at=1_000_000.0 + EXPIRY_SECONDS,
    )
    record = dataclasses.replace(record, **changes)
    store.put(lease_key(NAME), record.encode())
    return record
