"""One conformance suite that every store passes, and how URLs are opened."""

from __future__ import annotations

import contextlib
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import faulty_proxy, seeded_faults
from faulty_store import FaultyStore
from racing import RACERS, frequent_switches, race, stream, won

from cluster.errors import ObjectExists, ObjectMissing, StorageError
from cluster.storage import Store, open_store

__all__ = ["frequent_switches"]

RACE_ROUNDS, S3_RACE_ROUNDS = 20, 5
"""Rounds of a race: each is a fresh chance for two winners. SeaweedFS lets losers wait for whole seconds."""

FAULT_SEED, FAULT_RATE = 20261121, 0.04
READERS = 8


def never(method: str, key: str) -> bool:
    return False


@pytest.fixture(scope="session")
def faulty_environment(s3_environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The S3 server behind a proxy that breaks some requests of any kind."""
    with faulty_proxy(s3_environment["AWS_ENDPOINT_URL"]) as proxy:
        proxy.choose = seeded_faults(FAULT_SEED, FAULT_RATE)
        yield {**s3_environment, "AWS_ENDPOINT_URL": proxy.url}


@pytest.fixture(params=["local", "memory", "wrapped", "s3", "s3 under faults"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param.startswith("s3"):
        environment = "s3_environment" if request.param == "s3" else "faulty_environment"
        for key, value in request.getfixturevalue(environment).items():
            monkeypatch.setenv(key, value)
        return open_store(f"s3://runs/{uuid.uuid4().hex}/root")
    if request.param == "wrapped":
        return FaultyStore(open_store(f"memory://{uuid.uuid4().hex}/root"), never)
    return open_store(str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}/root")


@pytest.fixture
def race_rounds(request: pytest.FixtureRequest) -> int:
    return S3_RACE_ROUNDS if "s3" in request.node.callspec.id else RACE_ROUNDS


def every_path_below(store: Store) -> list[str]:
    """All objects, hidden partial ones included where they can be seen."""
    if store.url.startswith("/"):
        return sorted(str(path) for path in Path(store.url).rglob("*") if path.is_file())
    return store.keys()


# Whole objects


def test_create_absent_key_is_readable(store: Store) -> None:
    store.create("folder/key", b"bytes")
    assert (store.read("folder/key"), store.size("folder/key"), store.exists("folder/key")) == (b"bytes", 5, True)


def test_create_empty_object_exists(store: Store) -> None:
    store.create("key", b"")
    assert (store.read("key"), store.size("key"), store.exists("key")) == (b"", 0, True)


def test_create_existing_key_refused_and_untouched(store: Store) -> None:
    store.create("key", b"first")
    with pytest.raises(ObjectExists, match="key exists already"):
        store.create("key", b"second")
    assert store.read("key") == b"first"
    assert len(every_path_below(store)) == 1


def test_create_existing_key_with_equal_bytes_refused(store: Store) -> None:
    store.create("key", b"bytes")
    with pytest.raises(ObjectExists):
        store.create("key", b"bytes")


def test_create_race_has_one_winner(store: Store, race_rounds: int, frequent_switches: None) -> None:
    for number in range(race_rounds * (10 if store.url.startswith("memory") else 1)):
        key = f"key-{number}"
        winners = race(lambda racer, key=key: won(lambda: store.create(key, b"racer %d" % racer)))
        assert len(winners) == 1
        assert store.read(key) == b"racer %d" % winners[0]


def test_create_stream_race_has_one_winner(store: Store, race_rounds: int, frequent_switches: None) -> None:
    for number in range(race_rounds):
        key = f"key-{number}"
        winners = race(lambda racer, key=key: won(lambda: stream(store, key, b"racer ", b"%d" % racer)))
        assert len(winners) == 1
        assert store.read(key) == b"racer %d" % winners[0]


def test_create_stream_unfinished_is_invisible(store: Store) -> None:
    with store.create_stream("folder/key") as out:
        out.write(b"half")
        assert not store.exists("folder/key")
        assert store.keys() == []
        out.write(memoryview(b" and whole"))
    assert store.read("folder/key") == b"half and whole"
    assert store.keys() == ["folder/key"]


def test_create_stream_exception_leaves_nothing(store: Store) -> None:
    def break_off() -> None:
        with store.create_stream("key") as out:
            out.write(b"half")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        break_off()
    assert every_path_below(store) == []
    stream(store, "key", b"whole")
    assert store.read("key") == b"whole"


def test_create_stream_existing_key_refused_and_untouched(store: Store) -> None:
    store.create("key", b"first")
    with pytest.raises(ObjectExists):
        stream(store, "key", b"second")
    assert store.read("key") == b"first"
    assert len(every_path_below(store)) == 1


def test_put_existing_key_replaced(store: Store) -> None:
    store.put("key", b"first, longer")
    store.put("key", b"second")
    assert store.read("key") == b"second"


def test_put_readers_see_old_or_new_never_a_mix(store: Store) -> None:
    old, new = b"a" * 200_000, b"b" * 200_000
    store.put("key", old)
    finished = threading.Event()

    def write() -> None:
        for _ in range(15):
            store.put("key", new)
            store.put("key", old)
        finished.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        seen = {store.read("key")}
        while not finished.is_set() and not writing.done():
            seen.add(store.read("key"))
        writing.result()
    assert seen <= {old, new}


def test_put_below_an_object_refused(store: Store) -> None:
    store.put("key", b"bytes")
    if store.url.startswith("s3://"):
        return  # keys are flat there: both may exist
    with pytest.raises(StorageError):
        store.put("key/below", b"bytes")
    assert store.read("key") == b"bytes"


def test_version_replaced_object_differs(store: Store) -> None:
    store.put("key", b"first")
    first = store.version("key")
    assert store.version("key") == first
    store.put("key", b"other")
    assert store.version("key") != first


# Compare and swap


def test_replace_expected_bytes_written(store: Store) -> None:
    store.put("key", b"old")
    assert store.replace("key", b"new", b"old") is True
    assert store.read("key") == b"new"
    assert store.keys() == ["key"]


def test_replace_other_bytes_untouched(store: Store) -> None:
    store.put("key", b"old")
    assert store.replace("key", b"new", b"older") is False
    assert store.read("key") == b"old"


def test_replace_missing_object_not_written(store: Store) -> None:
    store.put("neighbour", b"")
    assert store.replace("key", b"new", b"") is False
    assert store.keys() == ["neighbour"]


def test_replace_missing_folder_not_written(store: Store, request: pytest.FixtureRequest) -> None:
    assert store.replace("folder/key", b"new", b"old") is False


def replaced(store: Store, key: str, data: bytes, expected: bytes) -> bool | None:
    """Whether it was replaced; None if S3 says that it cannot know, after a lost response and a newer write."""
    try:
        return store.replace(key, data, expected)
    except StorageError as error:
        if "is unknown" in str(error):
            return None
        raise


def test_replace_race_has_one_winner(store: Store, race_rounds: int, frequent_switches: None) -> None:
    for number in range(race_rounds):
        key = f"key-{number}"
        store.put(key, b"old")
        winners = race(lambda racer, key=key: replaced(store, key, b"racer %d" % racer, b"old") is True)
        assert len(winners) == 1
        assert store.read(key) == b"racer %d" % winners[0]


def test_replace_concurrent_counters_lose_no_count(store: Store, frequent_switches: None) -> None:
    store.put("counter", b"0")
    counts_each = 5
    unknown = []

    def count(_: int) -> bool:
        for _ in range(counts_each):
            while not (done := replaced(store, "counter", b"%d" % (int(before := store.read("counter")) + 1), before)):
                if done is None:
                    unknown.append(before)
        return True

    race(count)
    assert RACERS * counts_each <= int(store.read("counter")) <= RACERS * counts_each + len(unknown)


# Ranges


@pytest.mark.parametrize(("start", "end"), [(0, 10), (0, 0), (3, 7), (9, 10), (10, 10)])
def test_read_range_inside_gives_exactly_those_bytes(store: Store, start: int, end: int) -> None:
    store.put("key", b"0123456789")
    assert store.read_range("key", start, end) == b"0123456789"[start:end]


@pytest.mark.parametrize(("start", "end"), [(0, 11), (9, 11), (10, 11), (50, 60)])
def test_read_range_past_the_end_refused(store: Store, start: int, end: int) -> None:
    store.put("key", b"0123456789")
    with pytest.raises(StorageError, match=f"bytes {start} to {end} were asked for"):
        store.read_range("key", start, end)


def test_read_range_negative_start_refused(store: Store) -> None:
    store.put("key", b"0123456789")
    with pytest.raises(StorageError):
        store.read_range("key", -2, 2)


@pytest.mark.parametrize(("start", "length"), [(0, 10), (0, 0), (3, 4), (9, 1), (10, 0)])
def test_reader_inside_fills_the_buffer(store: Store, start: int, length: int) -> None:
    store.put("key", b"0123456789")
    assert read_into(store, "key", start, length) == b"0123456789"[start : start + length]


@pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (50, 10)])
def test_reader_past_the_end_refused(store: Store, start: int, length: int) -> None:
    store.put("key", b"0123456789")
    with pytest.raises(StorageError, match=f"bytes {start} to {start + length} were asked for"):
        read_into(store, "key", start, length)


def test_reader_empty_object_has_no_bytes(store: Store) -> None:
    store.put("key", b"")
    assert read_into(store, "key", 0, 0) == b""
    with pytest.raises(StorageError):
        read_into(store, "key", 0, 1)


def test_reader_missing_object_is_named(store: Store) -> None:
    with pytest.raises(ObjectMissing, match="folder/key"):
        read_into(store, "folder/key", 0, 1)


def test_reader_many_threads_read_their_own_ranges(store: Store) -> None:
    length, whole = 70_001, random.Random(7).randbytes(2_000_000)
    store.put("key", whole)
    reader = store.open_reader("key")

    def read(start: int) -> bytes:
        buffer = bytearray(min(length, len(whole) - start))
        reader.read_into(start, memoryview(buffer))
        return bytes(buffer)

    with contextlib.closing(reader), ThreadPoolExecutor(READERS) as pool:
        assert b"".join(pool.map(read, range(0, len(whole), length))) == whole


def read_into(store: Store, key: str, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    with contextlib.closing(store.open_reader(key)) as reader:
        reader.read_into(start, memoryview(buffer))
    return bytes(buffer)


# Missing objects


@pytest.mark.parametrize("method", ["read", "size", "version"])
def test_missing_object_is_named(store: Store, method: str) -> None:
    with pytest.raises(ObjectMissing, match="folder/key"):
        getattr(store, method)("folder/key")


def test_read_range_missing_object_is_named(store: Store) -> None:
    with pytest.raises(ObjectMissing, match="key"):
        store.read_range("key", 0, 1)


def test_read_if_present_missing_object_is_none(store: Store) -> None:
    assert store.read_if_present("key") is None
    assert not store.exists("key")


def test_delete_object_is_gone_and_missing_one_is_no_error(store: Store) -> None:
    store.put("folder/key", b"bytes")
    store.delete("folder/key")
    store.delete("folder/key")
    assert store.keys() == []
    store.create("folder/key", b"again")


# Listings


def test_keys_all_folders_sorted_and_relative(store: Store) -> None:
    for key in ("b/2", "a", "b/1", "b/c/3"):
        store.put(key, b"")
    assert store.keys() == ["a", "b/1", "b/2", "b/c/3"]


def test_keys_prefix_is_a_folder_not_a_text(store: Store) -> None:
    for key in ("run/1", "run/2/3", "runs/4", "run-5"):
        store.put(key, b"")
    assert store.keys("run") == ["run/1", "run/2/3"]


def test_listings_missing_folder_is_empty(store: Store) -> None:
    assert store.keys() == []
    assert store.keys("missing") == []
    assert store.folders("missing") == []


def test_folders_direct_children_only(store: Store) -> None:
    for key in ("snapshots/step-2/manifest.json", "snapshots/step-1/a/b", "snapshots/file", "other/x/y"):
        store.put(key, b"")
    assert store.folders("snapshots") == ["step-1", "step-2"]


def test_folders_of_an_object_is_empty_or_a_storage_error(store: Store, request: pytest.FixtureRequest) -> None:
    store.put("key", b"")
    with contextlib.suppress(StorageError):
        assert store.folders("key") == []


@pytest.mark.parametrize("key", ["a b", "a#b", "a?b", "a%20b", "a*b", "a[b]", "ü/漢", "~a", "a::b", "..a", "a../b"])
def test_key_unusual_characters_are_kept(store: Store, key: str) -> None:
    store.create(key, b"bytes")
    assert store.read(key) == b"bytes"
    assert store.keys() == [key]


# Keys that leave the folder


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "a/..", "..", "/outside"])
@pytest.mark.parametrize(
    "call",
    [
        lambda store, key: store.read(key),
        lambda store, key: store.read_range(key, 0, 1),
        lambda store, key: read_into(store, key, 0, 1),
        lambda store, key: store.size(key),
        lambda store, key: store.version(key),
        lambda store, key: store.exists(key),
        lambda store, key: store.keys(key),
        lambda store, key: store.folders(key),
        lambda store, key: store.put(key, b"bytes"),
        lambda store, key: store.create(key, b"bytes"),
        lambda store, key: stream(store, key, b"bytes"),
        lambda store, key: store.replace(key, b"bytes", b"outside"),
        lambda store, key: store.delete(key),
    ],
    ids=[
        "read", "read_range", "read_into", "size", "version", "exists", "keys", "folders", "put", "create", "create_stream",
        "replace", "delete",
    ],
)  # fmt: skip
def test_key_that_leaves_its_folder_refused(store: Store, key: str, call: Callable[[Store, str], Any]) -> None:
    parent = open_store(store.url.rpartition("/")[0])
    parent.put("outside", b"outside")
    store.put("a/inside", b"")
    with pytest.raises(StorageError, match="leaves its folder"):
        call(store, key)
    assert parent.keys() == ["outside", "root/a/inside"]
    assert parent.read("outside") == b"outside"


# Children


def test_prune_forgets_emptied_folders_and_no_others(store: Store) -> None:
    for key in ("a/full/x", "a/emptied/x", "a/emptied/below/y", "a/half/below/z", "a/half/x"):
        store.create(key, b"data")
    for key in ("a/emptied/x", "a/emptied/below/y", "a/half/x"):
        store.delete(key)
    for folder in ("a/full", "a/emptied", "a/half", "a/never"):
        store.prune(folder)
    assert store.folders("a") == ["full", "half"]
    assert store.keys("") == ["a/full/x", "a/half/below/z"]


def test_abandon_uploads_nothing_left_over_is_none(store: Store) -> None:
    stream(store, "key", b"bytes")
    assert store.abandon_uploads() == 0
    assert store.read("key") == b"bytes"


def test_child_is_the_same_storage_below_a_key(store: Store) -> None:
    store.child("a").put("b", b"bytes")
    assert store.read("a/b") == b"bytes"
    assert store.child("a").url == f"{store.url}/a"


def test_store_opened_again_by_its_url_sees_the_same_objects(store: Store) -> None:
    store.put("key", b"bytes")
    assert open_store(store.url).read("key") == b"bytes"
    assert open_store(f"{store.url}/").url == store.url


# The store that fails on purpose


def test_faulty_store_chosen_calls_raise_and_leave_nothing(tmp_path: Path) -> None:
    inner = open_store(str(tmp_path))
    inner.put("there", b"bytes")
    for method in ("write", "complete"):
        store = FaultyStore(inner, lambda called, key, method=method: (called, key) == (method, "key"))
        with pytest.raises(StorageError, match=f"{method} failed on purpose"):
            stream(store, "key", b"half")
    store = FaultyStore(inner, lambda called, key: called == "read_into" and key == "there")
    assert store.read("there") == b"bytes"
    with pytest.raises(StorageError, match="read_into failed on purpose"):
        read_into(store, "there", 0, 1)
    assert inner.keys() == ["there"]
