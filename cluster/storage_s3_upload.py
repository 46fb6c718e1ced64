"""Create-if-absent writes to S3: single requests, and streams in parts with bounded memory.

Every such write carries an id of its own in the object's metadata. When an answer was lost, or a retry
is told that the object exists, the id says whether the object is ours.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

from cluster.errors import ObjectExists
from cluster.storage_s3_client import (
    HTTP_CONFLICT,
    HTTP_NOT_FOUND,
    HTTP_PRECONDITION_FAILED,
    HTTP_SERVER_ERROR,
    code_of,
    status_of,
)

PART_BYTES = 16 << 20
EQUAL_PARTS = 800
"""After so many parts each is larger by another :data:`PART_BYTES`: 10,000 parts, S3's limit, hold 1 TiB."""
PARTS_IN_FLIGHT = 3
CONFLICT_PAUSES_SECONDS = (0.2, 0.5, 1.0, 2.0)
WRITE_ID = "pma-write"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConditionalWrite:
    """One attempt to write one object on a condition."""

    s3: Any
    """Client."""
    bucket: str
    """Name of the bucket."""
    key: str
    """Whole key in the bucket."""
    write_id: str = field(default_factory=lambda: secrets.token_hex(16))
    """What tells this write from all others."""

    @property
    def target(self) -> dict[str, str]:
        """Bucket and key, as every request wants them."""
        return {"Bucket": self.bucket, "Key": self.key}

    @property
    def marked_target(self) -> dict[str, Any]:
        """The same with our id, for the request that makes the object."""
        return {**self.target, "Metadata": {WRITE_ID: self.write_id}}

    def send(self, request: Callable[[], object]) -> ClientError | None:
        """Send ``request``; None once the object is ours, else the error that refused it.

        A failure that leaves the outcome open is settled by looking; what cannot be settled is raised.
        """
        for pause_seconds in (*CONFLICT_PAUSES_SECONDS, None):
            try:
                request()
            except (ClientError, BotoCoreError) as error:
                refused = is_refusal(error)
                if not refused and not may_be_carried_out(error):
                    raise
                found = self._id_found(error)
                if found == self.write_id:
                    return None
                if refused and (found is not None or status_of(error) == HTTP_PRECONDITION_FAILED):
                    return error
                # A conflict with a write that is not finished yet: AWS asks to try again.
                if not refused or status_of(error) != HTTP_CONFLICT or pause_seconds is None:
                    raise
                time.sleep(pause_seconds)
            else:
                return None
        raise AssertionError("the last pause is None")

    def _id_found(self, original: Exception) -> str | None:
        """Write id of the object that stands there, empty for a stranger's; None if there is no object."""
        try:
            found = self.s3.head_object(**self.target)["Metadata"].get(WRITE_ID, "")
            return str(found)
        except ClientError as error:
            if status_of(error) == HTTP_NOT_FOUND:
                return None
            raise original from error
        except BotoCoreError as error:
            raise original from error


def is_refusal(error: ClientError | BotoCoreError) -> bool:
    """Whether the storage says that the condition did not hold, or that what was to be written on is gone."""
    if not isinstance(error, ClientError):
        return False
    gone = code_of(error) in ("NoSuchKey", "NoSuchUpload")
    return gone or status_of(error) in (HTTP_CONFLICT, HTTP_PRECONDITION_FAILED)


def may_be_carried_out(error: ClientError | BotoCoreError) -> bool:
    """Whether a request that failed so may have reached the storage and done its work."""
    if isinstance(error, ClientError):
        return status_of(error) >= HTTP_SERVER_ERROR
    return isinstance(error, HTTPClientError)


