"""What must hold in every state that storage goes through, whatever the scheduler does."""

from __future__ import annotations

import functools
import json
from typing import Any

from simulation.world import Driver, World

from cluster.lease import lease_key
from pipelines.steps import FOLDER as STEPS
from tasks.checkpoints.digest import digest_bytes
from tasks.checkpoints.manifest import INDEX_KEY, MANIFEST_KEY, Manifest, parse_manifest


class Invariants:
    """Watches the writes of one world.

    1. A manifest never changes or goes away; what it lists is there, with the listed digest, from the moment it is
       visible. The index alone may be written by two attempts: it is the listed one when nobody runs any more. If its
       manifest came from a driver that lost the lease within the window below, and then one was killed or a call was
       lost, it may be that of another attempt, whose shards are all there.
    2. A driver publishes only if its lease was its own and unexpired, by its own clock, when the call before took
       effect: the window between check and publication is one call.
       The same holds for the record of a step, whose output is published by then.
    3. Nobody writes or removes the lease of a driver that works under it, while it has not expired by that one's clock.
       Once the output is published, its lease may be removed: whoever holds it then finds the work done.
    """

    def __init__(self, world: World, *, watch_leases: bool = True) -> None:
        self.world, self.watch_leases = world, watch_leases
        self.published: dict[str, dict[str, str]] = {}
        """Folder of a manifest to what it lists: full key to digest."""
        self.was_published_late = False
        """Whether a manifest came from a driver that lost its lease between the call before and the publication."""
        world.watch = self
        for key, data in world.objects.items():
            if key.endswith(MANIFEST_KEY):
                self.published[key.removesuffix(MANIFEST_KEY)] = listed(key, data)

    def before_call(self, driver: Driver) -> None:
        """Remember whether the driver's lease was its own at its last call."""
        driver.held_at_last_call, driver.held_now = driver.held_now, self._holds(driver)

    def after_write(self, driver: Driver, call: str, key: str, old: bytes | None, new: bytes | None) -> None:
        """Check what the write touched."""
        if "leases/" in key:
            if self.watch_leases:
                self._check_lease(driver, call, key, old)
        elif key.endswith(MANIFEST_KEY):
            self._check_manifest(driver, call, key, old, new)
        elif key.startswith(f"{STEPS}/"):
            self._check_record(driver, call, key, old)
        else:
            for files in self.published.values():
                if key in files and not key.endswith(INDEX_KEY):
                    self._check_object(key, files[key])

    def allows_another_index(self) -> bool:
        """Whether the index may be that of another attempt for ever."""
        disturbed = any(not driver.alive or driver.lost_calls for driver in self.world.drivers)
        return self.was_published_late and disturbed

    def check_at_rest(self, *, another_index: bool) -> None:
        """Everything that is listed; the index may be another one only if ``another_index``."""
        for folder, files in self.published.items():
            for key, digest in files.items():
                if not (another_index and key.endswith(INDEX_KEY)):
                    self._check_object(key, digest)
            for shard in shards_of(self.world.objects[folder + INDEX_KEY]):
                if folder + shard not in self.world.objects:
                    self.world.fail(f"the index of {folder} names {shard}, which is not there")

    def _check_manifest(self, driver: Driver, call: str, key: str, old: bytes | None, new: bytes | None) -> None:
        if old is not None or new is None:
            self.world.fail(f"{driver.name} changed a published manifest by {call}: {key}")
        elif not driver.held_at_last_call:
            self.world.fail(f"{driver.name} published {key} although its lease was not its own at its call before")
        else:
            files = listed(key, new)
            for name, digest in files.items():
                if not name.endswith(INDEX_KEY):
                    self._check_object(name, digest)
            self.published[key.removesuffix(MANIFEST_KEY)] = files
            self.was_published_late |= not driver.held_now

    def _check_record(self, driver: Driver, call: str, key: str, old: bytes | None) -> None:
        if old is not None:
            self.world.fail(f"{driver.name} changed a step record by {call}: {key}")
        elif not driver.held_at_last_call:
            self.world.fail(f"{driver.name} recorded {key} although its lease was not its own at its call before")
        elif not self.published:
            self.world.fail(f"{driver.name} recorded {key} although its output is not there")

    def _check_object(self, key: str, digest: str) -> None:
        data = self.world.objects.get(key)
        if data is None:
            self.world.fail(f"{key} is listed in a published manifest and is not there")
        elif digest_of(data) != digest:
            self.world.fail(f"{key} is listed in a published manifest with another digest")

    def _check_lease(self, driver: Driver, call: str, key: str, old: bytes | None) -> None:
        record = lease_of(old)
        holder = self._holder(record)
        if holder is None or holder is driver or record["released"] or (call == "delete" and self.published):
            return
        if holder.lease is None or not key.endswith(lease_key(holder.lease.name)):
            return  # on its way out, or under another lease by now
        left = record["expires_at"] - holder.clock()
        if left > 0:
            self.world.fail(
                f"{driver.name} wrote {key} by {call} while {holder.name} held it for {left:g} s more by its own clock"
            )

    def _holds(self, driver: Driver) -> bool:
        if driver.lease is None:
            return False
        name = lease_key(driver.lease.name)
        data = next((data for key, data in self.world.objects.items() if key.endswith(name)), None)
        record = lease_of(data)
        return self._holder(record) is driver and not record["released"] and driver.clock() < record["expires_at"]

    def _holder(self, record: dict[str, Any]) -> Driver | None:
        name = str(record.get("token", "")).split("-")[0]
        return next((driver for driver in self.world.drivers if driver.name == name), None)


@functools.cache
def lease_of(data: bytes | None) -> dict[str, Any]:
    """Fields of a lease object; none if it is absent."""
    return {} if data is None else dict(json.loads(data))


@functools.cache
def shards_of(index: bytes) -> set[str]:
    """Objects that an index names."""
    return set(json.loads(index)["weight_map"].values())


@functools.cache
def digest_of(data: bytes) -> str:
    """Digest of an object; the same few objects come again and again."""
    return digest_bytes(data)


@functools.cache
def listed(key: str, data: bytes) -> dict[str, str]:
    """Full keys and digests of what the manifest ``data`` at ``key`` lists."""
    manifest = read(data)
    folder = key.removesuffix(MANIFEST_KEY)
    shards = {folder + shard.key: shard.digest for shard in manifest.shards}
    return shards | {folder + file.key: file.digest for file in manifest.files}


@functools.cache
def read(data: bytes) -> Manifest:
    """A manifest; the same few come again and again."""
    return parse_manifest(data, "simulation")
