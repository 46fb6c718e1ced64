"""The catalog: a run at a glance, from a cache that is never trusted beyond what it can know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import StorageError
from cluster.fan_out import fan_out_local
from cluster.storage import Store
from tasks.checkpoints.catalog import CATALOG_KEY, Catalog, Look
from tasks.checkpoints.manifest import MANIFEST_KEY
from tasks.checkpoints.run_folder import RunFolder, snapshot_key
from tests.faulty_store import FaultyStore
from tests.retention_run import commit, make_run


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return make_run(str(tmp_path / "run"), range(1, 6))


def noting(store: Store) -> tuple[Catalog, list[str]]:
    """A catalog of ``store``, and the manifests that it reads."""
    reads: list[str] = []

    def note(method: str, key: str) -> bool:
        if method == "read" and key.endswith(MANIFEST_KEY):
            reads.append(key)
        return False

    return Catalog(FaultyStore(store, note)), reads


def read_manifests(store: Store) -> tuple[Look, list[str]]:
    """A look at ``store``, and the manifests that it read."""
    catalog, reads = noting(store)
    return catalog.look(), reads


def test_catalog_says_what_the_manifests_say(run: Store) -> None:
    look, reads = read_manifests(run)
    assert len(reads) == 5
    for glance, snapshot in zip(look.snapshots(), RunFolder(run.url).snapshots(), strict=True):
        assert (glance.step, glance.url, glance.digest) == (snapshot.step, snapshot.url, snapshot.digest)
        assert (glance.tokens_seen, glance.healthy, glance.phase) == (
            snapshot.tokens_seen, snapshot.healthy, snapshot.phase,
        )  # fmt: skip
        assert glance.bytes == sum(len(run.read(key)) for key in run.keys(snapshot_key(snapshot.step))) - len(
            run.read(f"{snapshot_key(snapshot.step)}/{MANIFEST_KEY}")
        )


def test_next_look_reads_what_is_new_alone(run: Store) -> None:
    read_manifests(run)
    commit(run, 6)
    look, reads = read_manifests(run)
    assert reads == [f"{snapshot_key(6)}/{MANIFEST_KEY}"]
    assert [glance.step for glance in look.snapshots()] == [1, 2, 3, 4, 5, 6]
    assert read_manifests(run)[1] == []


def test_threads_that_share_a_catalog_read_each_manifest_once(run: Store) -> None:
    catalog, reads = noting(run)
    looks = list(fan_out_local(lambda _: catalog.look(), range(8), num_workers=8))
    assert sorted(reads) == [f"{snapshot_key(step)}/{MANIFEST_KEY}" for step in range(1, 6)]
    assert all(look == looks[0] for look in looks)


def test_a_look_stays_what_it_was(run: Store) -> None:
    catalog, _ = noting(run)
    before = catalog.look()
    commit(run, 6)
    assert len(catalog.look().snapshots()) == 6
    assert len(before.snapshots()) == 5


def test_snapshot_that_lost_its_manifest_is_not_shown(run: Store) -> None:
    read_manifests(run)
    run.delete(f"{snapshot_key(3)}/{MANIFEST_KEY}")
    assert [glance.step for glance in read_manifests(run)[0].snapshots()] == [1, 2, 4, 5]


def test_attempt_without_a_manifest_is_not_shown_and_asked_for_again(run: Store) -> None:
    run.put(f"{snapshot_key(6)}/model-00001-of-00002.safetensors", b"half")
    assert [glance.step for glance in read_manifests(run)[0].snapshots()] == [1, 2, 3, 4, 5]
    run.delete(f"{snapshot_key(6)}/model-00001-of-00002.safetensors")
    commit(run, 6)
    assert [glance.step for glance in read_manifests(run)[0].snapshots()][-1] == 6


def test_replaced_manifest_is_read_again_on_a_path(run: Store) -> None:
    read_manifests(run)
    key = f"{snapshot_key(2)}/{MANIFEST_KEY}"
    values = json.loads(run.read(key))
    run.put(key, json.dumps({**values, "healthy": False}).encode())
    assert [glance.healthy for glance in read_manifests(run)[0].snapshots()] == [True, False, True, True, True]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-10],
        lambda data: data.replace(b'"healthy": true', b'"healthy": false'),
        lambda _: b"[]",
        lambda _: b"{}",
        lambda data: data.replace(b'"format_version": 1', b'"format_version": 2'),
    ],
    ids=["torn", "edited", "list", "empty", "other version"],
)
def test_spoiled_cache_is_made_anew(run: Store, spoil: Callable[[bytes], bytes]) -> None:
    read_manifests(run)
    good = run.read(CATALOG_KEY)
    run.put(CATALOG_KEY, spoil(good))
    look, reads = read_manifests(run)
    assert len(reads) == 5
    assert all(glance.healthy for glance in look.snapshots())
    assert run.read(CATALOG_KEY) == good


def test_run_that_may_only_be_read_is_shown_without_a_cache(run: Store) -> None:
    look = Catalog(FaultyStore(run, lambda method, _: method == "put")).look()
    assert [glance.step for glance in look.snapshots()] == [1, 2, 3, 4, 5]
    assert not run.exists(CATALOG_KEY)


def test_storage_that_fails_is_no_empty_run(run: Store) -> None:
    with pytest.raises(StorageError):
        Catalog(FaultyStore(run, lambda method, key: method == "read" and key.endswith(MANIFEST_KEY))).look()


def test_moved_run_shows_its_new_place(run: Store, tmp_path: Path) -> None:
    read_manifests(run)
    (tmp_path / "run").rename(tmp_path / "moved")
    look = RunFolder(str(tmp_path / "moved")).look()
    assert look.snapshots()[0].url == f"{tmp_path}/moved/{snapshot_key(1)}"


def test_losses_are_read_once_each(run: Store) -> None:
    asked: list[str] = []

    def read(key: str) -> float:
        asked.append(key)
        return float(json.loads(run.read(key))["loss"])

    run.put("evaluations/a-s.json", b'{"loss": 1.5}')
    assert Catalog(run).losses(read) == {"evaluations/a-s.json": 1.5}
    run.put("evaluations/b-s.json", b'{"loss": 2.5}')
    assert Catalog(run).losses(read) == {"evaluations/a-s.json": 1.5, "evaluations/b-s.json": 2.5}
    assert asked == ["evaluations/a-s.json", "evaluations/b-s.json"]
