"""Data files by fsspec URL: listed with their sizes, opened as streams, or read by range."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec

from cluster.storage import CREATE_IF_ABSENT_SCHEMES, Store, local_path, open_store, scheme_of
from configs.errors import UserError

_BUFFER_BYTES = 1 << 20
_VERSION_NAMES = ("etag", "ETag", "generation", "mtime", "created")
"""What file systems call the value that changes when a file's bytes do."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file that a source names."""

    url: str
    """Absolute path, or URL."""
    bytes: int
    """Size."""
    version: str
    """Changes whenever the file is replaced: the ETag, or the modification time."""


def list_data_files(source: str) -> list[DataFile]:
    """Files that ``source`` (a file, a folder or a glob) names, sorted by URL; one listing, no request a file.

    Files whose name begins with a dot are left out below a folder. Raises :class:`UserError` if there are none.
    """
    scheme = scheme_of(source)
    path = str(local_path(source)) if scheme == "file" else source.split("://", 1)[1].rstrip("/")
    try:
        fs = fsspec.filesystem(scheme, use_listings_cache=False)
        search = fs.glob if any(mark in path for mark in "*?[") else fs.find
        found: dict[str, dict[str, Any]] = search(path, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"data source {source!r} cannot be listed: {error}") from error
    files = [_data_file(scheme, name, entry) for name, entry in found.items() if entry["type"] == "file"]
    files = [file for file in files if len(files) == 1 or not file.url.rsplit("/", 1)[-1].startswith(".")]
    if not files:
        raise UserError(f"data source {source!r} holds no files; give a file, a folder or a glob such as data/*.jsonl")
    return sorted(files, key=lambda file: file.url)


@contextmanager
def open_data(url: str) -> Iterator[BinaryIO]:
    """Open a file for reading, seekable; what goes wrong with it becomes :class:`UserError` that names it."""
    try:
        # Buffered, for files of fsspec read lines a byte at a time, and those of some schemes take no limit.
        with fsspec.open(url, "rb") as file, io.BufferedReader(file, _BUFFER_BYTES) as buffered:
            yield buffered
    except FileNotFoundError:
        raise UserError(f"data file {url!r} does not exist") from None
    except (OSError, ImportError) as error:
        raise UserError(f"data file {url!r} cannot be read: {error}") from error


def open_data_store(url: str) -> tuple[Store, str]:
    """Storage and key of the object ``url``, for ranged reads alone: any fsspec scheme serves."""
    scheme = scheme_of(url)
    folder, _, key = (str(local_path(url)) if scheme == "file" else url).rpartition("/")
    if not key:
        raise UserError(f"{url!r} names no file")
    if scheme == "file" or scheme in CREATE_IF_ABSENT_SCHEMES:
        return open_store(folder or "/"), key
    from cluster.storage_fsspec import FsspecStore

    try:
        return FsspecStore(folder), key
    except (ImportError, ValueError) as error:
        raise UserError(f"{url!r} cannot be opened: {error}") from None


def _data_file(scheme: str, name: str, entry: dict[str, Any]) -> DataFile:
    url = name if scheme in {"file", "http", "https"} else f"{scheme}://{name.lstrip('/')}"
    version = "-".join(str(entry[key]) for key in _VERSION_NAMES if entry.get(key) is not None)
    return DataFile(url=url, bytes=int(entry["size"] or 0), version=version)
