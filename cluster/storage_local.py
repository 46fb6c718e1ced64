"""Local storage: atomic and durable on a POSIX file system.

fsspec's local implementation creates a file before it writes it, so a crash leaves an empty object
under the final name. Here bytes go to a hidden temporary file, are flushed to disk, and appear under
their name by ``link`` (create-if-absent) or ``replace`` (overwrite), both atomic.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cluster.errors import ObjectExists, ObjectMissing, ObjectTruncated, StorageDenied, StorageError, StorageFull
from cluster.storage import Store

PARTIAL_SUFFIX = ".part"
GUARD_SUFFIX = ".guard.part"


class LocalStore(Store):
    """Objects as files under a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def read(self, key: str) -> bytes:
        with _mapped_errors(self._path(key)):
            return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, end: int) -> bytes:
        path = self._path(key)
        with _mapped_errors(path), open(path, "rb") as file:
            data = os.pread(file.fileno(), end - start, start)
            while len(data) < end - start:
                more = os.pread(file.fileno(), end - start - len(data), start + len(data))
                if not more:
                    raise ObjectTruncated(
                        f"{path}: ends at byte {start + len(data)}, bytes {start} to {end} were asked for"
                    )
                data += more
        return data

    def open_reader(self, key: str) -> LocalReader:
        return LocalReader(self._path(key))

    def size(self, key: str) -> int:
        with _mapped_errors(self._path(key)):
            return self._path(key).stat().st_size

    def version(self, key: str) -> str:
        with _mapped_errors(self._path(key)):
            status = self._path(key).stat()
            return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"

    def keys(self, prefix: str = "") -> list[str]:
        base = self._path(prefix) if prefix else self.root
        found = (Path(folder, name) for folder, _, names in os.walk(base) for name in names)
        return sorted(str(path.relative_to(self.root)) for path in found if not path.name.endswith(PARTIAL_SUFFIX))

    def folders(self, prefix: str) -> list[str]:
        try:
            with os.scandir(self._path(prefix)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._partial(path) as (file, partial):
            file.write(data)
            _flush(file)
            os.replace(partial, path)
            _flush_folder(path.parent)

    def create(self, key: str, data: bytes) -> None:
        with self.create_stream(key) as writer:
            writer.write(data)

    @contextmanager
    def create_stream(self, key: str) -> Iterator[BinaryIO]:
        path = self._path(key)
        with self._partial(path) as (file, partial):
            yield file
            _flush(file)
            try:
                os.link(partial, path)
            except FileExistsError:
                raise ObjectExists(f"{path} exists already") from None
            _flush_folder(path.parent)

    def replace(self, key: str, data: bytes, expected: bytes) -> bool:
        if self.read_if_present(key) != expected:
            return False
        guard = self._path(f"{key}{GUARD_SUFFIX}")
        with _mapped_errors(guard), open(guard, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.read_if_present(key) != expected:
                return False
            self.put(key, data)
            return True

    def delete(self, key: str) -> None:
        with _mapped_errors(self._path(key)):
            self._path(key).unlink(missing_ok=True)
            self._path(f"{key}{GUARD_SUFFIX}").unlink(missing_ok=True)

    def abandon_uploads(self) -> int:
        left = [path for path in self.root.rglob(f".*{PARTIAL_SUFFIX}") if path.is_file()]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def prune(self, prefix: str) -> None:
        folders = [Path(folder) for folder, _, _ in os.walk(self._path(prefix), topdown=False)]
        # rmdir refuses a folder that holds anything.
        with contextlib.suppress(OSError):
            for folder in folders:
                folder.rmdir()

    def _path(self, key: str) -> Path:
        path = self.root / key
        if ".." in Path(key).parts or Path(key).is_absolute() or "\0" in key:
            raise StorageError(f"key {key!r} leaves its folder {self.root}")
        return path

    @contextmanager
    def _partial(self, path: Path) -> Iterator[tuple[BinaryIO, Path]]:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
        with _mapped_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(partial, "xb") as file:
                    yield file, partial
            finally:
                partial.unlink(missing_ok=True)


class LocalReader:
    """One open file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _mapped_errors(path):
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed by close()

    def read_into(self, start: int, buffer: memoryview) -> None:
        done = 0
        with _mapped_errors(self._path):
            while done < len(buffer):
                length = os.preadv(self._file.fileno(), [buffer[done:]], start + done)
                if not length:
                    raise ObjectTruncated(
                        f"{self._path}: ends at byte {start + done}, bytes {start} to {start + len(buffer)} were asked for"
                    )
                done += length

    def close(self) -> None:
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _mapped_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissing(f"{path} does not exist") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"{path}: no space left; free some and run the same command again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageDenied(f"{path}: {error.strerror}") from error
        raise StorageError(f"{path}: {error.strerror or error}") from error
