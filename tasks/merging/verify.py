"""Prove a checkpoint again from what is stored: digests, census, lineage, and a merge recomputed in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cluster.errors import ObjectMissing, StorageError
from cluster.storage import Store, open_store
from configs.errors import UserError
from tasks.checkpoints.collected import open_collected
from tasks.checkpoints.content import tensor_digests
from tasks.checkpoints.digest import content_digest, digest_bytes, new_hasher
from tasks.checkpoints.manifest import (
    INDEX_KEY,
    STATE_KEY,
    Manifest,
    Merge,
    Shard,
    model_digest,
    read_manifest,
    state_digest,
)
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError, TensorEntry, read_header
from tasks.checkpoints.tied import open_untied
from tasks.merging.methods import EVALUATED_METHODS, MethodChoice
from tasks.merging.plan import merge_identity
from tasks.merging.recompute import check_sample

READ_BYTES = 8 << 20
MAX_PROBLEMS = 5


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked and what was found."""

    digest: str
    """Content digest that the manifest states."""
    checks: dict[str, list[str]]
    """Check to its problems; none means it holds."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Check to why it could not be made, which is no fault of the checkpoint: retention took its inputs."""

    @property
    def problems(self) -> list[str]:
        """All problems."""
        return [problem for problems in self.checks.values() for problem in problems]


def verify_checkpoint(url: str, *, load: bool = False) -> Verification:
    """Check everything that the manifest at ``url`` states. Reads the checkpoint once, and samples of a merge's inputs.

    ``load`` also loads it in transformers and runs it (:mod:`tasks.merging.load_check`).

    Raises :class:`configs.errors.UserError` if there is no manifest.
    """
    store = open_store(url)
    try:
        manifest, _ = read_manifest(store)
    except ObjectMissing:
        raise UserError(f"{url} holds no manifest: nothing states what it should be") from None
    checks: dict[str, Callable[[], Iterator[str]]] = {
        "content digest": lambda: _check_content_digest(manifest),
        "shards": lambda: _check_shards(store, manifest),
        "files": lambda: _check_files(store, manifest),
    }
    if manifest.source is None:
        checks["index"] = lambda: _check_index(store, manifest)
    else:
        checks["shards"] = lambda: _check_source(url, manifest)
    if manifest.state_digest is not None:
        checks["state digest"] = lambda: _check_state(store, manifest)
    merge = manifest.merge
    if merge is not None:
        checks["weights"] = lambda: _check_weights(merge)
        checks["lineage"] = lambda: _check_lineage(merge)
        checks["census"] = lambda: _check_census(manifest, merge)
        checks["recomputed sample"] = lambda: check_sample(store, manifest, merge)
    skipped = {} if merge is None else _without_tensors(merge)
    if load:
        from tasks.merging.load_check import check_load

        checks["loads in transformers"] = lambda: check_load(url, beside_mean=not skipped)
    found = {name: _run(check) for name, check in checks.items() if name not in skipped}
    return Verification(digest=manifest.digest, checks=found, skipped=skipped)


def _run(check: Callable[[], Iterator[str]]) -> list[str]:
    problems: list[str] = []
    try:
        for problem in check():
            problems.append(problem)
            if len(problems) == MAX_PROBLEMS:
                return [*problems, "and perhaps more"]
    except (CheckpointError, StorageError, UserError) as error:
        problems.append(str(error))
    return problems


def _check_content_digest(manifest: Manifest) -> Iterator[str]:
    found = model_digest(manifest.shards)
    if found != manifest.digest:
        yield f"the manifest's tensors have content digest {found[:16]}, its digest field says {manifest.digest[:16]}"


def _check_shards(store: Store, manifest: Manifest) -> Iterator[str]:
    for shard in manifest.shards:
        yield from _check_shard(store, shard)


def _check_shard(store: Store, shard: Shard) -> Iterator[str]:
    where = f"{store.url}/{shard.key}"
    size = store.size(shard.key)
    if size != shard.bytes:
        yield f"{where}: {size} bytes, the manifest says {shard.bytes}"
        return
    whole, position = new_hasher(), 0
    for entry in sorted(shard.tensors, key=lambda item: item.offset):
        for data in _read(store, shard.key, position, entry.offset):
            whole.update(data)
        hasher = new_hasher()
        for data in _read(store, shard.key, entry.offset, entry.offset + entry.bytes):
            whole.update(data)
            hasher.update(data)
        position = entry.offset + entry.bytes
        if hasher.hexdigest() != entry.digest:
            yield f"{where}: tensor {entry.name!r} (bytes {entry.offset} to {position}) differs from its digest"
    if whole.hexdigest() != shard.digest:
        yield f"{where}: the object differs from its digest"
    stated = {_shape_of(entry) for entry in shard.tensors}
    for entry in read_header(store, shard.key):
        if _shape_of(entry) not in stated:
            yield f"{where}: the header says {entry.name!r} is {entry.dtype} {list(entry.shape)}; the manifest does not"