def part_bytes(number: int) -> int:
    """Size of part ``number``, counted from 0."""
    return PART_BYTES * (1 + number // EQUAL_PARTS)


class StreamedUpload:
    """Writes one new object in parts, at most :data:`PARTS_IN_FLIGHT` of them being sent while the next fills up.

    What fits one part is sent as one request. Call :meth:`complete` once or :meth:`abort`.
    """

    def __init__(self, s3: Any, bucket: str, key: str) -> None:
        self._object = ConditionalWrite(s3=s3, bucket=bucket, key=key)
        self._upload_id: str | None = None
        self._buffer = bytearray(part_bytes(0))
        self._filled = 0
        self._spare: list[bytearray] = []
        self._sending: deque[Future[tuple[str, bytearray]]] = deque()
        self._etags: list[str] = []
        self._pool = ThreadPoolExecutor(PARTS_IN_FLIGHT, thread_name_prefix="upload")

    def write(self, data: bytes | memoryview) -> int:
        """Append ``data``; waits while too many parts are in flight, raises if one failed."""
        view = memoryview(data)
        total = view.nbytes
        view = view.cast("B") if total else view[:0]
        while len(view):
            if self._filled == len(self._buffer):
                self._send_part()
            count = min(len(view), len(self._buffer) - self._filled)
            # Through a view: assigning to a slice of a bytearray copies twice.
            with memoryview(self._buffer) as buffer:
                buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
        return total

    def complete(self) -> None:
        """Make the object appear; :class:`ObjectExists` if another one stands there."""
        s3, target = self._object.s3, self._object.target
        del self._buffer[self._filled :]
        if self._upload_id is None:
            once = {**self._object.marked_target, "IfNoneMatch": "*"}
            refusal = self._object.send(lambda: s3.put_object(Body=self._buffer, **once))
        else:
            self._send_part()
            while self._sending:
                self._collect()
            parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(self._etags, start=1)]
            once = {**target, "UploadId": self._upload_id, "MultipartUpload": {"Parts": parts}, "IfNoneMatch": "*"}
            refusal = self._object.send(lambda: s3.complete_multipart_upload(**once))
        if refusal:
            raise ObjectExists(f"s3://{self._object.bucket}/{self._object.key} exists already") from refusal
        self._pool.shutdown()

    def abort(self) -> None:
        """Leave nothing behind; a storage that does not answer is logged, and is left to the next clean-up."""
        for future in self._sending:
            future.cancel()
        # A part that arrives after the abort would be an orphan.
        self._pool.shutdown()
        if self._upload_id is not None:
            discard_upload(self._object.s3, self._object.bucket, self._object.key, self._upload_id)

    def _send_part(self) -> None:
        if self._upload_id is None:
            answer = self._object.s3.create_multipart_upload(**self._object.marked_target)
            self._upload_id = answer["UploadId"]
        if len(self._sending) == PARTS_IN_FLIGHT:
            self._collect()
        number = len(self._etags) + len(self._sending)
        self._sending.append(self._pool.submit(self._upload_part, number, self._buffer))
        size = part_bytes(number + 1)
        fits = self._spare and len(self._spare[-1]) == size
        self._buffer, self._filled = self._spare.pop() if fits else bytearray(size), 0

    def _upload_part(self, number: int, body: bytearray) -> tuple[str, bytearray]:
        # botocore sends a bytearray as it is; bytes it wraps in a file and sends in small pieces.
        answer = self._object.s3.upload_part(
            Body=body, PartNumber=number + 1, UploadId=self._upload_id, **self._object.target
        )
        return str(answer["ETag"]), body

    def _collect(self) -> None:
        etag, buffer = self._sending.popleft().result()
        self._etags.append(etag)
        self._spare = [buffer]


def list_uploads(s3: Any, bucket: str, prefix: str) -> list[tuple[str, str]]:
    """Key and upload id of every unfinished upload whose key begins with ``prefix``."""
    pages = s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
    return [(upload["Key"], upload["UploadId"]) for page in pages for upload in page.get("Uploads", [])]


def discard_upload(s3: Any, bucket: str, key: str, upload_id: str) -> bool:
    """Remove an unfinished upload and its parts; whether that succeeded, else a warning says what is left."""
    try:
        s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
    except (ClientError, BotoCoreError) as error:
        if isinstance(error, ClientError) and code_of(error) == "NoSuchUpload":
            return True
        logger.warning("s3://%s/%s: an unfinished upload is left behind: %s", bucket, key, error)
        return False
    return True
