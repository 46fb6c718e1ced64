"""Storage without create-if-absent: refused, unless the user says that one driver at a time is seen to."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ObjectExists, ObjectMissing, ObjectTruncated
from cluster.storage import WEAK_STORAGE_VARIABLE, Store, open_store, require_create_if_absent
from configs.errors import UserError
from configs.merging import MergeConfig
from pipelines.tick import tick
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder
from tests.faulty_store import FaultyStore
from tests.retention_run import make_run, small_config


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A scheme that pmaflow knows nothing of: fsspec's own name for local files."""
    monkeypatch.setenv(WEAK_STORAGE_VARIABLE, "1")
    return open_store(f"local://{tmp_path}/root")


class Forgetful(FaultyStore):
    """An S3 server that ignores the condition of a conditional write."""

    def create(self, key: str, data: bytes) -> None:
        self.inner.put(key, data)


def test_unknown_scheme_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WEAK_STORAGE_VARIABLE, raising=False)
    with pytest.raises(UserError, match=f"'gs' is not supported.*{WEAK_STORAGE_VARIABLE}=1"):
        open_store("gs://bucket/run")


def test_scheme_that_fsspec_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WEAK_STORAGE_VARIABLE, "1")
    with pytest.raises(UserError, match="'nonsense' cannot be opened"):
        open_store("nonsense://bucket/run")


def test_objects_are_written_read_listed_and_deleted(store: Store) -> None:
    store.create("a/one", b"0123456789")
    with store.create_stream("a/two") as stream:
        stream.write(b"streamed")
    with pytest.raises(ObjectExists):
        store.create("a/one", b"again")
    with pytest.raises(ObjectExists), store.create_stream("a/two") as stream:
        stream.write(b"again")
    assert (store.read_range("a/one", 2, 5), store.size("a/two"), store.read("a/two")) == (b"234", 8, b"streamed")
    assert (store.keys("a"), store.folders("")) == (["a/one", "a/two"], ["a"])
    assert store.replace("a/one", b"new", b"0123456789")
    assert not store.replace("a/one", b"newer", b"0123456789")
    with pytest.raises(ObjectTruncated):
        store.read_range("a/one", 0, 9)
    store.delete("a/one")
    with pytest.raises(ObjectMissing):
        store.read("a/one")


def test_a_run_lives_there(store: Store) -> None:
    run = make_run(f"{store.url}/run", range(1, 5), small_config(merge=MergeConfig(count=3, evaluate=False)))
    assert len(tick(run.url)["merged"]) == 2
    assert len(RunFolder(run.url).merged()) == 2


def test_server_that_ignores_the_condition_is_found_out_before_a_run_begins(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    run.store = Forgetful(run.store, lambda *_: False)
    with pytest.raises(UserError, match="ignores create-if-absent"):
        run.begin(small_config())
    assert not run.store.exists(RUN_KEY)


def test_server_that_ignores_the_condition_is_taken_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WEAK_STORAGE_VARIABLE, "1")
    run = RunFolder(str(tmp_path / "run"))
    run.store = Forgetful(run.store, lambda *_: False)
    assert run.begin(small_config()).config == small_config()


@pytest.mark.parametrize("url", ["memory://weak-test", "path"])
def test_storage_that_honours_it_is_accepted(url: str, tmp_path: Path) -> None:
    store = open_store(url if "://" in url else str(tmp_path))
    store.create("key", b"data")
    require_create_if_absent(store, "key", b"data")
    assert store.read("key") == b"data"
