"""Pins: whoever reads checkpoints of a run for a while says so first, and retention leaves them alone.

The order makes it safe. A reader writes its pin, then reads the dooms; retention writes its dooms, then reads the pins.
Whichever came second sees the other: no checkpoint is deleted under a reader, and a reader never begins on one that is
being deleted. A pin is a lease of its own and expires like one, so that a dead reader holds nothing for long.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from cluster.errors import LeaseHeld, ObjectMissing, StorageDenied, StorageError
from cluster.lease import LeaseRecord, hold_lease, is_free, lease_key, read_record
from cluster.storage import Store, open_store
from configs.errors import UserError
from tasks.checkpoints.dooms import Commit, Doom, DoomList, HasUrl, commit_of, read_dooms, when
from tasks.checkpoints.manifest import MANIFEST_KEY
from tasks.checkpoints.run_folder import RUN_KEY

GC_LEASE = "gc"
PIN_PREFIX = "pin-"
FOLDERS = ("snapshots", "merged")
SKEW_SECONDS = 30.0
"""How long after its expiry another's pin, or another's collection, still counts: clocks differ, machines pause."""
logger = logging.getLogger(__name__)


class InputCollected(UserError):
    """A checkpoint that was about to be read is being taken away by retention, or is gone already."""


@contextmanager
def hold_pins(inputs: Iterable[HasUrl], *, clock: Callable[[], float] = time.time) -> Iterator[None]:
    """Keep ``inputs`` from retention for the length of the block, wherever they lie in runs; others need no pin.

    Raises :class:`InputCollected` before the block if retention has begun to take one away. Some six small requests.
    Storage that cannot be written is read without a pin: then an input that vanishes is an error of the block.
    """
    with ExitStack() as stack:
        for store, wanted in _by_run(inputs):
            stack.enter_context(_pinned_in_run(store, wanted, clock))
        yield


def pins_in_force(store: Store, now: float) -> dict[str, str]:
    """Pinned folders of the run at ``store`` to their holders; a damaged pin is an error, never no pin."""
    # A pin that is renewed in mid-listing is a new file in the folder's place of the old: some file systems miss it once.
    keys = {key for _ in range(2) for key in store.keys("leases") if is_pin(key)}
    pinned: dict[str, str] = {}
    for key in sorted(keys):
        data = store.read_if_present(key)
        held = read_record(data) if data is not None else None
        if held is not None and is_in_force(held, now):
            pinned |= dict.fromkeys(held.pins, held.owner)
    return pinned


def is_pin(key: str) -> bool:
    """Whether the lease object ``key`` is a pin."""
    return key.startswith(f"leases/{PIN_PREFIX}") and key.endswith(".json")


def is_in_force(held: LeaseRecord, now: float) -> bool:
    """Whether a lease counts at ``now``, with a margin for clocks that differ."""
    return not is_free(held, now - SKEW_SECONDS)


def checkpoint_name(url: str) -> tuple[str, str] | None:
    """The run and the folder below it, as ``snapshots/step-...``, of a checkpoint's URL; None if it names no such place."""
    for folder in FOLDERS:
        run, found, name = url.rpartition(f"/{folder}/")
        if found and name and "/" not in name:
            return run, f"{folder}/{name}"
    return None


def _by_run(inputs: Iterable[HasUrl]) -> list[tuple[Store, dict[str, Commit | None]]]:
    """Names to pin in each run, and what is known of their commits; folders that are in no run are left out."""
    runs: dict[str, dict[str, Commit | None]] = {}
    for item in inputs:
        place = checkpoint_name(open_store(item.url).url)
        if place is not None:
            runs.setdefault(place[0], {})[place[1]] = commit_of(item)
    stores = [(open_store(url), wanted) for url, wanted in runs.items()]
    return [(store, wanted) for store, wanted in stores if store.exists(RUN_KEY)]


@contextmanager
def _pinned_in_run(store: Store, wanted: Mapping[str, Commit | None], clock: Callable[[], float]) -> Iterator[None]:
    name = f"{PIN_PREFIX}{secrets.token_hex(8)}"
    with ExitStack() as stack:
        try:
            stack.enter_context(hold_lease(store, name, clock=clock, pins=tuple(sorted(wanted))))
            stack.callback(_forget, store, name)
        except StorageDenied as error:
            logger.warning("%s: checkpoints of %s are read without a pin", error, store.url)
        _require_spared(store, wanted, clock)
        try:
            yield
        except ObjectMissing as error:
            # Without a pin, or while this process stood still for longer than it holds.
            if doomed := _doomed(read_dooms(store), wanted):
                raise InputCollected(
                    f"{store.url}/{doomed[0].name} was taken away by retention while it was read, for no pin was in "
                    "force; nothing was published"
                ) from error
            raise


def _forget(store: Store, name: str) -> None:
    """Remove a pin that has served; what was read under it stands, whatever becomes of this."""
    try:
        store.delete(lease_key(name))
    except StorageError as error:
        logger.warning("the pin %s could not be removed and will expire: %s", name, error)


def _require_spared(store: Store, wanted: Mapping[str, Commit | None], clock: Callable[[], float]) -> None:
    """Raise :class:`InputCollected` if one of ``wanted``, which are pinned, is doomed; dooms of a dead gc are lifted."""
    doomed = _doomed(read_dooms(store), wanted)
    for doom in doomed:
        if doom.collected_at is not None:
            raise InputCollected(
                f"{store.url}/{doom.name} was collected by retention on {when(doom.collected_at)}; choose other inputs"
            )
    if not doomed:
        return
    data = store.read_if_present(lease_key(GC_LEASE))
    held = read_record(data) if data is not None else None
    if held is not None and is_in_force(held, clock()):
        raise _being_collected(store, doomed[0], f"by {held.owner}")
    try:
        with hold_lease(store, GC_LEASE, clock=clock):
            _lift(store, wanted)
    except LeaseHeld as held_now:
        raise _being_collected(store, doomed[0], f"({held_now})") from held_now


def _lift(store: Store, wanted: Mapping[str, Commit | None]) -> None:
    """Withdraw the dooms of ``wanted`` that a dead gc left, under its lease; what it has begun to delete is gone."""
    dooms = DoomList(store)
    left = _doomed(dooms.dooms, wanted)
    for doom in left:
        if doom.collected_at is not None or not store.exists(f"{doom.name}/{MANIFEST_KEY}"):
            raise _being_collected(store, doom, "by a gc that was stopped; the next `pma gc --apply` finishes it")
    names = {doom.name for doom in left}
    dooms.write(doom for doom in dooms.dooms.values() if doom.name not in names)


def _doomed(dooms: Mapping[str, Doom], wanted: Mapping[str, Commit | None]) -> list[Doom]:
    return [dooms[name] for name, commit in sorted(wanted.items()) if name in dooms and dooms[name].is_of(commit)]


def _being_collected(store: Store, doom: Doom, by: str) -> InputCollected:
    return InputCollected(
        f"{store.url}/{doom.name} is being collected by retention {by}; nothing was read. Choose other inputs, or keep "
        "it by a rule of the run's `retention` section (a milestone, for example) and try again"
    )
