"""Read a checkpoint: ours by its manifest, a plain Hugging Face folder by its headers."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass

from cluster.errors import ObjectMissing
from cluster.storage import Store, open_store
from configs.errors import UserError
from tasks.checkpoints.dcp import METADATA_KEY, open_dcp
from tasks.checkpoints.digest import digest_bytes
from tasks.checkpoints.manifest import INDEX_KEY, MANIFEST_KEY, Manifest, parse_manifest
from tasks.checkpoints.regions import Region, TensorPlace
from tasks.checkpoints.safetensors_header import CheckpointError, TensorEntry, read_header

SINGLE_FILE_KEY = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A readable checkpoint: places of its tensors, and its manifest if it has one."""

    url: str
    """Its folder: where its manifest is, if it has one."""
    store: Store
    """Where its tensors lie: the same folder, or the one that an adopted checkpoint was left in."""
    model: dict[str, TensorPlace]
    """Weights by name."""
    state: dict[str, TensorPlace]
    """Training-state tensors by name; empty for plain folders."""
    num_files: int
    """Model shards; 1 for torch DCP, whose files say how many ranks saved, not how much work a file is."""
    manifest: Manifest | None
    """None for a plain folder."""
    manifest_digest: str | None
    """BLAKE3 of the manifest's bytes."""


def open_checkpoint(url: str) -> Checkpoint:
    """Open the checkpoint at ``url``: one of ours, a torch DCP folder, or a plain Hugging Face safetensors folder.

    Reads the manifest, the metadata or the headers, no tensor data. Raises :class:`configs.errors.UserError` if there is no
    checkpoint, :class:`CheckpointError` if it is damaged.
    """
    store = open_store(url)
    data = store.read_if_present(MANIFEST_KEY)
    if data is None:
        return open_plain(store)
    manifest = parse_manifest(data, f"{store.url}/{MANIFEST_KEY}")
    if manifest.source is not None and manifest.source.format == "dcp":
        return _open_adopted_dcp(store, manifest, digest_bytes(data))
    return checkpoint_of(store, manifest, data)


def checkpoint_of(store: Store, manifest: Manifest, data: bytes) -> Checkpoint:
    """What ``manifest``, whose bytes are ``data``, says lies at ``store``; for all but adopted DCP."""
    model: dict[str, TensorPlace] = {}
    state: dict[str, TensorPlace] = {}
    for shard in manifest.shards:
        _require_inside(store, shard.key)
        target = model if shard.part == "model" else state
        for entry in shard.tensors:
            target[entry.name] = place_of(shard.key, entry)
    return Checkpoint(
        url=store.url,
        store=store if manifest.source is None else open_store(manifest.source.url),
        model=model,
        state=state,
        num_files=sum(shard.part == "model" for shard in manifest.shards),
        manifest=manifest,
        manifest_digest=digest_bytes(data),
    )


def _open_adopted_dcp(store: Store, manifest: Manifest, manifest_digest: str) -> Checkpoint:
    """Places come from the foreign metadata, digests from our manifest."""
    assert manifest.source is not None
    foreign = open_plain(open_store(manifest.source.url))
    stated = {entry.name: entry for entry in manifest.model_tensors()}
    found = {name: (place.dtype, place.shape) for name, place in foreign.model.items()}
    if found != {name: (entry.dtype, entry.shape) for name, entry in stated.items()}:
        raise CheckpointError(f"{foreign.url} holds other tensors than when it was adopted as {store.url}")
    model = {name: dataclasses.replace(place, digest=stated[name].digest) for name, place in foreign.model.items()}
    return dataclasses.replace(foreign, url=store.url, model=model, manifest=manifest, manifest_digest=manifest_digest)


def place_of(key: str, entry: TensorEntry) -> TensorPlace:
    """Place of a tensor that lies whole in the safetensors object ``key``."""
    region = Region(key=key, offset=entry.offset, start=_origin(len(entry.shape)), shape=entry.shape)
    return TensorPlace(dtype=entry.dtype, shape=entry.shape, regions=(region,), digest=entry.digest)


@functools.cache
def _origin(dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions


def open_plain(store: Store) -> Checkpoint:
    """Open a checkpoint without a manifest: torch DCP by its metadata, safetensors by index and headers."""
    if store.exists(METADATA_KEY):
        found = open_dcp(store)
        return Checkpoint(
            url=store.url,
            store=store,
            model=found.model,
            state=found.state,
            num_files=1,
            manifest=None,
            manifest_digest=None,
        )
    index = store.read_if_present(INDEX_KEY)
    weight_map = _parse_weight_map(store, index) if index is not None else None
    keys = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE_KEY]
    places: dict[str, TensorPlace] = {}
    for key in keys:
        try:
            entries = read_header(store, key)
        except ObjectMissing:
            if weight_map is None:
                raise UserError(
                    f"{store.url}: no checkpoint here (no {MANIFEST_KEY}, {INDEX_KEY}, {SINGLE_FILE_KEY} or {METADATA_KEY})"
                ) from None
            raise CheckpointError(f"{store.url}: the index names {key!r}, which does not exist") from None
        for entry in entries:
            if weight_map is not None and weight_map.get(entry.name) != key:
                raise CheckpointError(f"{store.url}/{key}: tensor {entry.name!r} is in the file but not in the index")
            places[entry.name] = place_of(key, entry)
    if missing := sorted(set(weight_map or {}) - places.keys()):
        raise CheckpointError(f"{store.url}: the index names tensors that no file holds: {', '.join(missing[:10])}")
    if not places:
        raise CheckpointError(f"{store.url}: a checkpoint without a single tensor")
    return Checkpoint(
        url=store.url, store=store, model=places, state={}, num_files=len(keys), manifest=None, manifest_digest=None
    )


def _parse_weight_map(store: Store, index: bytes) -> dict[str, str]:
    url = f"{store.url}/{INDEX_KEY}"
    try:
        weight_map = json.loads(index)["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(key, str) for key in weight_map.values()):
            raise TypeError("weight_map must map names to file names")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{url}: not a safetensors index: {error}") from error
    for key in set(weight_map.values()):
        _require_inside(store, key)
    return weight_map


def _require_inside(store: Store, key: str) -> None:
    if key.startswith("/") or ".." in key.split("/") or not key or "\0" in key:
        raise CheckpointError(f"{store.url}: file name {key!r} leaves the checkpoint's folder")
