"""Bugs to plant: each takes one guard out of the protocol, and the simulator must find it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from simulation.drivers import write_data
from simulation.store import SimulatedStore
from simulation.world import Driver, Rules, World

from cluster.errors import LeaseHeld, LeaseLost, ObjectExists
from cluster.lease import Lease, is_free, lease_key, read_record
from cluster.storage import Store
from tasks.checkpoints.digest import digest_bytes
from tasks.checkpoints.manifest import (
    INDEX_KEY,
    MANIFEST_KEY,
    Manifest,
    Shard,
    SideFile,
    encode_manifest,
    read_manifest,
)
from tasks.checkpoints.writer import build_index, commit_manifest

UNWRITTEN: dict[str, bytes] = {}
"""Shards by digest, for bugs that publish before they write."""


def content_of_driver(driver: Driver) -> bytes:
    """Weights that differ from driver to driver, as where a gang came back with other ranks."""
    return content_of_name(driver.name)


def content_of_name(name: str) -> bytes:
    """The weights that the driver ``name`` makes."""
    return (name * 8).encode()


def never_check(lease: Lease) -> Callable[[], None]:
    """The token is not checked at all."""
    return lambda: None


def check_token_only(lease: Lease) -> Callable[[], None]:
    """The token is checked, the expiry is not."""

    def check() -> None:
        if read_record(lease.store.read(lease_key(lease.name))).token != lease.token:
            raise LeaseLost

    return check


def check_by_a_clock_read_before(lease: Lease) -> Callable[[], None]:
    """The clock is read before the lease, whose answer may be late."""

    def check() -> None:
        now = lease.clock()
        current = read_record(lease.store.read(lease_key(lease.name)))
        if current.token != lease.token or now >= current.expires_at:
            raise LeaseLost

    return check


def commit_without_second_check(store: Store, manifest: Manifest, _: Callable[[], None]) -> Manifest:
    """The token is checked before the side files, and not again before the manifest."""
    return commit_manifest(store, manifest, lambda: None)


def commit_by_put(store: Store, manifest: Manifest, check: Callable[[], None]) -> Manifest:
    """The manifest is written whether one is there or not."""
    check()
    store.put(MANIFEST_KEY, encode_manifest(manifest))
    return manifest


def commit_if_it_does_not_exist(store: Store, manifest: Manifest, check: Callable[[], None]) -> Manifest:
    """Create-if-absent in two steps, as on storage that cannot do it in one."""
    if store.exists(MANIFEST_KEY):
        return read_manifest(store)[0]
    check()
    store.put(MANIFEST_KEY, encode_manifest(manifest))
    return manifest


def commit_leaving_the_index(store: Store, manifest: Manifest, check: Callable[[], None]) -> Manifest:
    """Whoever finds that it came too late leaves its index where it is."""
    check()
    try:
        store.create(MANIFEST_KEY, encode_manifest(manifest))
    except ObjectExists:
        return read_manifest(store)[0]
    return manifest


def describe_shard(_: Store, data: bytes) -> Shard:
    """The shard is described, and not written yet."""
    return describe_unwritten(data)


def describe_unwritten(data: bytes) -> Shard:
    """A shard of ``data`` that is in no storage yet."""
    scratch = SimulatedStore(World({}, Rules(), skews=(0.0,)))
    shard = write_data(scratch, data)
    UNWRITTEN[shard.digest] = scratch.read(shard.key)
    return shard


def commit_before_shard(store: Store, manifest: Manifest, check: Callable[[], None]) -> Manifest:
    """The manifest first, then its shard."""
    standing = commit_manifest(store, manifest, check)
    put_shard(store, manifest.shards[0])
    return standing


def overwrite_shard(store: Store, data: bytes) -> Shard:
    """A shard is written over that of another attempt."""
    shard = describe_unwritten(data)
    put_shard(store, shard)
    return shard


def put_shard(store: Store, shard: Shard) -> None:
    store.put(shard.key, UNWRITTEN[shard.digest])


def write_shard_once(store: Store, data: bytes) -> Shard:
    """A shard that an earlier attempt left is in the way."""
    shard = describe_unwritten(data)
    store.create(shard.key, UNWRITTEN[shard.digest])
    return shard


def put_side_files(
    store: Store, contents: Mapping[str, bytes], shards: Iterable[Shard], check: Callable[[], None]
) -> tuple[SideFile, ...]:
    """Check, look for a manifest, and only then write: much can happen in between."""
    check()
    everything = {**contents, INDEX_KEY: build_index(shards)}
    if not store.exists(MANIFEST_KEY):
        for key, data in everything.items():
            store.put(key, data)
    return tuple(SideFile(key=key, bytes=len(data), digest=digest_bytes(data)) for key, data in everything.items())


def remove_leftovers(store: Store, lease: Lease) -> None:
    """No manifest was there a call ago, so everything here is abandoned."""
    for key in store.keys(""):
        store.delete(key)


def remove_leftovers_checking(store: Store, lease: Lease) -> None:
    """The same, with the token checked before every deletion: it fences writes that create, and no deletion."""
    for key in store.keys(""):
        lease.check()
        store.delete(key)


class TakesOverByPut(Lease):
    """A take-over without compare-and-swap."""

    def acquire(self) -> None:
        mine = self._record().encode()
        try:
            self.store.create(lease_key(self.name), mine)
        except ObjectExists:
            if not is_free(read_record(self.store.read(lease_key(self.name))), self.clock()):
                raise LeaseHeld from None
            self.store.put(lease_key(self.name), mine)
        self._held = mine


class RenewsByPut(Lease):
    """A renewal without compare-and-swap."""

    def renew(self) -> None:
        self._held = self._record().encode()
        self.store.put(lease_key(self.name), self._held)


class ReleasesByPut(Lease):
    """A release that does not look whose lease it is."""

    def release(self) -> None:
        if self._held is not None:
            self.store.put(lease_key(self.name), self._record(released=True).encode())
            self._held = None


class RemovesAfterRelease(Lease):
    """A lease object that is deleted after it was given back."""

    def release(self) -> None:
        super().release()
        self.store.delete(lease_key(self.name))
