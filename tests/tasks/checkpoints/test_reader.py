"""Opening checkpoints: ours by manifest, plain Hugging Face folders by header, liars not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from cluster.errors import StorageError
from cluster.storage import Store, open_store
from configs.errors import UserError
from tasks.checkpoints.digest import digest_bytes
from tasks.checkpoints.manifest import INDEX_KEY, MANIFEST_KEY
from tasks.checkpoints.reader import SINGLE_FILE_KEY, Checkpoint, open_checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.tensor_reader import TensorReader

A, B, C = torch.arange(6.0).reshape(2, 3), torch.arange(4.0), torch.tensor(3.0)


def tensor_bytes_at(checkpoint: Checkpoint, name: str, part: str = "model") -> bytes:
    place = getattr(checkpoint, part)[name]
    data = bytearray(place.num_bytes)
    with TensorReader(checkpoint.store) as reader:
        reader.read_into(place, 0, place.num_elements, memoryview(data))
    return bytes(data)


def put_folder(store: Store, weight_map: object, **files: dict[str, torch.Tensor]) -> None:
    store.put(INDEX_KEY, json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
    for stem, tensors in files.items():
        store.put(f"{stem}.safetensors", save(tensors))


# What a checkpoint looks like


def test_open_single_file_finds_every_tensor(save_folder: Callable[..., str]) -> None:
    checkpoint = open_checkpoint(save_folder("plain", {"a": A, "b": B, "c": C}))
    assert set(checkpoint.model) == {"a", "b", "c"}
    assert tensor_bytes_at(checkpoint, "a") == A.numpy().tobytes()
    assert (checkpoint.num_files, checkpoint.state, checkpoint.manifest, checkpoint.manifest_digest) == (
        1, {}, None, None,
    )  # fmt: skip


def test_open_sharded_folder_finds_every_tensor(save_folder: Callable[..., str]) -> None:
    url = save_folder("sharded", {"a": A}, {"b": B, "c": C})
    checkpoint = open_checkpoint(url)
    assert {name: place.regions[0].key for name, place in checkpoint.model.items()} == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    assert tensor_bytes_at(checkpoint, "b") == B.numpy().tobytes()
    assert (checkpoint.num_files, checkpoint.url) == (2, url)


def test_open_snapshot_goes_by_its_manifest(memory_store: Store, commit_snapshot: Callable[..., Any]) -> None:
    manifest = commit_snapshot(memory_store, {"a": A, "b": B}, state={"exp_avg.a": A + 1}, step=7)
    # What the manifest does not list does not belong to the snapshot.
    memory_store.put(SINGLE_FILE_KEY, save({"stray": A}))
    checkpoint = open_checkpoint(memory_store.url)
    assert (set(checkpoint.model), set(checkpoint.state), checkpoint.num_files) == ({"a", "b"}, {"exp_avg.a"}, 1)
    assert tensor_bytes_at(checkpoint, "a") == A.numpy().tobytes()
    assert tensor_bytes_at(checkpoint, "exp_avg.a", "state") == (A + 1).numpy().tobytes()
    assert checkpoint.manifest == manifest
    assert checkpoint.manifest_digest == digest_bytes(memory_store.read(MANIFEST_KEY))


def test_open_index_wins_over_a_single_file(memory_store: Store) -> None:
    memory_store.put(SINGLE_FILE_KEY, save({"old": A}))
    put_folder(memory_store, {"a": "x.safetensors"}, x={"a": A})
    assert set(open_checkpoint(memory_store.url).model) == {"a"}


def test_open_file_in_a_subfolder_is_allowed(memory_store: Store) -> None:
    memory_store.put(INDEX_KEY, json.dumps({"weight_map": {"a": "sub/x.safetensors"}}).encode())
    memory_store.put("sub/x.safetensors", save({"a": A}))
    assert tensor_bytes_at(open_checkpoint(memory_store.url), "a") == A.numpy().tobytes()


# No checkpoint


def test_open_empty_folder_refused(memory_store: Store) -> None:
    with pytest.raises(UserError, match=f"{memory_store.url}: no checkpoint here"):
        open_checkpoint(memory_store.url)


def test_open_missing_folder_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        open_checkpoint(str(tmp_path / "missing"))


def test_open_other_formats_refused(memory_store: Store) -> None:
    memory_store.put("pytorch_model.bin", b"pickle")
    with pytest.raises(UserError, match="no checkpoint here"):
        open_checkpoint(memory_store.url)


# An index that disagrees with its files


def test_open_tensor_in_a_file_but_not_in_the_index_refused(memory_store: Store) -> None:
    put_folder(memory_store, {"a": "x.safetensors"}, x={"a": A, "hidden": B})
    with pytest.raises(CheckpointError, match=r"x.safetensors: tensor 'hidden' is in the file but not in the index"):
        open_checkpoint(memory_store.url)


def test_open_tensor_in_two_files_refused(memory_store: Store) -> None:
    put_folder(memory_store, {"a": "x.safetensors", "b": "y.safetensors"}, x={"a": A}, y={"a": A, "b": B})
    with pytest.raises(CheckpointError, match=r"y.safetensors: tensor 'a' is in the file but not in the index"):
        open_checkpoint(memory_store.url)


def test_open_index_naming_a_missing_file_refused(memory_store: Store) -> None:
    put_folder(memory_store, {"a": "x.safetensors", "b": "y.safetensors"}, x={"a": A})
    with pytest.raises(CheckpointError, match=r"the index names 'y.safetensors', which does not exist"):
        open_checkpoint(memory_store.url)


def test_open_index_naming_a_missing_tensor_refused(memory_store: Store) -> None:
    put_folder(memory_store, {"a": "x.safetensors", "lost": "x.safetensors"}, x={"a": A})
    with pytest.raises(CheckpointError, match="tensors that no file holds: lost"):
        open_checkpoint(memory_store.url)


@pytest.mark.parametrize(
    "key", ["../secret.safetensors", "a/../../secret.safetensors", "/secret.safetensors", "..", ""]
)
@pytest.mark.parametrize("storage", ["local", "memory"])
def test_open_index_with_path_traversal_refused(key: str, storage: str, tmp_path: Path, memory_store: Store) -> None:
    root = open_store(str(tmp_path)) if storage == "local" else memory_store
    root.put("secret.safetensors", save({"a": A}))
    store = root.child("checkpoint")
    put_folder(store, {"a": key})
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        open_checkpoint(store.url)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 5}}', b'{"weight_map": {"a": null}}', b"5"],
)
def test_open_damaged_index_refused(memory_store: Store, data: bytes) -> None:
    memory_store.put(INDEX_KEY, data)
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        open_checkpoint(memory_store.url)


def test_open_index_with_a_null_byte_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put_folder(store, {"a": "x\0.safetensors"})
    with pytest.raises((CheckpointError, StorageError)):
        open_checkpoint(store.url)


def test_open_index_without_tensors_refused(memory_store: Store) -> None:
    put_folder(memory_store, {})
    with pytest.raises((CheckpointError, UserError)):
        open_checkpoint(memory_store.url)


# Damaged files and manifests


def test_open_truncated_file_refused_with_its_url(memory_store: Store) -> None:
    memory_store.put(SINGLE_FILE_KEY, save({"a": A})[:-1])
    with pytest.raises(CheckpointError, match=f"{memory_store.url}/{SINGLE_FILE_KEY}.*truncated"):
        open_checkpoint(memory_store.url)


def test_open_damaged_manifest_refused_with_its_url(memory_store: Store) -> None:
    memory_store.put(SINGLE_FILE_KEY, save({"a": A}))
    memory_store.put(MANIFEST_KEY, b"{")
    with pytest.raises(CheckpointError, match=f"{memory_store.url}/{MANIFEST_KEY}"):
        open_checkpoint(memory_store.url)


@pytest.mark.parametrize("key", ["../x.safetensors", "/x.safetensors", ""])
def test_open_manifest_with_path_traversal_refused(
    memory_store: Store, commit_snapshot: Callable[..., Any], key: str
) -> None:
    commit_snapshot(memory_store, {"a": A})
    values = json.loads(memory_store.read(MANIFEST_KEY))
    values["shards"][0]["key"] = key
    memory_store.put(MANIFEST_KEY, json.dumps(values).encode())
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        open_checkpoint(memory_store.url)
