"""Storage on S3 and what speaks its protocol, through boto3.

One client does everything: measured, it reads and writes large objects for less processor time than the
alternatives, survives a fork, and knows one set of credentials (docs/design/04-object-storage.md).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from cluster.errors import ObjectExists, ObjectMissing, ObjectTruncated, StorageError
from cluster.storage import ObjectWriter, Store
from cluster.storage_s3_client import (
    BROKEN_BODY,
    HTTP_RANGE_NOT_SATISFIABLE,
    client,
    code_of,
    mapped_errors,
    status_of,
    was_retried,
)
from cluster.storage_s3_upload import ConditionalWrite, StreamedUpload, discard_upload, list_uploads

BODY_PAUSES_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Between attempts to read a body that broke off; botocore retries only until the headers have come."""
CANNOT_LIST_UPLOADS = ("AccessDenied", "NotImplemented", "MethodNotAllowed")

logger = logging.getLogger(__name__)
T = TypeVar("T")


class S3Store(Store):
    """Objects of a bucket below a prefix."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.bucket, _, root = url.removeprefix("s3://").partition("/")
        self._root = root.strip("/")

    @property
    def reads_ahead(self) -> bool:
        return True

    def read(self, key: str) -> bytes:
        return self._read_versioned(key)[0]

    def read_range(self, key: str, start: int, end: int) -> bytes:
        data = bytearray(max(0, end - start))
        self.read_into(key, start, memoryview(data))
        return bytes(data)

    def open_reader(self, key: str) -> S3Reader:
        return S3Reader(self, key)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill all of ``buffer`` with the object's bytes from ``start``."""
        end = start + len(buffer)
        if start < 0:
            raise StorageError(f"{self.url}/{key}: bytes {start} to {end} were asked for; an object starts at 0")
        if not len(buffer):
            return
        try:
            with mapped_errors(f"{self.url}/{key}"):
                found = self._get(key, lambda answer: _fill(answer, start, buffer), Range=f"bytes={start}-{end - 1}")
        except StorageError as error:
            if not (
                isinstance(error.__cause__, ClientError) and status_of(error.__cause__) == HTTP_RANGE_NOT_SATISFIABLE
            ):
                raise
            found = 0
        if found < len(buffer):
            raise ObjectTruncated(f"{self.url}/{key}: ends before byte {end}, bytes {start} to {end} were asked for")

    def size(self, key: str) -> int:
        return int(self._head(key)["ContentLength"])

    def version(self, key: str) -> str:
        return str(self._head(key)["ETag"])

    def keys(self, prefix: str = "") -> list[str]:
        start = len(self._folder(""))
        with mapped_errors(f"{self.url}/{prefix}"):
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._folder(prefix))
            found = (entry["Key"] for page in pages for entry in page.get("Contents", []))
            # Some servers list the marker of an emptied folder.
            return sorted(key[start:] for key in found if not key.endswith("/"))

    def folders(self, prefix: str) -> list[str]:
        folder = self._folder(prefix)
        with mapped_errors(f"{self.url}/{prefix}"):
            listing = client().get_paginator("list_objects_v2")
            pages = listing.paginate(Bucket=self.bucket, Prefix=folder, Delimiter="/")
            found = (entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", []))
            return sorted(name[len(folder) :].rstrip("/") for name in found)

    def put(self, key: str, data: bytes) -> None:
        with mapped_errors(f"{self.url}/{key}"):
            client().put_object(Bucket=self.bucket, Key=self._path(key), Body=data)

    def create(self, key: str, data: bytes) -> None:
        with mapped_errors(f"{self.url}/{key}"):
            write = self._write(key)
            refusal = write.send(lambda: write.s3.put_object(Body=data, IfNoneMatch="*", **write.marked_target))
        if refusal:
            raise ObjectExists(f"{self.url}/{key} exists already") from refusal

    @contextmanager
    def create_stream(self, key: str) -> Iterator[ObjectWriter]:
        with mapped_errors(f"{self.url}/{key}"):
            upload = StreamedUpload(client(), self.bucket, self._path(key))
            try:
                yield upload
                upload.complete()
            except BaseException:
                upload.abort()
                raise

    def replace(self, key: str, data: bytes, expected: bytes) -> bool:
        try:
            current, etag = self._read_versioned(key)
        except ObjectMissing:
            return False
        if current != expected:
            return False
        with mapped_errors(f"{self.url}/{key}"):
            write = self._write(key)
            refusal = write.send(lambda: write.s3.put_object(Body=data, IfMatch=etag, **write.marked_target))
        if refusal and was_retried(refusal):
            raise StorageError(
                f"{self.url}/{key}: refused after a retry; whether an earlier attempt replaced it before another "
                "writer did is unknown. Read it again"
            ) from refusal
        return refusal is None

    def delete(self, key: str) -> None:
        with mapped_errors(f"{self.url}/{key}"):
            client().delete_object(Bucket=self.bucket, Key=self._path(key))

    def abandon_uploads(self) -> int:
        if not self._root:
            return 0  # uploads to other folders of the bucket are not ours to judge
        try:
            unfinished = self.unfinished_uploads()
        except StorageError as error:
            if isinstance(error.__cause__, ClientError) and code_of(error.__cause__) in CANNOT_LIST_UPLOADS:
                logger.warning("%s: unfinished uploads of killed writers cannot be listed: %s", self.url, error)
                return 0
            raise
        return sum(discard_upload(client(), self.bucket, self._path(key), upload) for key, upload in unfinished)

    def prune(self, prefix: str) -> None:
        # Some servers keep an object "folder/" for a folder that was emptied, and list it as one.
        for name in self.folders(prefix):
            self.prune(f"{prefix}/{name}")
        with mapped_errors(f"{self.url}/{prefix}"):
            client().delete_object(Bucket=self.bucket, Key=self._folder(prefix))

    def unfinished_uploads(self) -> list[tuple[str, str]]:
        """Key and upload id of every multipart upload below this root that was neither completed nor aborted."""
        start = len(self._folder(""))
        with mapped_errors(self.url):
            found = list_uploads(client(), self.bucket, self._folder(""))
        return [(key[start:], upload) for key, upload in found]

    def _read_versioned(self, key: str) -> tuple[bytes, str]:
        with mapped_errors(f"{self.url}/{key}"):
            return self._get(key, lambda answer: (bytes(answer["Body"].read()), str(answer["ETag"])))

    def _get(self, key: str, use: Callable[[Any], T], **request: str) -> T:
        """Get an object and ``use`` the answer, again from its start after a body that broke off."""
        for pause_seconds in (*BODY_PAUSES_SECONDS, None):
            answer = client().get_object(Bucket=self.bucket, Key=self._path(key), **request)
            try:
                return use(answer)
            except BROKEN_BODY:
                answer["Body"].close()
                if pause_seconds is None:
                    raise
                time.sleep(pause_seconds)
        raise AssertionError("the last pause is None")

    def _head(self, key: str) -> Any:
        with mapped_errors(f"{self.url}/{key}"):
            return client().head_object(Bucket=self.bucket, Key=self._path(key))

    def _write(self, key: str) -> ConditionalWrite:
        return ConditionalWrite(s3=client(), bucket=self.bucket, key=self._path(key))

    def _path(self, key: str) -> str:
        if ".." in key.split("/") or key.startswith("/"):
            raise StorageError(f"key {key!r} leaves its folder {self.url}")
        return f"{self._root}/{key}" if self._root else key

    def _folder(self, prefix: str) -> str:
        """Prefix of all keys in a folder; empty for a whole bucket."""
        path = self._path(prefix).strip("/")
        return f"{path}/" if path else ""


class S3Reader:
    """Ranged reads of one object."""

    def __init__(self, store: S3Store, key: str) -> None:
        self._store, self._key = store, key

    def read_into(self, start: int, buffer: memoryview) -> None:
        self._store.read_into(self._key, start, buffer)

    def close(self) -> None:
        """Nothing is kept open: connections belong to the client."""


def _fill(answer: Any, start: int, buffer: memoryview) -> int:
    """Read the body into ``buffer``; returns the bytes it held, fewer only if the object ends there."""
    if start and not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
        raise StorageError(f"the storage ignored the range from byte {start}; ranged reads are needed")
    filled = 0
    while filled < len(buffer):
        count = answer["Body"].readinto(buffer[filled:])
        if not count:
            break
        filled += count
    return filled
