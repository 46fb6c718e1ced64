"""What only S3 does: multipart uploads, lost answers, and errors that users must understand."""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
import uuid
from collections.abc import Callable, Iterator

import pytest
from faulty_proxy import (
    CONFLICT,
    DROP,
    IGNORE_RANGE,
    INTERNAL_ERROR,
    LOSE,
    SLOW_DOWN,
    TRUNCATE,
    Choose,
    Fault,
    FaultyProxy,
    Request,
    always,
    faulty_proxy,
    first,
    no_fault,
    seeded_faults,
)
from racing import race, stream, won

from cluster import storage_s3, storage_s3_client, storage_s3_upload
from cluster.errors import ObjectExists, StorageError, StorageFull
from cluster.storage import open_store
from cluster.storage_s3 import S3Store

PART_BYTES = 5 << 20
"""The least that S3 allows."""
BIG_BYTES = 8 * PART_BYTES + 12_345
FEW_PARTS_BYTES = 2 * PART_BYTES + 1
CHILD_SECONDS = 30
ALWAYS = 1_000_000


@pytest.fixture(scope="module")
def big() -> bytes:
    return random.Random(3).randbytes(BIG_BYTES)


@pytest.fixture
def proxy(s3_environment: dict[str, str]) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_environment["AWS_ENDPOINT_URL"]) as running:
        yield running


