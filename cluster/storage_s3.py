"""``s3://`` storage: s3fs for listings, small objects and leases, the bulk of the bytes beside it.

Ranged reads go through obstore (two thirds of s3fs's client CPU), streamed writes through our own multipart upload
(:mod:`cluster.storage_s3_upload`), because neither library completes one only if the object is absent without
hashing every byte again.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from cluster.errors import ObjectMissing, StorageError
from cluster.storage import ObjectWriter
from cluster.storage_fsspec import S3_OPTIONS, FsspecStore
from cluster.storage_s3_upload import S3Upload, abort_uploads

READ_ATTEMPTS = 5
"""Of one range, beside the client's own retries: for bodies that end early."""
FIRST_PAUSE_SECONDS = 0.2
RETRY_SECONDS = 120


class S3Store(FsspecStore):
    """Objects of a bucket."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.bucket, _, self._prefix = self._root.partition("/")

    @property
    def reads_ahead(self) -> bool:
        """True: a read waits for a network."""
        return True

    def open_reader(self, key: str) -> S3Reader:
        self._path(key)
        return S3Reader(self, key)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        if end <= start:
            return b""
        data = bytearray(end - start)
        self.open_reader(key).read_into(start, memoryview(data))
        return bytes(data)

    @contextmanager
    def create_stream(self, key: str) -> Iterator[ObjectWriter]:
        self._path(key)
        with S3Upload(_client(os.getpid()), self.bucket, self.object_key(key), f"{self.url}/{key}") as upload:
            yield upload

    def abandon_uploads(self) -> int:
        return abort_uploads(_client(os.getpid()), self.bucket, f"{self._prefix}/" if self._prefix else "", self.url)

    def object_key(self, key: str) -> str:
        """Key below the bucket."""
        return f"{self._prefix}/{key}" if self._prefix else key


class _Transient(Exception):
    """A read that may succeed when it is tried again."""


class S3Reader:
    """Ranged reads of one object through obstore."""

    def __init__(self, store: S3Store, key: str) -> None:
        self._bucket, self._key, self._url = store.bucket, store.object_key(key), f"{store.url}/{key}"

    def read_into(self, start: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        pause = FIRST_PAUSE_SECONDS
        for attempt in range(READ_ATTEMPTS):
            try:
                buffer[:] = memoryview(self._get(start, len(buffer)))
            except _Transient as error:
                if attempt == READ_ATTEMPTS - 1:
                    raise StorageError(str(error)) from None
                time.sleep(pause)
                pause *= 2
            else:
                return

    def close(self) -> None:
        """Nothing is kept open."""

    def _get(self, start: int, length: int) -> Any:
        import obstore
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            data = obstore.get_range(_bulk_store(self._bucket, os.getpid()), self._key, start=start, length=length)
        except FileNotFoundError as error:
            raise ObjectMissing(f"{self._url} does not exist") from error
        except (PermissionDeniedError, UnauthenticatedError):
            raise StorageError(f"{self._url}: access denied; check credentials and bucket policy") from None
        except (BaseError, OSError) as error:
            message = _without_query(error)
            if "416 Range Not Satisfiable" not in message:
                raise _Transient(f"{self._url}: bytes {start} to {start + length}: {message}") from None
            data = b""
        if len(data) != length:
            raise StorageError(
                f"{self._url}: ends before byte {start + length}: bytes {start} to {start + length} were asked for"
            )
        return data


@functools.cache
def _client(pid: int) -> Any:  # noqa: ARG001  a client does not survive a fork
    """boto3's client, with the environment, profiles and roles that s3fs uses too."""
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client("s3", config=Config(**S3_OPTIONS["config_kwargs"]))


@functools.cache
def _bulk_store(bucket: str, pid: int) -> Any:
    """Obstore's client of one bucket, with boto3's endpoint, region and credentials."""
    import boto3
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store as BulkStore

    endpoint = _client(pid).meta.endpoint_url
    options: dict[str, Any] = {} if "amazonaws.com" in endpoint else {"endpoint": endpoint}
    session = boto3.session.Session(region_name=_client(pid).meta.region_name)
    return BulkStore(
        bucket,
        virtual_hosted_style_request=False,
        credential_provider=Boto3CredentialProvider(session),
        client_options={"allow_http": endpoint.startswith("http://"), "timeout": "120s", "connect_timeout": "10s"},
        retry_config={
            "max_retries": 8,
            "backoff": {
                "base": 2,
                "init_backoff": timedelta(seconds=FIRST_PAUSE_SECONDS),
                "max_backoff": timedelta(seconds=10),
            },
            "retry_timeout": timedelta(seconds=RETRY_SECONDS),
        },
        **options,
    )


def _without_query(error: BaseException) -> str:
    """The first line of an error, without the query of a URL, where signatures stand."""
    return str(error).split("\n", 1)[0].split("?", 1)[0]
