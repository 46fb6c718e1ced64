"""Writing: shards that libraries read, attempts that never overwrite, one commit."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from cluster.errors import LeaseLost
from cluster.storage import Store, open_store
from tasks.checkpoints.digest import digest_bytes
from tasks.checkpoints.manifest import INDEX_KEY, MANIFEST_KEY, Manifest, Shard, read_manifest
from tasks.checkpoints.safetensors_header import TensorEntry, read_header
from tasks.checkpoints.writer import CommitConflict, build_index, commit_manifest, write_shard, write_side_files

KEY = "model-00001-of-00001.safetensors"
LATER_KEY = "model-00001-of-00001.0123abcd.safetensors"
A, B = torch.arange(12.0).reshape(3, 4), torch.tensor([7, -7])
SPECS = [("a", "F32", (3, 4)), ("b", "I64", (2,))]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def chunks_of(entry: TensorEntry) -> Iterator[memoryview]:
    data = {"a": A, "b": B}[entry.name].numpy().tobytes()
    for start in range(0, len(data), 5):
        yield memoryview(data)[start : start + 5]


def never_lost() -> None:
    return None


# Shards


def test_write_shard_is_read_by_the_library(tmp_path: Path) -> None:
    write_shard(open_store(str(tmp_path)), KEY, SPECS, chunks_of, "model")
    loaded = load_file(tmp_path / KEY)
    assert set(loaded) == {"a", "b"}
    assert torch.equal(loaded["a"], A)
    assert torch.equal(loaded["b"], B)


def test_write_shard_describes_what_it_wrote(store: Store) -> None:
    shard = write_shard(store, KEY, SPECS, chunks_of, "state")
    data = store.read(KEY)
    assert (shard.key, shard.part, shard.bytes, shard.digest) == (KEY, "state", len(data), blake3(data).hexdigest())
    assert [dataclasses.replace(tensor, digest="") for tensor in shard.tensors] == read_header(store, KEY)
    for tensor in shard.tensors:
        assert tensor.digest == blake3(data[tensor.offset : tensor.offset + tensor.bytes]).hexdigest()


def test_write_shard_twice_gives_the_same_bytes_under_an_attempt_name(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = write_shard(store, KEY, SPECS, chunks_of, "model")
    second = write_shard(store, KEY, SPECS, chunks_of, "model")
    third = write_shard(store, KEY, SPECS, chunks_of, "model")
    assert len({first.key, second.key, third.key}) == 3
    assert second.key.startswith("model-00001-of-00001.")
    assert second.key.endswith(".safetensors")
    assert first == dataclasses.replace(second, key=KEY) == dataclasses.replace(third, key=KEY)
    assert store.read(first.key) == store.read(second.key)


def test_write_shard_existing_object_is_never_overwritten(store: Store) -> None:
    store.put(KEY, b"of another attempt")
    shard = write_shard(store, KEY, SPECS, chunks_of, "model")
    assert store.read(KEY) == b"of another attempt"
    assert store.size(shard.key) == shard.bytes


def test_write_shard_failing_source_leaves_nothing(store: Store) -> None:
    def broken(entry: TensorEntry) -> Iterator[bytes]:
        yield bytes(4)
        raise RuntimeError(f"no more of {entry.name}")

    with pytest.raises(RuntimeError, match="no more of a"):
        write_shard(store, KEY, SPECS, broken, "model")
    assert store.keys() == []


@pytest.mark.parametrize("length", [0, 47, 49])
def test_write_shard_source_of_another_length_leaves_nothing(store: Store, length: int) -> None:
    with pytest.raises(AssertionError, match=f"a: wrote {length} bytes of 48"):
        write_shard(store, KEY, SPECS, lambda _: [bytes(length)], "model")
    assert store.keys() == []


# Small files


def test_write_side_file_describes_what_it_wrote(store: Store) -> None:
    item, _ = write_side_files(store, {"config.json": b"{}"}, [], never_lost)
    assert (item.key, item.bytes, item.digest) == ("config.json", 2, digest_bytes(store.read("config.json")))


def test_write_index_maps_model_tensors_only(store: Store) -> None:
    model = write_shard(store, KEY, SPECS, chunks_of, "model")
    state = write_shard(store, "state-00001-of-00001.safetensors", SPECS[:1], chunks_of, "state")
    (item,) = write_side_files(store, {}, [model, state], never_lost)
    index = json.loads(store.read(INDEX_KEY))
    assert index == {"metadata": {"total_size": 64}, "weight_map": {"a": KEY, "b": KEY}}
    assert item.digest == digest_bytes(store.read(INDEX_KEY))


# The commit


def manifest_of(shards: list[Shard], store: Store, **changes: Any) -> Manifest:
    manifest = Manifest(
        kind="training",
        step=1,
        tokens_seen=100,
        digest="digest",
        state_digest="state",
        shards=tuple(shards),
        files=write_side_files(store, {}, shards, never_lost),
        parameter_groups={"a": ["a"], "b": ["b"]},
        created=1.0,
    )
    return dataclasses.replace(manifest, **changes)


def attempt(store: Store, key: str = KEY, **changes: Any) -> Manifest:
    return manifest_of([write_shard(store, key, SPECS, chunks_of, "model")], store, **changes)


def test_commit_manifest_first_attempt_stands(store: Store) -> None:
    manifest = attempt(store)
    assert commit_manifest(store, manifest, never_lost) == manifest
    assert read_manifest(store)[0] == manifest


def test_commit_manifest_same_content_is_success_and_the_first_stands(store: Store) -> None:
    first, second = attempt(store), attempt(store, LATER_KEY, created=2.0)
    commit_manifest(store, first, never_lost)
    assert second.shards != first.shards
    assert commit_manifest(store, second, never_lost) == first
    assert read_manifest(store)[0] == first


def test_commit_manifest_same_content_index_points_at_the_manifest_that_stands(store: Store) -> None:
    first = attempt(store)
    commit_manifest(store, first, never_lost)
    second = attempt(store, LATER_KEY, created=2.0)
    # A second writer that looked before the first one committed, and wrote its index after.
    store.put(INDEX_KEY, build_index(second.shards))
    commit_manifest(store, second, never_lost)
    assert digest_bytes(store.read(INDEX_KEY)) == first.files[0].digest


@pytest.mark.parametrize("changes", [{"digest": "other"}, {"state_digest": "other"}, {"state_digest": None}])
def test_commit_manifest_other_content_is_a_conflict(store: Store, changes: dict[str, Any]) -> None:
    first = attempt(store)
    commit_manifest(store, first, never_lost)
    with pytest.raises(CommitConflict, match="the committed one is kept"):
        commit_manifest(store, attempt(store, LATER_KEY, **changes), never_lost)
    assert read_manifest(store)[0] == first


def test_commit_manifest_conflict_leaves_the_index_of_the_manifest_that_stands(store: Store) -> None:
    first = attempt(store)
    commit_manifest(store, first, never_lost)
    second = attempt(store, LATER_KEY, digest="other")
    store.put(INDEX_KEY, build_index(second.shards))
    with pytest.raises(CommitConflict):
        commit_manifest(store, second, never_lost)
    assert digest_bytes(store.read(INDEX_KEY)) == first.files[0].digest


def test_commit_manifest_lease_lost_publishes_nothing(store: Store) -> None:
    def lost() -> None:
        raise LeaseLost("taken over")

    with pytest.raises(LeaseLost):
        commit_manifest(store, attempt(store), lost)
    assert not store.exists(MANIFEST_KEY)


def test_commit_manifest_lease_is_checked_before_the_manifest_exists(store: Store) -> None:
    seen: list[bool] = []
    commit_manifest(store, attempt(store), lambda: seen.append(store.exists(MANIFEST_KEY)))
    assert seen == [False]


def test_commit_snapshot_is_loaded_by_the_library_through_the_index(
    tmp_path: Path, commit_snapshot: Callable[..., Any]
) -> None:
    commit_snapshot(open_store(str(tmp_path)), {"a": A, "b": B})
    weight_map = json.loads((tmp_path / INDEX_KEY).read_text())["weight_map"]
    assert torch.equal(load_file(tmp_path / weight_map["a"])["a"], A)
