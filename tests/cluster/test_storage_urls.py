"""How URLs are opened, what a failing file system does, and how sources of data are listed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cluster.errors import StorageError, StorageFull
from cluster.storage import Store, is_shared_with_workers, list_text_files, local_path, open_store
from configs.errors import UserError

SECRET = "wJalrXUtnFEMIbPxRfiCY"


def every_path_below(store: Store) -> list[str]:
    """All objects, hidden partial ones included."""
    return sorted(str(path) for path in Path(store.url).rglob("*") if path.is_file())


# URLs


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
