"""What stopped writers left: folders of snapshots and merges that never got a manifest.

Storage does not say how old an object is everywhere, so a collection notes what it saw, and a later one removes what has
not changed for :data:`GRACE_HOURS` while nobody held a lease on the run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cluster.errors import LeaseHeld, ObjectMissing, StorageError
from cluster.fan_out import fan_out_local
from cluster.lease import Lease, hold_lease, read_record
from cluster.storage import Store
from configs.typed import parse_record
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.manifest import MANIFEST_KEY, parse_manifest
from tasks.checkpoints.pins import FOLDERS, GC_LEASE, is_in_force, is_pin
from tasks.checkpoints.run_folder import RUN_LEASE

ATTEMPTS_KEY = "retention/attempts.json"
GRACE_HOURS = 24.0
NUM_DELETERS = 8


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A folder without a manifest."""

    name: str
    """Folder below the run."""
    keys: tuple[str, ...]
    """Its objects, below the run."""
    bytes: int
    """Of them all."""
    fingerprint: str
    """Of names and versions: equal means that nobody wrote there."""
    first_seen: float
    """Unix seconds when a collection first saw it as it is."""
    is_removable: bool
    """Whether it may go."""
    reason: str
    """Why, or why not."""


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What is remembered of an attempt."""

    fingerprint: str
    """Names and versions of its objects."""
    first_seen: float
    """Unix seconds."""


def find_attempts(store: Store, known: Collection[str], now: float) -> list[Attempt]:
    """Folders of the run at ``store`` that hold no manifest and are none of ``known``."""
    seen = _read(store)
    busy = writers_at_work(store, now)
    names = [f"{folder}/{name}" for folder in FOLDERS for name in store.folders(folder)]
    found = [_look(store, name, seen, busy, now) for name in names if name not in known]
    return [attempt for attempt in found if attempt is not None]


def remove_attempts(store: Store, attempts: Collection[Attempt], lease: Lease) -> list[str]:
    """Remove those of ``attempts`` that may go and remember the others; names of those removed. Under the lease of a gc.

    Each under the lease that its writer would need, and only if it is still as it was seen: whoever began since keeps it.
    """
    removed = []
    for attempt in attempts:
        if not attempt.is_removable:
            continue
        lease.check()
        try:
            with hold_lease(store, _lease_of(attempt.name), clock=lease.clock) as writers:
                if _fingerprint(store, store.keys(attempt.name)) == attempt.fingerprint:
                    _remove(store, attempt, writers)
                    removed.append(attempt.name)
        except LeaseHeld:
            continue
    _write(store, {a.name: a for a in attempts if a.name not in removed})
    return removed


def writers_at_work(store: Store, now: float) -> list[str]:
    """Leases in force on the run, but those of collections and of readers."""
    held = []
    for key in store.keys("leases"):
        name = key.removeprefix("leases/").removesuffix(".json")
        data = store.read_if_present(key) if key.endswith(".json") and not is_pin(key) and name != GC_LEASE else None
        if data is not None and is_in_force(read_record(data), now):
            held.append(name)
    return held


def _look(store: Store, name: str, seen: Mapping[str, Sighting], busy: list[str], now: float) -> Attempt | None:
    keys = store.keys(name)
    if not keys or f"{name}/{MANIFEST_KEY}" in keys:
        return None
    try:
        size = sum(store.size(key) for key in keys)
    except ObjectMissing:
        return None  # somebody is at work there
    state = _fingerprint(store, keys)
    before = seen.get(name)
    first_seen = before.first_seen if before is not None and before.fingerprint == state else now
    hours = (now - first_seen) / 3600
    if busy:
        reason = f"never committed; a writer is at work ({', '.join(busy[:3])})"
    elif hours < GRACE_HOURS:
        reason = f"never committed; unchanged for {hours:.1f} h, goes after {GRACE_HOURS:.0f} h"
    else:
        reason = f"never committed; unchanged for {hours:.0f} h"
    return Attempt(
        name=name,
        keys=tuple(keys),
        bytes=size,
        fingerprint=state,
        first_seen=first_seen,
        is_removable=not busy and hours >= GRACE_HOURS,
        reason=reason,
    )


def _fingerprint(store: Store, keys: Collection[str]) -> str:
    """Of names and versions; what went meanwhile has none."""
    versions = []
    for key in keys:
        try:
            versions.append([key, store.version(key)])
        except ObjectMissing:
            versions.append([key, ""])
    return fingerprint(versions)


def _lease_of(name: str) -> str:
    """The lease under which what lies in the folder ``name`` is written and committed."""
    folder, _, own = name.partition("/")
    return f"merge-{own}" if folder == "merged" else RUN_LEASE


def _remove(store: Store, attempt: Attempt, lease: Lease) -> None:
    lease.check()
    list(fan_out_local(store.delete, attempt.keys, num_workers=NUM_DELETERS))
    store.child(attempt.name).abandon_uploads()
    _require_uncommitted(store, attempt)
    store.prune(attempt.name)


def _require_uncommitted(store: Store, attempt: Attempt) -> None:
    """A writer that stood still for a day and commits in this very moment must not leave a manifest without its shards."""
    data = store.read_if_present(f"{attempt.name}/{MANIFEST_KEY}")
    if data is None:
        return
    manifest = parse_manifest(data, f"{store.url}/{attempt.name}/{MANIFEST_KEY}")
    listed = {shard.key for shard in manifest.shards} | {file.key for file in manifest.files}
    if {f"{attempt.name}/{key}" for key in listed} & set(attempt.keys):
        store.delete(f"{attempt.name}/{MANIFEST_KEY}")
        raise StorageError(
            f"{store.url}/{attempt.name} was committed, a day late, while what it lists was being removed; its manifest "
            "was taken back. Stop the writer that did so"
        )


def _read(store: Store) -> dict[str, Sighting]:
    data = store.read_if_present(ATTEMPTS_KEY)
    try:
        return {name: parse_record(Sighting, row) for name, row in json.loads(data or b"{}").items()}
    except (ValueError, TypeError, AttributeError):
        return {}  # forgotten: the grace begins again


def _write(store: Store, attempts: Mapping[str, Attempt]) -> None:
    seen = {n: Sighting(fingerprint=a.fingerprint, first_seen=a.first_seen) for n, a in sorted(attempts.items())}
    data = json.dumps({name: dataclasses.asdict(sighting) for name, sighting in seen.items()}).encode()
    if data != (store.read_if_present(ATTEMPTS_KEY) or b"{}"):
        store.put(ATTEMPTS_KEY, data)
