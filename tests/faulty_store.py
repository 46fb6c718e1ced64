"""A store that fails where a test says so."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from cluster.errors import StorageError
from cluster.storage import ObjectWriter, RangeReader, Store

Fail = Callable[[str, str], bool]
REQUESTS = frozenset({"read", "size", "put", "create", "create_stream", "complete", "replace"})
"""What is one request, or the end of the retries of one; the writes of a stream are not: a store retries its parts."""


class Sometimes:
    """A ``fail`` that fails a part ``rate`` of all requests, drawn from ``seed``, and counts them; safe across threads."""

    def __init__(self, rate: float, seed: int, methods: Collection[str] = REQUESTS) -> None:
        self.rate, self.methods = rate, methods
        self.failures = 0
        self._draws, self._lock = random.Random(seed), threading.Lock()

    def __call__(self, method: str, _key: str) -> bool:
        with self._lock:
            fails = method in self.methods and self._draws.random() < self.rate
            self.failures += fails
        return fails


class FaultyStore(Store):
    """Forwards to ``inner``, but raises :class:`StorageError` before a call for which ``fail(method, key)`` is true.

    Methods are those of :class:`Store`, ``read_into`` of a reader, and of a stream ``write`` and ``complete``.
    Every ranged read takes ``slow_read_seconds`` longer, every write of a stream ``slow_write_seconds``. A ``fail`` that does
    not return makes a call that stands still.
    """

    def __init__(
        self, inner: Store, fail: Fail, *, slow_read_seconds: float = 0.0, slow_write_seconds: float = 0.0
    ) -> None:
        self.inner, self.fail, self.slow_read_seconds = inner, fail, slow_read_seconds
        self.slow_write_seconds = slow_write_seconds
        self.url = inner.url

    def check(self, method: str, key: str) -> None:
        if self.fail(method, key):
            raise StorageError(f"{self.url}/{key}: {method} failed on purpose")

    def pause(self) -> None:
        if self.slow_read_seconds:
            time.sleep(self.slow_read_seconds)

    @property
    def reads_ahead(self) -> bool:
        return self.inner.reads_ahead

    def child(self, key: str) -> Store:
        return FaultyStore(
            self.inner.child(key),
            lambda method, below: self.fail(method, f"{key}/{below}"),
            slow_read_seconds=self.slow_read_seconds,
            slow_write_seconds=self.slow_write_seconds,
        )

    def read(self, key: str) -> bytes:
        self.check("read", key)
        return self.inner.read(key)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self.check("read_range", key)
        self.pause()
        return self.inner.read_range(key, start, end)

    def open_reader(self, key: str) -> RangeReader:
        self.check("open_reader", key)
        return FaultyReader(self, key)

    def size(self, key: str) -> int:
        self.check("size", key)
        return self.inner.size(key)

    def version(self, key: str) -> str:
        self.check("version", key)
        return self.inner.version(key)

    def keys(self, prefix: str = "") -> list[str]:
        self.check("keys", prefix)
        return self.inner.keys(prefix)

    def folders(self, prefix: str) -> list[str]:
        self.check("folders", prefix)
        return self.inner.folders(prefix)

    def put(self, key: str, data: bytes) -> None:
        self.check("put", key)
        self.inner.put(key, data)

    def create(self, key: str, data: bytes) -> None:
        self.check("create", key)
        self.inner.create(key, data)

    @contextmanager
    def create_stream(self, key: str) -> Iterator[ObjectWriter]:
        self.check("create_stream", key)
        with self.inner.create_stream(key) as out:
            yield FaultyWriter(self, key, out)
            self.check("complete", key)

    def replace(self, key: str, data: bytes, expected: bytes) -> bool:
        self.check("replace", key)
        return self.inner.replace(key, data, expected)

    def delete(self, key: str) -> None:
        self.check("delete", key)
        self.inner.delete(key)

    def prune(self, prefix: str) -> None:
        self.check("prune", prefix)
        self.inner.prune(prefix)

    def abandon_uploads(self) -> int:
        self.check("abandon_uploads", "")
        return self.inner.abandon_uploads()


class FaultyReader:
    """Reads that fail or take their time."""

    def __init__(self, store: FaultyStore, key: str) -> None:
        self.store, self.key = store, key
        self.inner = store.inner.open_reader(key)

    def read_into(self, start: int, buffer: memoryview) -> None:
        self.store.check("read_into", self.key)
        self.store.pause()
        self.inner.read_into(start, buffer)

    def close(self) -> None:
        self.inner.close()


class FaultyWriter:
    """Writes that fail."""

    def __init__(self, store: FaultyStore, key: str, inner: ObjectWriter) -> None:
        self.store, self.key, self.inner = store, key, inner

    def write(self, data: bytes | memoryview) -> object:
        self.store.check("write", self.key)
        time.sleep(self.store.slow_write_seconds)
        return self.inner.write(data)
