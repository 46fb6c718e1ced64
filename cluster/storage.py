"""The one narrow seam to storage: objects under a URL, created, read by range and listed.

Implementations: :mod:`cluster.storage_local` for paths (durable, atomic on a POSIX file system),
:mod:`cluster.storage_s3` for ``s3://``, and ``memory://`` in :mod:`cluster.storage_fsspec`.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from configs.errors import UserError
from configs.urls import require_no_credentials

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}")
CREATE_IF_ABSENT_SCHEMES = ("memory", "s3")
WEAK_STORAGE_VARIABLE = "PMA_ALLOW_WEAK_STORAGE"


class ObjectWriter(Protocol):
    """Sequential writer of one object; nothing is visible before its context ends without an error."""

    def write(self, data: bytes | memoryview) -> object:
        """Append ``data``."""


class RangeReader(Protocol):
    """Reads one object by range; safe to use from several threads."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill all of ``buffer`` from byte ``start``; an object that ends before is an error."""

    def close(self) -> None:
        """Give up what was kept open."""


class Store(ABC):
    """Objects under one root URL; keys are relative, with ``/`` between folders.

    Every method raises :class:`cluster.errors.StorageError` or one of its kinds when storage fails.
    """

    url: str
    """Root, without a trailing slash. A plain absolute path for local storage."""

    def child(self, key: str) -> Store:
        """The same storage, rooted at ``key``."""
        return open_store(f"{self.url}/{key}")

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Whole object; for small ones."""

    @abstractmethod
    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes ``start`` (included) to ``end`` (excluded); fewer means the object is shorter: an error."""

    @property
    def reads_ahead(self) -> bool:
        """Whether a read waits for a network, so that several at once, each of some MiB, are worth their while."""
        return False

    @abstractmethod
    def open_reader(self, key: str) -> RangeReader:
        """Open an object for many ranged reads; a missing one raises here or at the first read."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of the object; :class:`cluster.errors.ObjectMissing` if there is none."""

    @abstractmethod
    def version(self, key: str) -> str:
        """Changes whenever the object's bytes are replaced: the ETag, or size and modification time."""

    @abstractmethod
    def keys(self, prefix: str = "") -> list[str]:
        """Keys of all objects below the folder ``prefix``, sorted; empty if there is no such folder."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below ``prefix``, sorted."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write a whole object, replacing any; readers see the old bytes or the new, never a mix."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> None:
        """Write an object only if none exists, atomically; else :class:`cluster.errors.ObjectExists`.

        After a lost response it is our own object that a retry meets: that counts as written.
        """

    @abstractmethod
    def create_stream(self, key: str) -> AbstractContextManager[ObjectWriter]:
        """Stream an object that must not exist; it appears whole at the end, or not at all."""

    @abstractmethod
    def replace(self, key: str, data: bytes, expected: bytes) -> bool:
        """Compare-and-swap: write ``data`` only if the object holds ``expected``; whether it was written."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""

    def abandon_uploads(self) -> int:
        """Discard what killed writers left half-uploaded below this root, and say how many; the caller holds its lease."""
        return 0

    def prune(self, prefix: str) -> None:  # noqa: B027  most storage has no folders
        """Forget the emptied folder ``prefix``, where storage knows folders; one that holds an object stays."""

    def exists(self, key: str) -> bool:
        """Whether the object exists."""
        from cluster.errors import ObjectMissing

        try:
            self.size(key)
        except ObjectMissing:
            return False
        return True

    def read_if_present(self, key: str) -> bytes | None:
        """Whole object, or None."""
        from cluster.errors import ObjectMissing

        try:
            return self.read(key)
        except ObjectMissing:
            return None


def open_store(url: str) -> Store:
    """Storage at ``url``: a local path, ``file://``, ``s3://`` or ``memory://``.

    Credentials come from the environment only; a URL that carries some is refused, so that none can
    reach a manifest, a log or MLflow.
    """
    scheme = scheme_of(url)
    if scheme == "file":
        from cluster.storage_local import LocalStore

        return LocalStore(local_path(url))
    if scheme not in CREATE_IF_ABSENT_SCHEMES:
        return _open_weak(scheme, url)
    if scheme == "s3":
        from cluster.storage_s3 import S3Store

        return S3Store(url.rstrip("/"))
    from cluster.storage_fsspec import MemoryStore

    return MemoryStore(url.rstrip("/"))


def _open_weak(scheme: str, url: str) -> Store:
    """Storage of any fsspec scheme, if the user accepts that two drivers are not kept apart there."""
    if os.environ.get(WEAK_STORAGE_VARIABLE) != "1":
        raise UserError(
            f"storage scheme {scheme!r} is not supported: a commit needs create-if-absent. "
            f"Use a path, file://, {' or '.join(f'{s}://' for s in CREATE_IF_ABSENT_SCHEMES)}; or, if you see to it that "
            f"one driver at a time works on the run, set {WEAK_STORAGE_VARIABLE}=1 for the driver and its workers"
        )
    from cluster.storage_fsspec import WeakStore

    try:
        return WeakStore(url.rstrip("/"))
    except (ImportError, ValueError) as error:
        raise UserError(f"storage scheme {scheme!r} cannot be opened: {error}") from None


def require_create_if_absent(store: Store, key: str, data: bytes) -> None:
    """Check that storage refuses to create ``key``, which this process just created with ``data``, a second time.

    Some S3 servers ignore the condition without a word. Raises :class:`UserError`, unless
    ``PMA_ALLOW_WEAK_STORAGE=1``; what was created is taken away again.
    """
    from cluster.errors import ObjectExists

    try:
        store.create(key, data)
    except ObjectExists:
        return
    if os.environ.get(WEAK_STORAGE_VARIABLE) == "1":
        return
    store.delete(key)
    raise UserError(
        f"{store.url}: this storage ignores create-if-absent (If-None-Match), so two drivers could both commit; use one "
        f"that honours it or, if you see to it that one driver at a time works on the run, set {WEAK_STORAGE_VARIABLE}=1"
    )


def scheme_of(url: str) -> str:
    """``file`` for paths; refuses URLs with credentials inside, without repeating them."""
    if "://" not in url:
        return "file"
    require_no_credentials(url, "storage URL")
    scheme, _, rest = url.partition("://")
    if scheme != "file" and not rest.strip("/"):
        raise UserError(f"{url}: a {scheme}:// URL needs a bucket or folder after the slashes")
    if scheme == "s3" and not _BUCKET.fullmatch(rest.split("/")[0]):
        raise UserError(f"{url}: {rest.split('/')[0]!r} cannot be the name of a bucket")
    return scheme


def local_path(url: str) -> Path:
    """Absolute path of a local URL."""
    path = url.removeprefix("file://")
    if url.startswith("file://") and not path.startswith("/"):
        raise UserError(f"{url}: a file:// URL needs an absolute path, as in file:///data/run")
    # Normalised, so that one folder has one name.
    return Path(os.path.abspath(Path(path).expanduser()))


def is_shared_with_workers(store: Store) -> bool:
    """Whether other processes see this storage (``memory://`` lives in one process)."""
    return not store.url.startswith("memory://")


def list_text_files(url: str) -> Iterator[str]:
    """URLs of the files that a path, folder or glob names, sorted, through fsspec."""
    from cluster.storage_fsspec import expand

    return expand(url)
