"""Write a checkpoint: shards streamed and hashed, small files, and the manifest last."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from cluster.errors import LeaseLost, ObjectExists
from cluster.storage import ObjectWriter, Store
from tasks.checkpoints.digest import digest_bytes, new_hasher
from tasks.checkpoints.manifest import (
    INDEX_KEY,
    MANIFEST_KEY,
    Manifest,
    Shard,
    SideFile,
    encode_manifest,
    parse_manifest,
)
from tasks.checkpoints.safetensors_header import TensorEntry, build_header

TensorSpec = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype and shape of a tensor to be written."""
Chunks = Iterable[bytes | memoryview]


class CommitConflict(Exception):
    """Another writer committed different content under the same key; nothing was overwritten."""


def write_shard(
    store: Store,
    key: str,
    tensors: Sequence[TensorSpec],
    chunks_of: Callable[[TensorEntry], Chunks],
    part: Literal["model", "state"],
) -> Shard:
    """Stream one safetensors object, hashing tensors and object on the way.

    ``chunks_of`` yields the bytes of one tensor in order. If ``key`` is taken by an earlier attempt,
    an attempt name beside it is used: nothing is ever overwritten, and only what the manifest lists
    belongs to the snapshot.
    """
    try:
        return _write_shard(store, key, tensors, chunks_of, part)
    except ObjectExists:
        stem = key.removesuffix(".safetensors")
        return _write_shard(store, f"{stem}.{secrets.token_hex(4)}.safetensors", tensors, chunks_of, part)


def write_side_files(
    store: Store, contents: Mapping[str, bytes], shards: Iterable[Shard], check: Callable[[], None]
) -> tuple[SideFile, ...]:
    """Write the small files of a checkpoint and its index, and describe them.

    ``check`` raises if the lease was lost. A folder that holds a manifest already is not touched, nor is a file
    that someone else has written since the check: a driver that stood still past its lease's expiry writes nothing
    over what the next one published.
    """
    everything = {**contents, INDEX_KEY: build_index(shards)}
    while not _write_unless_changed(store, everything, check):
        pass
    return tuple(SideFile(key=key, bytes=len(data), digest=digest_bytes(data)) for key, data in everything.items())


def build_index(shards: Iterable[Shard]) -> bytes:
    """The Hugging Face index that maps tensor names to model shards."""
    model_shards = [shard for shard in shards if shard.part == "model"]
    weight_map = {tensor.name: shard.key for shard in model_shards for tensor in shard.tensors}
    total = sum(tensor.bytes for shard in model_shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=1).encode()


def commit_manifest(store: Store, manifest: Manifest, check: Callable[[], None]) -> Manifest:
    """Publish by create-if-absent; returns the manifest that stands.

    ``check`` runs right before and raises if the lease was lost. If a manifest with the same content
    is there already (another attempt of the same work), that one stands and this is success;
    different content is :class:`CommitConflict`. However it ends, the index is that of the manifest that stands:
    two drivers that each stood still past their lease's expiry may have written theirs in turn.
    """
    try:
        check()
        store.create(MANIFEST_KEY, encode_manifest(manifest))
    except LeaseLost:
        if store.exists(MANIFEST_KEY):
            _restore_index(store, _read_standing(store))
        raise
    except ObjectExists:
        standing = _read_standing(store)
        _restore_index(store, standing)
        if (standing.digest, standing.state_digest) != (manifest.digest, manifest.state_digest):
            raise CommitConflict(
                f"{store.url} holds digest {standing.digest[:12]}, this attempt made {manifest.digest[:12]}; "
                "the committed one is kept"
            ) from None
        return standing
    _restore_index(store, manifest)
    return manifest


