"""Storage of a simulated run: a dictionary, with a decision of the scheduler before every call."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from simulation.world import World

from cluster.errors import ObjectExists, ObjectMissing, StorageError
from cluster.storage import ObjectWriter, RangeReader, Store

ROOT = "memory://simulation"
T = TypeVar("T")


class SimulatedStore(Store):
    """Objects of ``world`` below ``prefix``; calls are made by the driver that runs."""

    def __init__(self, world: World, prefix: str = "") -> None:
        self.world, self._prefix = world, prefix
        self.url = f"{ROOT}/{prefix}".rstrip("/")

    def child(self, key: str) -> Store:
        return SimulatedStore(self.world, f"{self._prefix}{key}/")

    def read(self, key: str) -> bytes:
        return self._call("read", key, lambda: self._get(key), lambda data: f"{len(data)} bytes")

    def read_range(self, key: str, start: int, end: int) -> bytes:
        return self._call("read_range", key, lambda: self._get(key)[start:end])

    def open_reader(self, key: str) -> RangeReader:
        raise NotImplementedError("no driver reads what the simulation writes by ranges")

    def size(self, key: str) -> int:
        return self._call("size", key, lambda: len(self._get(key)), str)

    def version(self, key: str) -> str:
        return self._call("version", key, lambda: str(hash(self._get(key))))

    def keys(self, prefix: str = "") -> list[str]:
        return self._call("keys", prefix, lambda: self._list(prefix), lambda found: f"{len(found)} keys")

    def folders(self, prefix: str) -> list[str]:
        names = (key[len(prefix) + 1 :] for key in self.keys(prefix))
        return sorted({name.split("/")[0] for name in names if "/" in name})

    def put(self, key: str, data: bytes) -> None:
        self._call("put", key, lambda: self._set("put", key, data))

    def create(self, key: str, data: bytes) -> None:
        def write() -> bool:
            if self._prefix + key in self.world.objects:
                return False
            self._set("create", key, data)
            return True

        if not self._call("create", key, write, lambda won: "created" if won else "EXISTS"):
            raise ObjectExists(f"{self.url}/{key} exists already")

    @contextmanager
    def create_stream(self, key: str) -> Iterator[ObjectWriter]:
        buffer = io.BytesIO()
        yield buffer
        self.create(key, buffer.getvalue())

    def replace(self, key: str, data: bytes, expected: bytes) -> bool:
        def write() -> bool:
            if self.world.objects.get(self._prefix + key) != expected:
                return False
            self._set("replace", key, data)
            return True

        return self._call("replace", key, write, lambda won: "replaced" if won else "IS ANOTHER NOW")

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self._set("delete", key, None))

    def _get(self, key: str) -> bytes:
        data = self.world.objects.get(self._prefix + key)
        if data is None:
            raise ObjectMissing(f"{self.url}/{key} does not exist")
        return data

    def _list(self, prefix: str) -> list[str]:
        start = f"{self._prefix}{prefix}/" if prefix else self._prefix
        return sorted(key[len(self._prefix) :] for key in self.world.objects if key.startswith(start))

    def _set(self, call: str, key: str, data: bytes | None) -> None:
        full = self._prefix + key
        old = self.world.objects.get(full)
        if data is None:
            self.world.objects.pop(full, None)
        else:
            self.world.objects[full] = data
        if self.world.watch and old != data:
            self.world.watch.after_write(self.world.current, call, full, old, data)

    def _call(self, call: str, key: str, effect: Callable[[], T], show: Callable[[T], str] = lambda _: "") -> T:
        world, full = self.world, self._prefix + key
        move = world.decide(call, full)
        if move.kind == "lose request":
            world.note(call, full, "THE REQUEST IS LOST")
            raise StorageError(f"{full}: {call} failed on purpose")
        if world.watch and not world.inline:
            world.watch.before_call(world.current)
        line = len(world.trace)
        world.note(call, full, "")
        try:
            result = effect()
        except ObjectMissing:
            world.trace[line] = (*world.trace[line][:3], "there is none")
            raise
        world.trace[line] = (*world.trace[line][:3], show(result))
        if move.kind == "late answer":
            world.wait()
        if move.kind == "lose answer":
            world.note(call, full, "ITS ANSWER IS LOST")
            raise StorageError(f"{full}: {call} answered nothing, on purpose")
        return result
