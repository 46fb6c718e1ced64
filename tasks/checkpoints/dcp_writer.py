"""Write weights as a torch.distributed.checkpoint (DCP) folder for trainers that load nothing else.

The format's index is a pickle and its chunks are torch.save archives, so this file alone imports torch for them. Objects
are streamed, one tensor in memory at a time; ``.metadata`` is written last, by create-if-absent: it is the commit.
"""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable
from typing import Any

from cluster.errors import ObjectExists
from cluster.storage import Store, open_store
from configs.errors import UserError
from tasks.checkpoints.content import tensor_digests
from tasks.checkpoints.dcp import METADATA_KEY
from tasks.checkpoints.digest import content_digest, digest_bytes
from tasks.checkpoints.groups import group_names
from tasks.checkpoints.reader import Checkpoint, open_plain
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import TensorEntry, tensor_bytes
from tasks.checkpoints.tensor_reader import TensorReader
from tasks.checkpoints.torch_archive import DTYPES

MARK_KEY = ".export-of-pmaflow"
"""Marks a folder as an unfinished export of ours, so that the next attempt may clear it."""
SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
Encode = Callable[[bytearray, str], tuple[bytes, str]]
"""Bytes stored as one dtype to bytes of the dtype that is written."""


def write_dcp(checkpoint: Checkpoint, output_url: str, *, encode: Encode, shard_bytes: int) -> dict[str, Any]:
    """Write the weights of ``checkpoint`` to ``output_url`` under their own names; returns digest and what was written.

    An output that holds the same weights already is success without work; one that holds anything else is
    :class:`configs.errors.UserError`, and nothing of it is touched.
    """
    started = time.perf_counter()
    store = open_store(output_url)
    standing = _standing(store, checkpoint, encode)
    if standing is not None:
        return {"digest": standing, "tasks": 0, "bytes_read": 0, "bytes_written": 0, "seconds": 0.0}
    store.put(MARK_KEY, b"")
    writer = _Writer(checkpoint, store, encode)
    for number, names in enumerate(_shards(checkpoint, shard_bytes)):
        writer.write_object(f"__{number}_0.distcp", names)
    for key in SIDE_FILES:
        if (data := checkpoint.store.read_if_present(key)) is not None:
            store.put(key, data)
    try:
        store.create(METADATA_KEY, writer.metadata())
    except ObjectExists:
        raise UserError(f"{store.url}: another export was committed meanwhile; it is left as it is") from None
    store.delete(MARK_KEY)
    return {
        "digest": content_digest(writer.entries),
        "tasks": writer.num_objects,
        "bytes_read": sum(place.num_bytes for place in checkpoint.model.values()),
        "bytes_written": writer.bytes_written,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _standing(store: Store, checkpoint: Checkpoint, encode: Encode) -> str | None:
    """Digest of the output if it holds these weights; clears what an attempt of ours left unfinished."""
    if store.exists(METADATA_KEY):
        there = dict(tensor_digests(open_plain(store)))
        entries = list(_encoded_entries(checkpoint, encode))
        if there == {entry.name: entry.digest for entry in entries}:
            return content_digest(entries)
        raise UserError(f"{store.url} holds another checkpoint; nothing was touched: choose an empty --output")
    keys = [key for key in store.keys("") if not key.startswith("leases/")]
    if keys and MARK_KEY not in keys:
        raise UserError(
            f"{store.url} holds files that are not of this export ({', '.join(keys[:5])}); nothing was touched: "
            "choose an empty --output"
        )
    for key in keys:
        store.delete(key)
    return None


def _encoded_entries(checkpoint: Checkpoint, encode: Encode) -> list[TensorEntry]:
    with TensorReader(checkpoint.store) as reader:
        return [
            _entry(name, place, *encode(_read(reader, place), place.dtype)) for name, place in checkpoint.model.items()
        ]


def _shards(checkpoint: Checkpoint, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for names in group_names(checkpoint.model).values():
        size = sum(checkpoint.model[name].num_bytes for name in names)
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1] += names
        room -= size
    return shards


class _Writer:
    """Objects of the folder, and what its metadata must say of them."""

    def __init__(self, checkpoint: Checkpoint, store: Store, encode: Encode) -> None:
        self._checkpoint, self._store, self._encode = checkpoint, store, encode
        self.entries: list[TensorEntry] = []
        self.bytes_written = 0
        self.num_objects = 0
        self._tensors: dict[str, Any] = {}
        self._storage: dict[Any, Any] = {}

    def write_object(self, key: str, names: list[str]) -> None:
        """Stream one ``.distcp`` object with an archive per tensor."""
        self.num_objects += 1
        position = 0
        with TensorReader(self._checkpoint.store) as reader, self._store.create_stream(key) as out:
            for name in names:
                place = self._checkpoint.model[name]
                data, dtype = self._encode(_read(reader, place), place.dtype)
                self.entries.append(_entry(name, place, data, dtype))
                archive = self._archive(name, place, data, dtype, key, position)
                out.write(archive)
                position += len(archive)
        self.bytes_written += position

    def metadata(self) -> bytes:
        """The pickled index."""
        from torch.distributed.checkpoint.metadata import Metadata

        paths: dict[str, Any] = {name: (name,) for name in self._tensors}
        return pickle.dumps(Metadata(state_dict_metadata=self._tensors, planner_data=paths, storage_data=self._storage))

    def _archive(self, name: str, place: TensorPlace, data: bytes, dtype: str, key: str, position: int) -> memoryview:
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
            TensorStorageMetadata,
        )

        tensor = (
            torch.frombuffer(bytearray(data), dtype=_torch_dtype(dtype))
            if data
            else torch.empty(0, dtype=_torch_dtype(dtype))
        )
        tensor = tensor.reshape(place.shape)
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        origin, size = torch.Size([0] * len(place.shape)), torch.Size(place.shape)
        self._tensors[name] = TensorStorageMetadata(
            properties=TensorProperties.create_from_tensor(tensor),
            size=size,
            chunks=[ChunkStorageMetadata(offsets=origin, sizes=size)],
        )
        info = _StorageInfo(relative_path=key, offset=position, length=buffer.tell())
        self._storage[MetadataIndex(fqn=name, offset=origin, index=0)] = info
        return buffer.getbuffer()


def _entry(name: str, place: TensorPlace, data: bytes, dtype: str) -> TensorEntry:
    size = tensor_bytes(dtype, place.shape)
    return TensorEntry(name=name, dtype=dtype, shape=place.shape, offset=0, bytes=size, digest=digest_bytes(data))


def _read(reader: TensorReader, place: TensorPlace) -> bytearray:
    data = bytearray(place.num_bytes)
    if data:
        reader.read_into(place, 0, place.num_elements, memoryview(data))
    return data


def _torch_dtype(dtype: str) -> Any:
    import torch

    return getattr(torch, next(name for name, stored in DTYPES.items() if stored == dtype))
