"""What fsspec does for us: ``memory://`` storage, and reading data files of any scheme."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec

from cluster.errors import ObjectExists, ObjectMissing, ObjectTruncated, StorageError
from cluster.storage import ObjectWriter, RangeReader, Store, scheme_of
from configs.errors import UserError

_guard = threading.Lock()
OPTIONS: dict[str, dict[str, bool]] = {"local": {"auto_mkdir": True}}
"""Arguments of file systems that need some."""


class FsspecStore(Store):
    """Objects of an fsspec file system; :meth:`create` and :meth:`replace` are atomic among threads of this process alone."""

    def __init__(self, url: str) -> None:
        scheme = scheme_of(url)
        self.url = url
        # A cached listing would hide what other machines commit.
        self.fs = fsspec.filesystem(scheme, use_listings_cache=False, **OPTIONS.get(scheme, {}))
        self._root = self.fs._strip_protocol(url).rstrip("/")

    def read(self, key: str) -> bytes:
        with self._mapped_errors(key):
            data = self.fs.cat_file(self._path(key))
            assert isinstance(data, bytes)
            return data

    def read_range(self, key: str, start: int, end: int) -> bytes:
        with self._mapped_errors(key):
            data = self.fs.cat_file(self._path(key), start=start, end=end) if end > start else b""
        if len(data) != end - start:
            raise ObjectTruncated(
                f"{self.url}/{key}: ends at byte {start + len(data)}, bytes {start} to {end} were asked for"
            )
        assert isinstance(data, bytes)
        return data

    def open_reader(self, key: str) -> RangeReader:
        return FsspecReader(self, key)

    def size(self, key: str) -> int:
        with self._mapped_errors(key):
            return int(self.fs.info(self._path(key))["size"])

    def version(self, key: str) -> str:
        with self._mapped_errors(key):
            info = self.fs.info(self._path(key))
        # What file systems call it differs.
        return "-".join(str(info.get(name)) for name in ("size", "etag", "ETag", "generation", "mtime", "created"))

    def keys(self, prefix: str = "") -> list[str]:
        base = self._path(prefix) if prefix else self._root
        with self._mapped_errors(prefix):
            found = self.fs.find(base)
        return sorted(path[len(self._root) + 1 :] for path in found)

    def folders(self, prefix: str) -> list[str]:
        try:
            with self._mapped_errors(prefix):
                entries = self.fs.ls(self._path(prefix), detail=True)
        except ObjectMissing:
            return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[1] for entry in entries if entry["type"] == "directory")

    def put(self, key: str, data: bytes) -> None:
        with self._mapped_errors(key):
            self.fs.pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> None:
        # fsspec checks and writes in two steps.
        with _guard, self._mapped_errors(key):
            if self.fs.exists(self._path(key)):
                raise ObjectExists(f"{self.url}/{key} exists already")
            self.fs.pipe_file(self._path(key), data)

    @contextmanager
    def create_stream(self, key: str) -> Iterator[ObjectWriter]:
        buffer = io.BytesIO()
        yield buffer
        self.create(key, buffer.getvalue())

    def replace(self, key: str, data: bytes, expected: bytes) -> bool:
        with _guard:
            if self.read_if_present(key) != expected:
                return False
            self.put(key, data)
            return True

    def delete(self, key: str) -> None:
        try:
            with self._mapped_errors(key):
                self.fs.rm_file(self._path(key))
        except ObjectMissing:
            return

    def _path(self, key: str) -> str:
        if ".." in key.split("/") or key.startswith("/"):
            raise StorageError(f"key {key!r} leaves its folder {self.url}")
        return f"{self._root}/{key}"

    @contextmanager
    def _mapped_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ObjectMissing(f"{self.url}/{key} does not exist") from error
        except OSError as error:
            raise StorageError(f"{self.url}/{key}: {error}") from error


class MemoryStore(FsspecStore):
    """Objects in the memory of this process, where its threads are all that can race."""


class WeakStore(FsspecStore):
    """Storage whose create-if-absent fsspec does not promise: two drivers of one instant may both believe that they won.

    Opened only where the user accepts that with ``PMA_ALLOW_WEAK_STORAGE=1`` and sees to one driver at a time.
    """

    @property
    def reads_ahead(self) -> bool:
        return True

    @contextmanager
    def create_stream(self, key: str) -> Iterator[ObjectWriter]:
        if self.exists(key):
            raise ObjectExists(f"{self.url}/{key} exists already")
        with self._mapped_errors(key):
            file = self.fs.open(self._path(key), "wb")
            try:
                yield file
            except BaseException:
                file.discard()
                raise
            file.close()


class FsspecReader:
    """Ranged reads of one object."""

    def __init__(self, store: FsspecStore, key: str) -> None:
        self._store, self._key = store, key

    def read_into(self, start: int, buffer: memoryview) -> None:
        buffer[:] = self._store.read_range(self._key, start, start + len(buffer))

    def close(self) -> None:
        """Nothing is kept open."""


def expand(url: str) -> Iterator[str]:
    """Files that ``url`` (a file, a folder or a glob) names, sorted, as URLs."""
    scheme = scheme_of(url)
    try:
        fs = fsspec.filesystem(scheme)
        path = url if scheme == "file" else url.split("://", 1)[1]
        path = path.removeprefix("file://")
        if any(mark in path for mark in "*?["):
            found = [name for name in fs.glob(path) if fs.isfile(name)]
        else:
            found = fs.find(path)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"data source {url!r} cannot be listed: {error}") from error
    prefix = "" if scheme == "file" else f"{scheme}://"
    return iter(sorted(name if scheme == "file" else f"{prefix}{name.lstrip('/')}" for name in found))


def read_file(url: str) -> bytes:
    """Bytes of one file by fsspec URL."""
    try:
        with fsspec.open(url, "rb") as file:
            data = file.read()
            assert isinstance(data, bytes)
            return data
    except OSError as error:
        raise UserError(f"data file {url!r} cannot be read: {error}") from error