class ShardWriter:
    """Takes the tensor bytes of one shard in file order, in pieces of any size, and hashes them on the way."""

    def __init__(
        self, out: ObjectWriter, key: str, tensors: Sequence[TensorSpec], part: Literal["model", "state"]
    ) -> None:
        header, self._entries = build_header(tensors)
        self._out, self._key, self._part = out, key, part
        self._whole = new_hasher()
        self._size = len(header)
        self._digests: list[str] = []
        self._hasher = new_hasher()
        self._left = self._entries[0].bytes if self._entries else 0
        self._put(header)
        self._finish_tensors()

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``, which may end one tensor and begin the next."""
        view = memoryview(data)
        self._put(view)
        self._size += len(view)
        while view.nbytes:
            assert len(self._digests) < len(self._entries), f"{self._key}: more bytes than its tensors hold"
            part = view[: self._left]
            self._hasher.update(part)
            self._left -= len(part)
            view = view[len(part) :]
            self._finish_tensors()

    def shard(self) -> Shard:
        """What was written, once it is complete."""
        assert len(self._digests) == len(self._entries), f"{self._key}: {self._left} bytes of a tensor are missing"
        return Shard(
            key=self._key,
            part=self._part,
            bytes=self._size,
            digest=str(self._whole.hexdigest()),
            tensors=tuple(
                dataclasses.replace(entry, digest=digest)
                for entry, digest in zip(self._entries, self._digests, strict=True)
            ),
        )

    def _put(self, data: bytes | memoryview) -> None:
        self._whole.update(data)
        self._out.write(data)

    def _finish_tensors(self) -> None:
        while not self._left and len(self._digests) < len(self._entries):
            self._digests.append(str(self._hasher.hexdigest()))
            self._hasher = new_hasher()
            if len(self._digests) < len(self._entries):
                self._left = self._entries[len(self._digests)].bytes


@contextmanager
def open_shard(
    store: Store, key: str, tensors: Sequence[TensorSpec], part: Literal["model", "state"]
) -> Iterator[ShardWriter]:
    """Stream one safetensors object that must not exist; it appears whole at the end, or not at all.

    Raises :class:`cluster.errors.ObjectExists` if ``key`` is taken.
    """
    with store.create_stream(key) as out:
        writer = ShardWriter(out, key, tensors, part)
        yield writer
        writer.shard()


def _read_standing(store: Store) -> Manifest:
    return parse_manifest(store.read(MANIFEST_KEY), f"{store.url}/{MANIFEST_KEY}")


def _restore_index(store: Store, standing: Manifest) -> None:
    index = build_index(standing.shards)
    if store.read_if_present(INDEX_KEY) not in (None, index):
        store.put(INDEX_KEY, index)


def _write_unless_changed(store: Store, contents: Mapping[str, bytes], check: Callable[[], None]) -> bool:
    """Compare-and-swap of every file against what was there before ``check``; False if another driver was quicker."""
    found = {key: store.read_if_present(key) for key in contents}
    check()
    return store.exists(MANIFEST_KEY) or all(_swap(store, key, data, found[key]) for key, data in contents.items())


def _swap(store: Store, key: str, data: bytes, old: bytes | None) -> bool:
    if old is None:
        try:
            store.create(key, data)
        except ObjectExists:
            return False
        return True
    return old == data or store.replace(key, data, old)


def _write_shard(
    store: Store,
    key: str,
    tensors: Sequence[TensorSpec],
    chunks_of: Callable[[TensorEntry], Chunks],
    part: Literal["model", "state"],
) -> Shard:
    _, entries = build_header(tensors)
    with open_shard(store, key, tensors, part) as writer:
        for entry in entries:
            for chunk in _checked(entry, chunks_of(entry)):
                writer.write(chunk)
    return writer.shard()


def _checked(entry: TensorEntry, chunks: Chunks) -> Iterator[bytes | memoryview]:
    length = 0
    for chunk in chunks:
        length += len(chunk)
        yield chunk
    assert length == entry.bytes, f"{entry.name}: wrote {length} bytes of {entry.bytes}"