@pytest.fixture
def store(proxy: FaultyProxy, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A store behind the proxy, with small parts and few, quick attempts."""
    for key, value in s3_environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(storage_s3_upload, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(storage_s3_upload, "CONFLICT_PAUSES_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(storage_s3, "BODY_PAUSES_SECONDS", (0.0, 0.0))
    opened = open_store(f"s3://runs/{uuid.uuid4().hex}/root")
    assert isinstance(opened, S3Store)
    return opened


def require_nothing_left(store: S3Store) -> None:
    assert store.keys() == []
    assert store.unfinished_uploads() == []


# Multipart streams


def test_stream_many_parts_whole_and_bounded(store: S3Store, proxy: FaultyProxy, big: bytes) -> None:
    with store.create_stream("key") as out:
        for start in range(0, len(big), 1_300_001):
            out.write(memoryview(big)[start : start + 1_300_001])
        assert store.keys() == []
    assert store.version("key").endswith('-9"')
    assert 1 < proxy.peak["part"] <= storage_s3_upload.PARTS_IN_FLIGHT
    assert store.unfinished_uploads() == []
    for start, end in [(0, len(big)), (PART_BYTES - 3, PART_BYTES + 3), (len(big) - 1, len(big))]:
        assert store.read_range("key", start, end) == big[start:end]


def test_stream_many_parts_under_faults_whole(
    store: S3Store, proxy: FaultyProxy, big: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "8")
    proxy.choose = seeded_faults(5, 0.25)
    stream(store, "key", big)
    assert store.read("key") == big
    assert sum(proxy.faults.values()) > proxy.faults["none"]


@pytest.mark.parametrize(("size", "parts"), [(PART_BYTES - 1, 0), (PART_BYTES, 0), (PART_BYTES + 1, 2)])
def test_stream_around_one_part_is_one_request_or_two_parts(
    store: S3Store, proxy: FaultyProxy, big: bytes, size: int, parts: int
) -> None:
    stream(store, "key", big[:size], b"")
    assert (proxy.peak["part"] > 0) == (parts > 0)
    assert store.version("key").endswith(f'-{parts}"') == (parts > 0)
    assert store.read("key") == big[:size]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_stream_exception_leaves_no_object_and_no_upload(store: S3Store, big: bytes, kind: type[BaseException]) -> None:
    def break_off() -> None:
        with store.create_stream("key") as out:
            out.write(big[: 3 * PART_BYTES])
            assert [key for key, _ in store.unfinished_uploads()] == ["key"]
            raise kind("on purpose")

    with pytest.raises(kind, match="on purpose"):
        break_off()
    require_nothing_left(store)


def test_stream_race_of_parts_has_one_winner_and_no_orphans(store: S3Store, proxy: FaultyProxy, big: bytes) -> None:
    # SeaweedFS 4.48 looks for the object and completes in two steps: of racing completions several may win there.
    proxy.one_at_a_time = "complete"
    winners = race(lambda racer: won(lambda: stream(store, "key", b"%d" % racer, big[:FEW_PARTS_BYTES])))
    assert len(winners) == 1
    assert store.read("key") == b"%d" % winners[0] + big[:FEW_PARTS_BYTES]
    assert store.unfinished_uploads() == []


def test_stream_equal_bytes_of_another_writer_refused(store: S3Store, big: bytes) -> None:
    stream(store, "key", big[:FEW_PARTS_BYTES])
    with pytest.raises(ObjectExists, match="key exists already"):
        stream(store, "key", big[:FEW_PARTS_BYTES])
    assert store.unfinished_uploads() == []


@pytest.mark.parametrize("operation", ["start", "part", "complete"])
@pytest.mark.parametrize("fault", [INTERNAL_ERROR, DROP])
def test_stream_request_that_keeps_failing_leaves_nothing(
    store: S3Store, proxy: FaultyProxy, big: bytes, operation: str, fault: Fault
) -> None:
    proxy.choose = first(ALWAYS, operation, fault)
    with pytest.raises(StorageError, match="root/key"):
        stream(store, "key", big[:FEW_PARTS_BYTES])
    require_nothing_left(store)


def test_stream_abort_fails_too_first_error_kept_and_clean_up_finds_it(
    store: S3Store, proxy: FaultyProxy, big: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.choose = lambda request: INTERNAL_ERROR if request.operation in ("complete", "abort") else None
    with pytest.raises(StorageError, match="InternalError"):
        stream(store, "key", big[:FEW_PARTS_BYTES])
    assert "an unfinished upload is left behind" in caplog.text
    proxy.choose = no_fault
    assert store.abandon_uploads() == 1
    require_nothing_left(store)


def test_stream_upload_discarded_by_another_driver_is_an_error(store: S3Store, big: bytes) -> None:
    def be_discarded() -> None:
        with store.create_stream("key") as out:
            out.write(big[:FEW_PARTS_BYTES])
            assert open_store(store.url).abandon_uploads() == 1

    with pytest.raises(StorageError, match="discarded"):
        be_discarded()
    require_nothing_left(store)


def test_part_bytes_ten_thousand_parts_hold_a_tebibyte() -> None:
    sizes = [storage_s3_upload.part_bytes(number) for number in range(10_000)]
    assert sum(sizes) >= 1 << 40
    assert max(sizes) <= 256 << 20


# Unfinished uploads of killed writers


def test_abandon_uploads_below_the_root_only(store: S3Store) -> None:
    s3, neighbour = storage_s3_client.client(), f"{store.url.removeprefix('s3://runs/')}-2/key"
    s3.create_multipart_upload(Bucket="runs", Key=neighbour)
    for key in ("a", "b/c"):
        s3.create_multipart_upload(Bucket="runs", Key=f"{store.url.removeprefix('s3://runs/')}/{key}")
    assert sorted(key for key, _ in store.unfinished_uploads()) == ["a", "b/c"]
    assert store.abandon_uploads() == 2
    assert store.unfinished_uploads() == []
    other = open_store(f"{store.url}-2")
    assert isinstance(other, S3Store)
    assert [key for key, _ in other.unfinished_uploads()] == ["key"]
    assert open_store("s3://runs").abandon_uploads() == 0
    assert other.abandon_uploads() == 1


def test_abandon_uploads_without_permission_warns_and_goes_on(
    store: S3Store, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.choose = first(ALWAYS, "uploads", Fault("answer", 403, "AccessDenied"))
    assert store.abandon_uploads() == 0
    assert "cannot be listed" in caplog.text
    proxy.choose = first(ALWAYS, "uploads", INTERNAL_ERROR)
    with pytest.raises(StorageError):
        store.abandon_uploads()


# Lost answers and conflicts


@pytest.mark.parametrize(("size", "operation"), [(10, "put"), (FEW_PARTS_BYTES, "complete")])
def test_stream_lost_answer_is_success(
    store: S3Store, proxy: FaultyProxy, big: bytes, size: int, operation: str
) -> None:
    for count in (1, 2):  # settled by the retry's refusal, and after the last attempt by looking
        proxy.choose = first(count, operation, LOSE)
        stream(store, f"key-{count}", big[:size])
        assert store.read(f"key-{count}") == big[:size]
    assert proxy.faults["lose"] == 3
    assert store.unfinished_uploads() == []


def test_create_lost_answer_is_success(store: S3Store, proxy: FaultyProxy) -> None:
    proxy.choose = first(1, "put", LOSE)
    store.create("key", b"bytes")
    with pytest.raises(ObjectExists):
        store.create("key", b"bytes")


def test_replace_lost_answer_is_success(store: S3Store, proxy: FaultyProxy) -> None:
    store.create("key", b"old")
    proxy.choose = first(1, "put", LOSE)
    assert store.replace("key", b"new", b"old") is True
    assert store.read("key") == b"new"


def test_replace_lost_answer_and_a_newer_write_is_unknown(store: S3Store, proxy: FaultyProxy) -> None:
    store.create("key", b"old")

    def newer_after_the_first(request: Request, seen: list[str] = []) -> Fault | None:  # noqa: B006
        if request.operation != "put" or len(seen) > 1:
            return None
        seen.append(request.operation)
        if len(seen) == 1:
            return LOSE
        store.put("key", b"newer")
        return None

    proxy.choose = newer_after_the_first
    with pytest.raises(StorageError, match="is unknown"):
        store.replace("key", b"new", b"old")
    assert store.read("key") == b"newer"


@pytest.mark.parametrize("operation", ["put", "complete"])
def test_conflict_with_an_unfinished_write_tried_again(
    store: S3Store, proxy: FaultyProxy, big: bytes, operation: str
) -> None:
    proxy.choose = first(2, operation, CONFLICT)
    stream(store, "key", big[: FEW_PARTS_BYTES if operation == "complete" else 10])
    assert store.keys() == ["key"]


def test_conflict_with_a_finished_write_is_object_exists(store: S3Store, proxy: FaultyProxy) -> None:
    store.create("key", b"theirs")
    proxy.choose = first(ALWAYS, "put", CONFLICT)
    with pytest.raises(ObjectExists):
        store.create("key", b"ours")


# Bodies


def test_read_truncated_body_read_again(store: S3Store, proxy: FaultyProxy, big: bytes) -> None:
    store.put("key", big[:100_000])
    for read in (lambda: store.read("key"), lambda: store.read_range("key", 0, 100_000)):
        proxy.choose = first(2, "get", TRUNCATE)
        assert read() == big[:100_000]


def test_read_body_always_truncated_is_an_error_never_short(store: S3Store, proxy: FaultyProxy, big: bytes) -> None:
    store.put("key", big[:100_000])
    proxy.choose = first(ALWAYS, "get", TRUNCATE)
    for read in (lambda: store.read("key"), lambda: store.read_range("key", 5, 90_000)):
        with pytest.raises(StorageError, match="root/key"):
            read()


def test_read_range_that_storage_ignores_is_an_error(store: S3Store, proxy: FaultyProxy) -> None:
    store.put("key", b"0123456789")
    proxy.choose = first(ALWAYS, "get", IGNORE_RANGE)
    with pytest.raises(StorageError, match="ignored the range"):
        store.read_range("key", 3, 5)


# Errors


def answers(status: int, code: str) -> Choose:
    return always(Fault("answer", status, code))


@pytest.mark.parametrize(
    ("choose", "kind", "words"),
    [
        (answers(503, "SlowDown"), StorageError, "overloaded"),
        (answers(429, "TooManyRequests"), StorageError, "overloaded"),
        (answers(403, "AccessDenied"), StorageError, "access denied; check credentials"),
        (answers(403, "RequestTimeTooSkewed"), StorageError, "set the clock"),
        (answers(400, "ExpiredToken"), StorageError, "get new credentials"),
        (answers(400, "AuthorizationHeaderMalformed"), StorageError, "another region"),
        (answers(507, "InsufficientStorage"), StorageFull, "free some"),
        (answers(501, "NotImplemented"), StorageError, "conditional writes"),
    ],
)
@pytest.mark.parametrize("call", [lambda store: store.create("key", b"x"), lambda store: store.read_range("key", 0, 1)])
def test_refusal_explained(
    store: S3Store,
    proxy: FaultyProxy,
    choose: Choose,
    kind: type[Exception],
    words: str,
    call: Callable[[S3Store], None],
) -> None:
    proxy.choose = choose
    with pytest.raises(kind, match=words) as caught:
        call(store)
    assert store.url in str(caught.value)


def test_missing_bucket_is_not_a_missing_object(store: S3Store) -> None:
    with pytest.raises(StorageError, match="the bucket does not exist") as caught:
        open_store("s3://no-such-bucket/root").read("key")
    assert type(caught.value) is StorageError


@pytest.mark.parametrize(
    ("name", "words"), [("SECRET_ACCESS_KEY", "secret key"), ("ACCESS_KEY_ID", "access key is unk")]
)
def test_wrong_credentials_named_without_secrets(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, words: str
) -> None:
    monkeypatch.setenv(f"AWS_{name}", "wrong-secret-value")
    with caplog.at_level(logging.INFO), pytest.raises(StorageError, match=words) as caught:
        store.create("key", b"")
    for text in (str(caught.value), str(caught.value.__cause__), caplog.text):
        assert "wrong-secret-value" not in text and "Signature=" not in text


def test_unreachable_endpoint_named(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"127.0.0.1:9.*check AWS_ENDPOINT_URL"):
        store.read("key")


def test_malformed_endpoint_named(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(StorageError, match=r"nonsense.*check AWS_ENDPOINT_URL"):
        store.read("key")


def test_unknown_profile_named(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(StorageError, match="no-such-profile"):
        store.read("key")


def test_throttled_twice_then_served(store: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    proxy.choose = first(2, "put", SLOW_DOWN)
    store.create("key", b"bytes")
    assert proxy.faults["answer"] == 2


# Processes


def test_store_pickled_holds_no_secret_and_works(store: S3Store) -> None:
    store.create("key", b"bytes")
    data = pickle.dumps(store)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in data
    assert pickle.loads(data).read("key") == b"bytes"


def test_forked_child_reads_and_writes(store: S3Store, big: bytes) -> None:
    stream(store, "before", big[:FEW_PARTS_BYTES])
    assert store.read("before") == big[:FEW_PARTS_BYTES]
    child = os.fork()
    if not child:
        signal.alarm(CHILD_SECONDS)
        stream(store, "after", store.read("before"))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert store.read("after") == big[:FEW_PARTS_BYTES]


@pytest.mark.parametrize(
    ("endpoint", "guarded"),
    [
        ("https://s3.eu-west-1.amazonaws.com", True),
        ("http://127.0.0.1:9000", True),
        ("http://[::1]:9000", True),
        ("http://localhost:9000", True),
        ("http://minio.cluster:9000", False),
        ("http://10.0.0.5:9000", False),
    ],
)
def test_payload_signed_only_over_open_networks(endpoint: str, guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert storage_s3_client.client().meta.config.s3["payload_signing_enabled"] is not guarded
