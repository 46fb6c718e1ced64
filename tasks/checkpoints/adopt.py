"""Adopt a foreign checkpoint: a manifest of ours that states what lies in a folder of someone else's, nothing copied.

A checkpoint is complete, and may be adopted, when its format says so: safetensors when the index and every file
it names are there with headers that tile their files; torch DCP when ``.metadata`` is there, which the saving job
writes after all ranks have finished, and every object is as long as it says.
"""

from __future__ import annotations

import time
from typing import Literal

from cluster.errors import ObjectExists
from cluster.storage import Store, open_store
from configs.errors import UserError
from tasks.checkpoints.content import tensor_digests
from tasks.checkpoints.dcp import METADATA_KEY
from tasks.checkpoints.digest import digest_bytes
from tasks.checkpoints.groups import group_names
from tasks.checkpoints.manifest import (
    MANIFEST_KEY,
    Manifest,
    Shard,
    Source,
    encode_manifest,
    model_digest,
    parse_manifest,
)
from tasks.checkpoints.reader import Checkpoint, open_plain
from tasks.checkpoints.run_folder import code_version, snapshot_key
from tasks.checkpoints.safetensors_header import TensorEntry

Format = Literal["hf", "dcp"]


def adopt_checkpoint(
    run: Store,
    url: str,
    *,
    format_: Format,
    step: int,
    tokens_seen: int,
    phase: Literal["warmup", "stable", "decay"] | None,
) -> tuple[Manifest, bool]:
    """Register the checkpoint at ``url`` as the run's snapshot at ``step``; the manifest that stands, and whether it is new.

    Reads every weight once, for its digest. Raises :class:`configs.errors.UserError` if the folder holds another format
    or the step is taken by other content, :class:`tasks.checkpoints.safetensors_header.CheckpointError` if it is damaged or incomplete.
    """
    source = open_store(url)
    _require_format(source, format_)
    folder = run.child(snapshot_key(step))
    standing = folder.read_if_present(MANIFEST_KEY)
    if standing is not None:
        there = parse_manifest(standing, f"{folder.url}/{MANIFEST_KEY}")
        if there.source is not None and there.source.url == source.url:
            return there, False
        raise UserError(f"{folder.url} holds a {there.kind} snapshot already; {url} was not adopted as step {step}")
    checkpoint = open_plain(source)
    shards = _shards(checkpoint, dict(tensor_digests(checkpoint)), format_)
    manifest = Manifest(
        kind="adopted",
        step=step,
        tokens_seen=tokens_seen,
        digest=model_digest(shards),
        state_digest=None,
        shards=shards,
        files=(),
        parameter_groups=group_names(sorted(checkpoint.model)),
        phase=phase,
        source=Source(url=source.url, format=format_),
        code_version=code_version(),
        created=time.time(),
    )
    try:
        folder.create(MANIFEST_KEY, encode_manifest(manifest))
    except ObjectExists:
        return parse_manifest(folder.read(MANIFEST_KEY), f"{folder.url}/{MANIFEST_KEY}"), False
    return manifest, True


def _require_format(source: Store, format_: Format) -> None:
    is_dcp = source.exists(METADATA_KEY)
    if is_dcp != (format_ == "dcp"):
        found = "torch DCP (it has .metadata)" if is_dcp else "no torch DCP (it has no .metadata)"
        raise UserError(f"{source.url} holds {found}, --format {format_} was given")


def _shards(checkpoint: Checkpoint, digests: dict[str, str], format_: Format) -> tuple[Shard, ...]:
    """The objects that hold the weights; for DCP one entry that stands for the metadata and lists the tensors."""
    if format_ == "dcp":
        data = checkpoint.store.read(METADATA_KEY)
        tensors = [_entry(name, checkpoint, 0, digests[name]) for name in sorted(checkpoint.model)]
        return (
            Shard(key=METADATA_KEY, part="model", bytes=len(data), digest=digest_bytes(data), tensors=tuple(tensors)),
        )
    by_key: dict[str, list[TensorEntry]] = {}
    for name, place in checkpoint.model.items():
        (region,) = place.regions
        by_key.setdefault(region.key, []).append(_entry(name, checkpoint, region.offset, digests[name]))
    return tuple(
        # A digest of the whole object would cost a second pass: its tensors' digests hold every byte that counts.
        Shard(
            key=key,
            part="model",
            bytes=checkpoint.store.size(key),
            digest="",
            tensors=tuple(sorted(entries, key=lambda entry: entry.offset)),
        )
        for key, entries in sorted(by_key.items())
    )


def _entry(name: str, checkpoint: Checkpoint, offset: int, digest: str) -> TensorEntry:
    place = checkpoint.model[name]
    return TensorEntry(
        name=name, dtype=place.dtype, shape=place.shape, offset=offset, bytes=place.num_bytes, digest=digest
    )
