"""A store whose single requests are tried again after a pause, for the many small ones that a commit is made of."""

from __future__ import annotations

from contextlib import AbstractContextManager

from cluster.storage import ObjectWriter, RangeReader, Store
from tasks.training.snapshots.upload import Retries


class PatientStore(Store):
    """Forwards to ``inner``; every request but a stream is repeated as ``retries`` says.

    A request whose answer was lost may have been carried out, and its repetition then finds its own work: :meth:`create` says
    that the object exists, :meth:`replace` that it holds something else. Callers look what is there, as after any conflict.
    """

    def __init__(self, inner: Store, retries: Retries) -> None:
        self.url, self._inner, self._retries = inner.url, inner, retries

    def child(self, key: str) -> Store:
        """The same, rooted at ``key``."""
        return PatientStore(self._inner.child(key), self._retries)

    def read(self, key: str) -> bytes:
        """As the store's."""
        return self._retries.run(lambda: self._inner.read(key), f"reading {self.url}/{key}")

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """As the store's."""
        return self._retries.run(lambda: self._inner.read_range(key, start, end), f"reading {self.url}/{key}")

    def open_reader(self, key: str) -> RangeReader:
        """As the store's; its reads are not repeated."""
        return self._retries.run(lambda: self._inner.open_reader(key), f"opening {self.url}/{key}")

    def size(self, key: str) -> int:
        """As the store's."""
        return self._retries.run(lambda: self._inner.size(key), f"looking for {self.url}/{key}")

    def version(self, key: str) -> str:
        """As the store's."""
        return self._retries.run(lambda: self._inner.version(key), f"looking for {self.url}/{key}")

    def keys(self, prefix: str = "") -> list[str]:
        """As the store's."""
        return self._retries.run(lambda: self._inner.keys(prefix), f"listing {self.url}/{prefix}")

    def folders(self, prefix: str) -> list[str]:
        """As the store's."""
        return self._retries.run(lambda: self._inner.folders(prefix), f"listing {self.url}/{prefix}")

    def put(self, key: str, data: bytes) -> None:
        """As the store's."""
        self._retries.run(lambda: self._inner.put(key, data), f"writing {self.url}/{key}")

    def create(self, key: str, data: bytes) -> None:
        """As the store's."""
        self._retries.run(lambda: self._inner.create(key, data), f"writing {self.url}/{key}")

    def create_stream(self, key: str) -> AbstractContextManager[ObjectWriter]:
        """As the store's: a stream is repeated by who makes it."""
        return self._inner.create_stream(key)

    def replace(self, key: str, data: bytes, expected: bytes) -> bool:
        """As the store's."""
        return self._retries.run(lambda: self._inner.replace(key, data, expected), f"writing {self.url}/{key}")

    def delete(self, key: str) -> None:
        """As the store's."""
        self._retries.run(lambda: self._inner.delete(key), f"deleting {self.url}/{key}")
