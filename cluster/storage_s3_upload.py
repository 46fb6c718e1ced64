"""Stream one S3 object by multipart upload: bounded memory, create-if-absent, nothing left behind on failure.

Parts go by plain HTTP PUT to presigned URLs, whose payload is not signed: the bytes are hashed once, by our own
BLAKE3, and not again by the client. Signatures stand in those URLs, so no URL is ever part of a message.
"""

from __future__ import annotations

import concurrent.futures
from types import TracebackType
from typing import Any

from cluster.errors import ObjectExists, StorageError, StorageFull

FIRST_PART_BYTES = 16 << 20
GROWTH_PARTS = 500
"""Parts of one size before it doubles: 10,000 parts, which S3 allows, are then far more than 5 TiB."""
PARTS_IN_FLIGHT = 3
CONFLICTS = (409, 412)
FULL = (507,)
TIMEOUT_SECONDS = 120.0


class S3Upload:
    """A sequential writer; the object appears when its context ends without an error, or not at all."""

    def __init__(self, client: Any, bucket: str, key: str, url: str) -> None:
        self._client, self._where, self._url = client, {"Bucket": bucket, "Key": key}, url
        self._upload_id: str | None = None
        self._part = bytearray()
        self._sent: list[concurrent.futures.Future[str]] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(PARTS_IN_FLIGHT, thread_name_prefix="upload")

    def __enter__(self) -> S3Upload:
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``; returns when it is copied, and waits while too many parts are in flight."""
        view = memoryview(data).cast("B")
        while len(view):
            room = self._part_bytes() - len(self._part)
            self._part += view[:room]
            view = view[room:]
            if len(self._part) == self._part_bytes():
                self._send()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._abort()
            elif self._upload_id is None:
                self._put_whole()
            else:
                self._complete()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _part_bytes(self) -> int:
        return int(FIRST_PART_BYTES << (len(self._sent) // GROWTH_PARTS))

    def _send(self) -> None:
        if self._upload_id is None:
            self._upload_id = str(self._call("create_multipart_upload", **self._where)["UploadId"])
        number = len(self._sent) + 1
        # A result raises here what its part could not do, and bounds what waits in memory.
        if number > PARTS_IN_FLIGHT:
            self._sent[number - 1 - PARTS_IN_FLIGHT].result()
        self._sent.append(self._pool.submit(self._put_part, number, self._part))
        self._part = bytearray()

    def _put_part(self, number: int, data: bytearray) -> str:
        import urllib3

        address = self._client.generate_presigned_url(
            "upload_part", Params={**self._where, "UploadId": self._upload_id, "PartNumber": number}, ExpiresIn=3600
        )
        retries = urllib3.Retry(
            total=8,
            backoff_factor=0.3,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,
            raise_on_status=False,
        )
        try:
            answer = _http().request("PUT", address, body=bytes(data), retries=retries, timeout=TIMEOUT_SECONDS)
        except urllib3.exceptions.HTTPError as error:
            raise StorageError(f"{self._url}: part {number} could not be sent: {type(error).__name__}") from None
        if answer.status in FULL:
            raise StorageFull(f"{self._url}: no space left; free some and run the same command again")
        if answer.status != 200:
            raise StorageError(f"{self._url}: part {number} was refused with status {answer.status}")
        return str(answer.headers["ETag"])

    def _put_whole(self) -> None:
        """An object below one part: a single conditional PUT."""
        data = bytes(self._part)
        try:
            self._call("put_object", **self._where, Body=data, IfNoneMatch="*")
        except ObjectExists:
            # A retry after a lost response meets its own write.
            if not self._is_ours(data):
                raise

    def _complete(self) -> None:
        try:
            if self._part:
                self._send()
            parts = [{"PartNumber": n, "ETag": sent.result()} for n, sent in enumerate(self._sent, start=1)]
        except BaseException:
            self._abort()
            raise
        etag = _multipart_etag([str(part["ETag"]) for part in parts])
        try:
            self._call(
                "complete_multipart_upload",
                **self._where,
                UploadId=self._upload_id,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )
        except BaseException:
            # The response may have been lost: an object of our parts' ETag is ours.
            if self._etag() != etag or self._still_open():
                self._abort()
                raise

    def _abort(self) -> None:
        """Discard what was sent; parts still on their way are waited for, or they would be left behind."""
        concurrent.futures.wait(self._sent)
        if self._upload_id is not None:
            try:
                self._call("abort_multipart_upload", **self._where, UploadId=self._upload_id)
            except StorageError:
                return  # the error that led here says more; a later attempt abandons it

    def _etag(self) -> str | None:
        try:
            return str(self._call("head_object", **self._where)["ETag"])
        except StorageError:
            return None

    def _still_open(self) -> bool:
        """Whether our upload was not the one that completed: then an equal object is another writer's."""
        try:
            self._call("list_parts", **self._where, UploadId=self._upload_id)
        except StorageError:
            return False
        return True

    def _is_ours(self, data: bytes) -> bool:
        try:
            answer = self._call("get_object", **self._where)
        except StorageError:
            return False
        return bool(answer["Body"].read() == data)

    def _call(self, operation: str, **parameters: Any) -> Any:
        return call(self._client, operation, self._url, **parameters)


def call(client: Any, operation: str, url: str, **parameters: Any) -> Any:
    """One boto3 operation, with its errors as ours."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return getattr(client, operation)(**parameters)
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = error.response.get("Error", {}).get("Code")
        if status in CONFLICTS:
            raise ObjectExists(f"{url} exists already") from None
        if status in FULL:
            raise StorageFull(f"{url}: no space left; free some and run the same command again") from None
        raise StorageError(f"{url}: {operation} was refused: {code} (status {status})") from None
    except BotoCoreError as error:
        raise StorageError(f"{url}: {operation} failed: {type(error).__name__}") from None


def abort_uploads(client: Any, bucket: str, prefix: str, url: str) -> int:
    """Abort every unfinished multipart upload below ``prefix``; how many there were."""
    count = 0
    markers: dict[str, str] = {}
    while True:
        page = call(client, "list_multipart_uploads", url, Bucket=bucket, Prefix=prefix, **markers)
        for upload in page.get("Uploads", []):
            if upload["Key"].startswith(prefix):
                call(
                    client, "abort_multipart_upload", url, Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
                count += 1
        if not page.get("IsTruncated"):
            return count
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _multipart_etag(etags: list[str]) -> str:
    """ETag that S3 gives an object made of parts with ``etags``: MD5 of their MD5s, and their number."""
    import hashlib

    joined = b"".join(bytes.fromhex(etag.strip('"')) for etag in etags)
    return f'"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(etags)}"'


def _http() -> Any:
    import urllib3

    global _pool  # noqa: PLW0603  one connection pool a process
    if _pool is None:
        _pool = urllib3.PoolManager(num_pools=8, maxsize=32)
    return _pool


_pool: Any = None
