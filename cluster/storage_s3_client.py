"""The S3 client: how it is configured, and what its errors mean.

Credentials, region, profile, endpoint, proxies and certificates are those that boto3 resolves from the
environment and its configuration files; requests are signed in a header, so no URL carries a signature.
"""

from __future__ import annotations

import functools
import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from urllib3.exceptions import HTTPError

from cluster.errors import ObjectMissing, StorageDenied, StorageError, StorageFull

CONNECT_SECONDS = 10
READ_SECONDS = 60
"""Longest silence of a server before a request counts as failed."""
MAX_ATTEMPTS = 8
"""Of one request, with exponential back-off; ``AWS_MAX_ATTEMPTS`` overrides it."""
MAX_CONNECTIONS = 64

BROKEN_BODY = (IncompleteReadError, ResponseStreamingError, ReadTimeoutError, HTTPError)
"""A body that ended early; urllib3's own errors get past botocore when TLS breaks off."""
HTTP_NOT_FOUND, HTTP_CONFLICT, HTTP_PRECONDITION_FAILED, HTTP_RANGE_NOT_SATISFIABLE = 404, 409, 412, 416
HTTP_SERVER_ERROR = 500

_MISSING = ("NoSuchKey", "404")
_FULL = ("507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull")
_DENIED = "access denied; check credentials and bucket policy"
_THROTTLED = "storage kept answering that it is overloaded; run the same command again later"
_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION"
_HINTS = {
    "NoSuchBucket": "the bucket does not exist; create it, or check AWS_ENDPOINT_URL",
    "AccessDenied": _DENIED,
    "403": _DENIED,
    "AllAccessDisabled": _DENIED,
    "InvalidAccessKeyId": "the access key is unknown to this storage; check credentials and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key; check credentials",
    "ExpiredToken": "the session token has expired; get new credentials",
    "InvalidToken": "the session token is not valid; get new credentials",
    "RequestTimeTooSkewed": "this machine's clock differs from the storage's by minutes; set the clock",
    "SlowDown": _THROTTLED,
    "503": _THROTTLED,
    "ServiceUnavailable": _THROTTLED,
    "429": _THROTTLED,
    "TooManyRequests": _THROTTLED,
    "NotImplemented": "this storage cannot do what is asked; commits need conditional writes (If-None-Match, If-Match)",
    "NoSuchUpload": "the upload was discarded meanwhile, by another driver's clean-up or a lifecycle rule",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "301": _REGION,
}


def client() -> Any:
    """The S3 client of this process for the present ``AWS_*`` environment; a forked process gets one of its own."""
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _client_of(os.getpid(), environment)


@functools.lru_cache(maxsize=8)
def _client_of(_pid: int, environment: tuple[tuple[str, str], ...]) -> Any:
    attempts = {} if "AWS_MAX_ATTEMPTS" in dict(environment) else {"total_max_attempts": MAX_ATTEMPTS}
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=MAX_CONNECTIONS,
        retries={"mode": "standard", **attempts},
        # Our own BLAKE3 digests guard content; some stores refuse the default checksum trailers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": False},
    )
    session = boto3.Session()
    try:
        made = session.client("s3", config=config)
        if _is_guarded(made.meta.endpoint_url):
            return made
        return session.client("s3", config=config.merge(Config(s3={"payload_signing_enabled": True})))
    except ValueError as error:
        raise StorageError(f"the S3 client cannot be set up: {error}; check AWS_ENDPOINT_URL") from error


def _is_guarded(endpoint: str) -> bool:
    """Whether bodies travel where nobody can change them, so that hashing each one for its signature is wasted."""
    url = urlsplit(endpoint)
    if url.scheme == "https" or url.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(url.hostname or "").is_loopback
    except ValueError:
        return False


@contextmanager
def mapped_errors(what: str) -> Iterator[None]:
    """Raise the client's errors as ours, about the object or bucket ``what``."""
    try:
        yield
    except ClientError as error:
        raise _of_answer(what, error) from error
    except (BotoCoreError, HTTPError) as error:
        raise StorageError(f"{what}: {error}; check AWS_ENDPOINT_URL, the network and credentials") from error


def status_of(error: ClientError) -> int:
    """HTTP status of an answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """Name that the storage gave its error; of an answer without a body, the HTTP status."""
    return str(error.response.get("Error", {}).get("Code", status_of(error)))


def was_retried(error: ClientError) -> bool:
    """Whether the request had been sent before, so that an earlier attempt may have been carried out."""
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)) > 0


def _of_answer(what: str, error: ClientError) -> StorageError:
    code, status = code_of(error), str(status_of(error))
    if code in _MISSING:
        return ObjectMissing(f"{what} does not exist")
    if code in _FULL or status in _FULL:
        return StorageFull(f"{what}: no space left; free some and run the same command again")
    hint = _HINTS.get(code) or _HINTS.get(status)
    if hint:
        kind = StorageDenied if hint == _DENIED else StorageError
        return kind(f"{what}: {hint} ({code})")
    return StorageError(f"{what}: {code} (HTTP {status}): {error.response.get('Error', {}).get('Message', '')}")
