"""One conformance suite that every store passes, and how URLs are opened."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ObjectExists, ObjectMissing, StorageError, StorageFull
from cluster.storage import Store, is_shared_with_workers, list_text_files, local_path, open_object, open_store
from configs.errors import UserError

SECRET = "wJalrXUtnFEMIbPxRfiCY"
RACERS = 6
RACE_ROUNDS = 20
"""Rounds of a race: each is a fresh chance for two winners."""


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "s3":
        for key, value in request.getfixturevalue("s3_environment").items():
            monkeypatch.setenv(key, value)
        return open_store(f"s3://runs/{uuid.uuid4().hex}/root")
    return open_store(str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}/root")


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads change places after every few bytecodes, so that races that can happen do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def race(attempt: Callable[[int], bool]) -> list[int]:
    """Run ``attempt`` on :data:`RACERS` threads that start together; the numbers of those that won."""
    start = threading.Barrier(RACERS)

    def run(number: int) -> bool:
        start.wait()
        return attempt(number)

    with ThreadPoolExecutor(RACERS) as pool:
        return [number for number, won in enumerate(pool.map(run, range(RACERS))) if won]


def won(write: Callable[[], object]) -> bool:
    try:
        write()
    except ObjectExists:
        return False
    return True


def stream(store: Store, key: str, *pieces: bytes) -> None:
    with store.create_stream(key) as out:
        for piece in pieces:
            out.write(piece)


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
    if store.url.startswith("s3://"):
        store.create("key", b"bytes")  # a retry after a lost response meets its own write
        return
    with pytest.raises(ObjectExists):
        store.create("key", b"bytes")


def test_create_race_local_has_one_winner(tmp_path: Path, frequent_switches: None) -> None:
    require_one_winner_of_create(open_store(str(tmp_path)))


def test_create_race_memory_has_one_winner(frequent_switches: None) -> None:
    require_one_winner_of_create(open_store(f"memory://{uuid.uuid4().hex}"), rounds=300)


def require_one_winner_of_create(store: Store, rounds: int = RACE_ROUNDS) -> None:
    for number in range(rounds):
        key = f"key-{number}"
        winners = race(lambda racer, key=key: won(lambda: store.create(key, b"racer %d" % racer)))
        assert len(winners) == 1
        assert store.read(key) == b"racer %d" % winners[0]


def test_create_stream_race_has_one_winner(store: Store, frequent_switches: None) -> None:
    for number in range(RACE_ROUNDS):
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


def test_replace_race_has_one_winner(store: Store, frequent_switches: None) -> None:
    for number in range(RACE_ROUNDS):
        key = f"key-{number}"
        store.put(key, b"old")
        winners = race(lambda racer, key=key: store.replace(key, b"racer %d" % racer, b"old"))
        assert len(winners) == 1
        assert store.read(key) == b"racer %d" % winners[0]


def test_replace_concurrent_counters_lose_no_count(store: Store, frequent_switches: None) -> None:
    store.put("counter", b"0")
    counts_each = 5

    def count(_: int) -> bool:
        for _ in range(counts_each):
            while not store.replace("counter", b"%d" % (int(before := store.read("counter")) + 1), before):
                pass
        return True

    race(count)
    assert int(store.read("counter")) == RACERS * counts_each


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
        "read", "read_range", "size", "version", "exists", "keys", "folders", "put", "create", "create_stream",
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


# Children and URLs


def test_child_is_the_same_storage_below_a_key(store: Store) -> None:
    store.child("a").put("b", b"bytes")
    assert store.read("a/b") == b"bytes"
    assert store.child("a").url == f"{store.url}/a"


def test_store_opened_again_by_its_url_sees_the_same_objects(store: Store) -> None:
    store.put("key", b"bytes")
    assert open_store(store.url).read("key") == b"bytes"
    assert open_store(f"{store.url}/").url == store.url


def test_open_object_splits_folder_and_key(store: Store) -> None:
    store.put("folder/key", b"bytes")
    folder, key = open_object(f"{store.url}/folder/key")
    assert (folder.url, key, folder.read(key)) == (f"{store.url}/folder", "key", b"bytes")


def test_is_shared_with_workers_memory_is_not(tmp_path: Path) -> None:
    assert not is_shared_with_workers(open_store("memory://x"))
    assert is_shared_with_workers(open_store(str(tmp_path)))


def test_local_urls_of_one_folder_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    urls = [f"{tmp_path}/run", f"file://{tmp_path}/run", "run", "run/", "./run", "~/run"]
    assert {open_store(url).url for url in urls} == {str(tmp_path / "run")}


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIAKEY:{SECRET}@bucket/path",
        f"s3://{SECRET}@bucket",
        f"s3://bucket/path?token={SECRET}",
        f"https://user:{SECRET}@host/path",
        f"memory://user:{SECRET}@x",
        pytest.param(
            f"s3://AKIAKEY:{SECRET}/more@bucket/path",
        ),
    ],
)
def test_open_store_url_with_credentials_refused_without_echo(url: str) -> None:
    with pytest.raises(UserError) as caught:
        open_store(url)
    assert SECRET not in str(caught.value)
    assert "credentials" in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("scheme", ["gs", "https", "ftp", "abfs"])
def test_open_store_unsupported_scheme_refused_by_name(scheme: str) -> None:
    with pytest.raises(UserError, match=f"'{scheme}' is not supported.*create-if-absent"):
        open_store(f"{scheme}://host/path")


@pytest.mark.parametrize("url", ["memory://", "s3://", "s3://[bucket/x"])
def test_open_store_url_without_a_root_refused(url: str) -> None:
    try:
        open_store(url)
    except UserError:
        return
    pytest.fail("opened")


@pytest.mark.parametrize("url", ["file://runs/tiny", "file:///data/run#2"])
def test_local_path_keeps_every_part_or_refuses(url: str) -> None:
    try:
        path = local_path(url)
    except UserError:
        return
    assert str(path).endswith(url.removeprefix("file://"))


# Failures of the file system


def test_put_no_space_left_named_and_nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (store.put, store.create):
        with pytest.raises(StorageFull, match="free some and run the same command again"):
            write("key", b"bytes")
    assert every_path_below(store) == []


def test_put_other_failure_is_a_storage_error_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match=f"{tmp_path}/key: Input/output error") as caught:
        store.put("key", b"bytes")
    assert not isinstance(caught.value, StorageFull)
    assert every_path_below(store) == []


def test_put_failed_replacement_keeps_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    store.put("key", b"old")

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(StorageError):
            store.put("key", b"new")
    assert store.read("key") == b"old"


# Listing sources of data


def test_list_text_files_folder_glob_and_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for key in ("b.txt", "a.txt", "deep/c.txt", "d.json"):
        store.put(key, b"text")
    below = f"{tmp_path}/"
    assert [url.removeprefix(below) for url in list_text_files(str(tmp_path))] == [
        "a.txt", "b.txt", "d.json", "deep/c.txt",
    ]  # fmt: skip
    assert [url.removeprefix(below) for url in list_text_files(f"{tmp_path}/*.txt")] == ["a.txt", "b.txt"]
    assert list(list_text_files(f"{tmp_path}/d.json")) == [f"{tmp_path}/d.json"]
    assert list(list_text_files(f"file://{tmp_path}/d.json")) == [f"{tmp_path}/d.json"]


def test_list_text_files_unknown_scheme_refused() -> None:
    with pytest.raises(UserError, match="cannot be listed"):
        list_text_files("nosuchscheme://host/path")
