"""Write a checkpoint: shards streamed and hashed, small files, and the manifest last."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from cluster.errors import ObjectExists
from cluster.storage import Store
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

    ``check`` raises if the lease was lost. A folder that holds a manifest already is not touched.
    """
    check()
    everything = {**contents, INDEX_KEY: build_index(shards)}
    if not store.exists(MANIFEST_KEY):
        for key, data in everything.items():
            store.put(key, data)
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
    different content is :class:`CommitConflict`.
    """
    check()
    try:
        store.create(MANIFEST_KEY, encode_manifest(manifest))
        return manifest
    except ObjectExists:
        standing = parse_manifest(store.read(MANIFEST_KEY), f"{store.url}/{MANIFEST_KEY}")
        # Whoever came second may have written the index just now: point it at the shards that stand.
        store.put(INDEX_KEY, build_index(standing.shards))
        if (standing.digest, standing.state_digest) != (manifest.digest, manifest.state_digest):
            raise CommitConflict(
                f"{store.url} holds digest {standing.digest[:12]}, this attempt made {manifest.digest[:12]}; "
                "the committed one is kept"
            ) from None
        return standing


def _write_shard(
    store: Store,
    key: str,
    tensors: Sequence[TensorSpec],
    chunks_of: Callable[[TensorEntry], Chunks],
    part: Literal["model", "state"],
) -> Shard:
    header, entries = build_header(tensors)
    whole = new_hasher()
    written = []
    with store.create_stream(key) as out:
        whole.update(header)
        out.write(header)
        for entry in entries:
            hasher = new_hasher()
            for chunk in _checked(entry, chunks_of(entry)):
                hasher.update(chunk)
                whole.update(chunk)
                out.write(chunk)
            written.append(TensorEntry(**{**entry.__dict__, "digest": str(hasher.hexdigest())}))
    size = len(header) + sum(entry.bytes for entry in entries)
    return Shard(key=key, part=part, bytes=size, digest=str(whole.hexdigest()), tensors=tuple(written))


def _checked(entry: TensorEntry, chunks: Chunks) -> Iterator[bytes | memoryview]:
    length = 0
    for chunk in chunks:
        length += len(chunk)
        yield chunk
    assert length == entry.bytes, f"{entry.name}: wrote {length} bytes of {entry.bytes}"
