"""Take away what retention gives up: announced first, manifest before shards, and safe to stop anywhere.

1. Under the lease ``gc``, what the plan gives up is announced as dooms.
2. Only then everything is read again, pins first: what is needed after all is withdrawn.
3. Each that is left: its manifest is copied aside, then deleted, then every object that it listed.

A snapshot is visible while its manifest is, and from then on it is whole; without a manifest it does not exist. Whoever
stops in between leaves dooms, and the next collection withdraws or finishes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from cluster.errors import LeaseHeld
from cluster.fan_out import fan_out_local
from cluster.lease import Lease, hold_lease
from cluster.storage import Store
from tasks.checkpoints.collected import kept_manifest_key
from tasks.checkpoints.dooms import Doom, DoomList
from tasks.checkpoints.manifest import MANIFEST_KEY, Manifest, parse_manifest
from tasks.checkpoints.pins import GC_LEASE
from tasks.checkpoints.retention import RetentionPlan, RetentionRow

ATTEMPT_KEY = "receipts/attempt"
"""Marks a folder in which a merge is under way (tasks.merging.merge)."""
NUM_DELETERS = 8
"""Objects deleted at once."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What one collection did."""

    plan: RetentionPlan
    """As it was after the dooms were announced."""
    collected: tuple[Doom, ...]
    """What was taken away, or finished after an earlier collection had stopped."""
    notes: tuple[str, ...]
    """What was left for now, and why."""


def collect(
    store: Store,
    survey: Callable[[], RetentionPlan],
    *,
    clock: Callable[[], float],
    tidy: Callable[[Lease], None] = lambda _: None,
) -> Collection:
    """Take away what ``survey`` gives up, which reads the run at ``store`` anew each time, pins before all else.

    ``tidy`` is called last, under the same lease. Raises :class:`cluster.errors.LeaseHeld` if another collection is at work,
    :class:`cluster.errors.LeaseLost` if another took over.
    """
    with hold_lease(store, GC_LEASE, clock=clock) as lease:
        dooms = DoomList(store)
        notes: list[str] = []
        finished = [doom.name for doom in _unfinished(dooms) if _finish(store, doom, lease, notes)]
        collected = _mark(dooms, finished, clock())
        _announce(dooms, survey(), lease, clock())
        lease.check()
        plan = survey()
        _withdraw(dooms, plan)
        gone = [doom.name for doom in _unfinished(dooms) if _take_away(store, doom, lease, notes)]
        collected += _mark(dooms, gone, clock())
        _release(dooms, plan)
        tidy(lease)
    return Collection(plan=plan, collected=collected, notes=tuple(notes))


def _announce(dooms: DoomList, plan: RetentionPlan, lease: Lease, now: float) -> None:
    """Doom what ``plan`` gives up; what earlier dooms said of names that are visible now is out of date."""
    visible = {row.name for row in plan.rows}
    before = [doom for name, doom in dooms.dooms.items() if name not in visible]
    dooms.write([*before, *(_doom(row, lease, now) for row in plan.doomed)])


def _doom(row: RetentionRow, lease: Lease, now: float) -> Doom:
    return Doom(name=row.name, step=row.step, digest=row.digest, created=row.created, token=lease.token, doomed_at=now)


def _withdraw(dooms: DoomList, plan: RetentionPlan) -> None:
    """Take back the dooms of what ``plan``, which was made after they were announced, keeps."""
    kept = {row.name for row in plan.rows if row.action == "keep"}
    dooms.write([doom for doom in dooms.dooms.values() if doom.collected_at is not None or doom.name not in kept])


def _unfinished(dooms: DoomList) -> list[Doom]:
    return [doom for doom in dooms.dooms.values() if doom.collected_at is None]


def _mark(dooms: DoomList, gone: Sequence[str], now: float) -> tuple[Doom, ...]:
    """Note that ``gone`` are gone."""
    done = tuple(dataclasses.replace(dooms.dooms[name], collected_at=now) for name in gone)
    dooms.write([*done, *(doom for doom in dooms.dooms.values() if doom.name not in gone)])
    return done


def _release(dooms: DoomList, plan: RetentionPlan) -> None:
    """What was left whole is doomed no more; what was left without a manifest still is, for the next collection."""
    whole = {row.name for row in plan.rows}
    dooms.write([doom for doom in dooms.dooms.values() if doom.collected_at is not None or doom.name not in whole])


def _take_away(store: Store, doom: Doom, lease: Lease, notes: list[str]) -> bool:
    """Delete a doomed checkpoint that is whole; whether it is gone."""
    data = store.read_if_present(f"{doom.name}/{MANIFEST_KEY}")
    if data is None:
        return _finish(store, doom, lease, notes)
    manifest = parse_manifest(data, f"{store.url}/{doom.name}/{MANIFEST_KEY}")
    if not doom.is_of(manifest) or manifest.source is not None:
        notes.append(f"{doom.name} is not what was planned for any more; left alone")
        return False
    with _alone(store, doom.name, lease, notes) as is_alone:
        if is_alone:
            store.put(kept_manifest_key(doom.name), data)
            lease.check()
            store.delete(f"{doom.name}/{MANIFEST_KEY}")
            _delete_listed(store, doom.name, manifest, lease)
        return is_alone


def _finish(store: Store, doom: Doom, lease: Lease, notes: list[str]) -> bool:
    """Delete the rest of a checkpoint whose manifest an earlier collection deleted; whether it is gone."""
    if store.exists(f"{doom.name}/{MANIFEST_KEY}"):
        return False
    with _alone(store, doom.name, lease, notes) as is_alone:
        data = store.read_if_present(kept_manifest_key(doom.name))
        if is_alone and data is not None:
            manifest = parse_manifest(data, f"{store.url}/{kept_manifest_key(doom.name)}")
            if doom.is_of(manifest):
                _delete_listed(store, doom.name, manifest, lease)
        return is_alone


def _delete_listed(store: Store, name: str, manifest: Manifest, lease: Lease) -> None:
    """Delete what ``manifest`` lists, small files last: an emptied folder is what a new attempt asks for."""
    if store.exists(f"{name}/{ATTEMPT_KEY}"):
        return  # a merge of the same name was begun since: its objects bear the same keys
    for keys in ([shard.key for shard in manifest.shards], [file.key for file in manifest.files]):
        lease.check()
        list(fan_out_local(store.delete, [f"{name}/{key}" for key in keys], num_workers=NUM_DELETERS))
    store.child(name).abandon_uploads()
    store.prune(name)


@contextmanager
def _alone(store: Store, name: str, lease: Lease, notes: list[str]) -> Iterator[bool]:
    """Hold the lease under which a merge is made, so that nobody makes it anew meanwhile; snapshots have none."""
    folder, _, merge = name.partition("/")
    with ExitStack() as stack:
        if folder == "merged":
            try:
                # It stays behind, released: whoever deletes it could delete the next holder's.
                stack.enter_context(hold_lease(store, f"merge-{merge}", clock=lease.clock))
            except LeaseHeld as held:
                notes.append(f"{name} is left for now: {held}")
                yield False
                return
        yield True
