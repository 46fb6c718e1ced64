"""Storage through fsspec: ``s3://`` (s3fs) and ``memory://``."""

from __future__ import annotations

import errno
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from cluster.errors import ObjectExists, ObjectMissing, StorageError, StorageFull
from cluster.storage import ObjectWriter, RangeReader, Store, scheme_of
from configs.errors import UserError

S3_OPTIONS: dict[str, Any] = {
    # Listings decide what is committed, so none may be cached.
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": 32,
        "retries": {"max_attempts": 8, "mode": "standard"},
        # Our own BLAKE3 digests guard content; some stores refuse the default checksum trailers.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    },
}
HTTP_CONFLICTS = (409, 412)
HTTP_RANGE_NOT_SATISFIABLE = 416
_memory_guard = threading.Lock()


class FsspecStore(Store):
    """Objects behind an fsspec file system that can create-if-absent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.scheme = scheme_of(url)
        self.fs = _filesystem(self.scheme)
        self._root = url.split("://", 1)[1] if self.scheme != "memory" else "/" + url.split("://", 1)[1].strip("/")

    def read(self, key: str) -> bytes:
        with self._mapped_errors(key):
            data = self.fs.cat_file(self._path(key))
            assert isinstance(data, bytes)
            return data

    def read_range(self, key: str, start: int, end: int) -> bytes:
        with self._mapped_errors(key):
            data = self._read_available(key, start, end) if end > start else b""
        if len(data) != end - start:
            raise StorageError(
                f"{self.url}/{key}: ends at byte {start + len(data)}, bytes {start} to {end} were asked for"
            )
        return data

    def open_reader(self, key: str) -> RangeReader:
        return FsspecReader(self, key)

    def _read_available(self, key: str, start: int, end: int) -> bytes:
        try:
            data = self.fs.cat_file(self._path(key), start=start, end=end)
        except OSError as error:
            if _status_of(error) != HTTP_RANGE_NOT_SATISFIABLE:
                raise
            return b""
        assert isinstance(data, bytes)
        return data

    def size(self, key: str) -> int:
        with self._mapped_errors(key):
            return int(self.fs.info(self._path(key), **self._fresh())["size"])

    def version(self, key: str) -> str:
        with self._mapped_errors(key):
            info = self.fs.info(self._path(key), **self._fresh())
        return str(info.get("ETag") or f"{info['size']}-{info.get('created')}")

    def keys(self, prefix: str = "") -> list[str]:
        base = self._path(prefix) if prefix else self._root
        with self._mapped_errors(prefix):
            found = self.fs.find(base, **self._fresh())
        start = len(self._root.lstrip("/")) + 1
        # Some servers list the marker of an emptied folder.
        keys = (path.lstrip("/")[start:] for path in found)
        return sorted(key for key in keys if key and not key.endswith("/"))

    def folders(self, prefix: str) -> list[str]:
        try:
            with self._mapped_errors(prefix):
                entries = self.fs.ls(self._path(prefix), detail=True, **self._fresh())
        except ObjectMissing:
            return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[1] for entry in entries if entry["type"] == "directory")

    def put(self, key: str, data: bytes) -> None:
        with self._mapped_errors(key):
            self.fs.pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> None:
        if self.scheme == "memory":
            with _memory_guard:
                self._create_in_memory(key, data)
            return
        with self._mapped_errors(key):
            try:
                self.fs.pipe_file(self._path(key), data, mode="create")
            except (FileExistsError, OSError) as error:
                if not _is_precondition_failure(error):
                    raise
                # A retry after a lost response can meet its own write; equal bytes are success.
                if self.read_if_present(key) != data:
                    raise ObjectExists(f"{self.url}/{key} exists already") from error

    @contextmanager
    def create_stream(self, key: str) -> Iterator[ObjectWriter]:
        buffer = io.BytesIO()
        yield buffer
        self.create(key, buffer.getvalue())

    def replace(self, key: str, data: bytes, expected: bytes) -> bool:
        if self.scheme == "memory":
            with _memory_guard:
                if self.read_if_present(key) != expected:
                    return False
                self.put(key, data)
                return True
        if self.read_if_present(key) != expected:
            return False
        with self._mapped_errors(key):
            etag = self.fs.info(self._path(key), refresh=True)["ETag"]
            if self.read_if_present(key) != expected:
                return False
            try:
                self.fs.pipe_file(self._path(key), data, IfMatch=etag)
            except OSError as error:
                if _is_precondition_failure(error):
                    return False
                raise
            return True

    def delete(self, key: str) -> None:
        try:
            with self._mapped_errors(key):
                self.fs.rm_file(self._path(key))
        except ObjectMissing:
            return

    def _create_in_memory(self, key: str, data: bytes) -> None:
        # fsspec checks and writes in two steps; the caller holds the guard.
        if self.fs.exists(self._path(key)):
            raise ObjectExists(f"{self.url}/{key} exists already")
        self.fs.pipe_file(self._path(key), data)

    def _path(self, key: str) -> str:
        if ".." in key.split("/") or key.startswith("/"):
            raise StorageError(f"key {key!r} leaves its folder {self.url}")
        return f"{self._root}/{key}"

    def _fresh(self) -> dict[str, bool]:
        return {"refresh": True} if self.scheme == "s3" else {}

    @contextmanager
    def _mapped_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ObjectMissing(f"{self.url}/{key} does not exist") from error
        except PermissionError as error:
            raise StorageError(f"{self.url}/{key}: access denied; check credentials and bucket policy") from error
        except (OSError, TimeoutError) as error:
            if error.errno == errno.ENOSPC:
                raise StorageFull(
                    f"{self.url}/{key}: no space left; free some and run the same command again"
                ) from error
            raise StorageError(f"{self.url}/{key}: {error}") from error


class FsspecReader:
    """Ranged reads through fsspec."""

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


def _filesystem(scheme: str) -> Any:
    if scheme == "s3":
        return fsspec.filesystem("s3", **S3_OPTIONS)
    return fsspec.filesystem(scheme)


def _is_precondition_failure(error: OSError) -> bool:
    if isinstance(error, FileExistsError):
        return True
    return _status_of(error) in HTTP_CONFLICTS


def _status_of(error: OSError) -> int | None:
    """HTTP status that botocore kept in the cause of an s3fs error."""
    response = getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return None
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if status is not None else None