def _check_source(url: str, manifest: Manifest) -> Iterator[str]:
    """An adopted checkpoint: every tensor against its digest, wherever its regions lie."""
    checkpoint = open_untied(url)
    stated = {entry.name: entry.digest for entry in manifest.model_tensors()}
    for name, digest in tensor_digests(checkpoint):
        if digest != stated[name]:
            yield f"{checkpoint.store.url}: tensor {name!r} differs from its digest: it was changed since it was adopted"


def _check_files(store: Store, manifest: Manifest) -> Iterator[str]:
    for file in manifest.files:
        if digest_bytes(store.read(file.key)) != file.digest:
            yield f"{store.url}/{file.key}: differs from its digest"


def _check_index(store: Store, manifest: Manifest) -> Iterator[str]:
    weight_map = json.loads(store.read(INDEX_KEY))["weight_map"]
    expected = {t.name: shard.key for shard in manifest.shards if shard.part == "model" for t in shard.tensors}
    for name in sorted(expected.keys() | weight_map.keys()):
        if weight_map.get(name) != expected.get(name):
            yield f"{INDEX_KEY}: {name!r} is in {weight_map.get(name)!r}, the manifest says {expected.get(name)!r}"


def _check_state(store: Store, manifest: Manifest) -> Iterator[str]:
    found = state_digest(manifest.shards, json.loads(store.read(STATE_KEY)))
    if found != manifest.state_digest:
        yield f"the training state has digest {found[:16]}, the manifest says {str(manifest.state_digest)[:16]}"


def _check_weights(merge: Merge) -> Iterator[str]:
    if len(merge.weights) != len(merge.inputs):
        yield f"{len(merge.weights)} weights for {len(merge.inputs)} inputs"
        return
    if merge.method == "weights" or merge.method in EVALUATED_METHODS:
        return  # explicit weights follow no rule; the recomputed sample holds them
    choice = MethodChoice(
        method=merge.method,
        alpha=merge.alpha,
        decay=tuple(merge.options["decay"]) if "decay" in merge.options else None,
        width=merge.options.get("width"),
    )
    expected = choice.build([item.tokens_seen for item in merge.inputs])
    for number, (found, right) in enumerate(zip(merge.weights, expected, strict=True), start=1):
        if found != right:
            yield f"weight {number} is {found!r}; method {merge.method} gives {right!r}"


def _check_lineage(merge: Merge) -> Iterator[str]:
    for item in merge.inputs:
        checkpoint = _open_input(item.url)
        if item.manifest_digest is not None:
            if checkpoint.manifest_digest != item.manifest_digest:
                yield f"{item.url}: its manifest is not the one that was merged"
        elif (found := _plain_digest(checkpoint)) != item.digest:
            yield f"{item.url}: content digest {found[:16]}, {item.digest[:16]} was merged: it was replaced since"
    if (identity := _identity_now(merge)) != merge.identity:
        yield f"inputs, weights and dtypes have identity {identity[:16]}, the manifest says {merge.identity[:16]}"


def _identity_now(merge: Merge) -> str:
    inputs = [_open_input(item.url) for item in merge.inputs]
    return merge_identity(merge.weights, merge.dtypes, merge.policies, inputs)


def _check_census(manifest: Manifest, merge: Merge) -> Iterator[str]:
    written = {entry.name: entry.shape for entry in manifest.model_tensors()}
    for item in merge.inputs:
        places = _open_input(item.url).model
        expected = {name: place.shape for name, place in places.items()}
        for name in sorted(expected.keys() | written.keys()):
            if expected.get(name) != written.get(name):
                yield f"tensor {name!r} is {expected.get(name)} in {item.url}, {written.get(name)} in the merge"


def _open_input(url: str) -> Checkpoint:
    """An input as it is now or, if retention took it away, as the manifest that it kept says it was."""
    gone = open_collected(url)
    return open_untied(url) if gone is None else gone[0]


def _without_tensors(merge: Merge) -> dict[str, str]:
    """Checks of ``merge`` that need tensors which retention took away; lineage and census need manifests alone."""
    gone = [doom for item in merge.inputs if (found := open_collected(item.url)) is not None for doom in found[1:]]
    if not gone:
        return {}
    names = ", ".join(doom.name for doom in gone[:3])
    return {
        "recomputed sample": f"{len(gone)} of {len(merge.inputs)} inputs were collected by retention ({names}"
        f"{', ...' if len(gone) > 3 else ''}); what is left of them, their manifests, was compared"
    }


def _plain_digest(checkpoint: Checkpoint) -> str:
    return content_digest(
        TensorEntry(
            name=name,
            dtype=checkpoint.model[name].dtype,
            shape=checkpoint.model[name].shape,
            offset=0,
            bytes=checkpoint.model[name].num_bytes,
            digest=digest,
        )
        for name, digest in tensor_digests(checkpoint)
    )


def _read(store: Store, key: str, start: int, end: int) -> Iterator[bytes]:
    for position in range(start, end, READ_BYTES):
        yield store.read_range(key, position, min(position + READ_BYTES, end))


def _shape_of(entry: TensorEntry) -> tuple[str, str, tuple[int, ...], int]:
    return entry.name, entry.dtype, entry.shape, entry.offset
