"""Prove a checkpoint again from what is stored: digests, census, lineage, and a merge recomputed in float64.

The recomputation shares no arithmetic with the merge kernel: it decodes bytes to float64 by NumPy alone and
sums in float64, on a random sample of chunks whose seed is the checkpoint's own digest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ObjectMissing, StorageError
from cluster.storage import Store, open_store
from configs.errors import UserError
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
from tasks.checkpoints.reader import Checkpoint, TensorPlace, open_checkpoint
from tasks.checkpoints.safetensors_header import DTYPE_BYTES, CheckpointError, TensorEntry, read_header
from tasks.merging.methods import build_weights
from tasks.merging.plan import merge_identity

SAMPLES = 128
SAMPLE_ELEMENTS = 4096
READ_BYTES = 8 << 20
MAX_PROBLEMS = 5
# Half a unit in the last place, relative, of the output dtype; and its smallest step, near zero.
OUTPUT_EPSILON = {"F64": 2.0**-53, "F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}
SMALLEST = {"F64": 0.0, "F32": 2.0**-149, "BF16": 2.0**-133, "F16": 2.0**-24}


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked and what was found."""

    digest: str
    """Content digest that the manifest states."""
    checks: dict[str, list[str]]
    """Check to its problems; none means it holds."""

    @property
    def problems(self) -> list[str]:
        """All problems."""
        return [problem for problems in self.checks.values() for problem in problems]


def verify_checkpoint(url: str) -> Verification:
    """Check everything that the manifest at ``url`` states. Reads the checkpoint once, and samples of a merge's inputs.

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
        "index": lambda: _check_index(store, manifest),
    }
    if manifest.state_digest is not None:
        checks["state digest"] = lambda: _check_state(store, manifest)
    merge = manifest.merge
    if merge is not None:
        checks["weights"] = lambda: _check_weights(merge)
        checks["lineage"] = lambda: _check_lineage(merge)
        checks["census"] = lambda: _check_census(manifest, merge)
        checks["recomputed sample"] = lambda: _check_sample(store, manifest, merge)
    return Verification(digest=manifest.digest, checks={name: _run(check) for name, check in checks.items()})


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
    if merge.method == "weights":
        return  # explicit weights follow no rule; the recomputed sample holds them
    expected = build_weights(merge.method, len(merge.inputs), merge.alpha)
    for number, (found, right) in enumerate(zip(merge.weights, expected, strict=True), start=1):
        if found != right:
            yield f"weight {number} is {found!r}; method {merge.method} gives {right!r}"


def _check_lineage(merge: Merge) -> Iterator[str]:
    for item in merge.inputs:
        checkpoint = open_checkpoint(item.url)
        if item.manifest_digest is not None:
            if checkpoint.manifest_digest != item.manifest_digest:
                yield f"{item.url}: its manifest is not the one that was merged"
        elif (found := _plain_digest(checkpoint)) != item.digest:
            yield f"{item.url}: content digest {found[:16]}, {item.digest[:16]} was merged: it was replaced since"
    if (identity := merge_identity(merge, [open_checkpoint(item.url) for item in merge.inputs])) != merge.identity:
        yield f"inputs, weights and dtypes have identity {identity[:16]}, the manifest says {merge.identity[:16]}"


def _check_census(manifest: Manifest, merge: Merge) -> Iterator[str]:
    written = {entry.name: entry.shape for entry in manifest.model_tensors()}
    for item in merge.inputs:
        places = open_checkpoint(item.url).model
        expected = {name: place.entry.shape for name, place in places.items()}
        for name in sorted(expected.keys() | written.keys()):
            if expected.get(name) != written.get(name):
                yield f"tensor {name!r} is {expected.get(name)} in {item.url}, {written.get(name)} in the merge"


def _check_sample(store: Store, manifest: Manifest, merge: Merge) -> Iterator[str]:
    inputs = [open_checkpoint(item.url) for item in merge.inputs]
    places = {
        entry.name: (shard.key, entry) for shard in manifest.shards for entry in shard.tensors if shard.part == "model"
    }
    # What an input lacks or holds in another shape is the census's to name.
    floats = [
        name for name in sorted(places) if all(_is_comparable(places[name][1], c.model.get(name)) for c in inputs)
    ]
    random = np.random.default_rng(int(manifest.digest[:15], 16))
    for name in random.choice(floats, SAMPLES) if floats else []:
        key, entry = places[name]
        elements = entry.bytes // DTYPE_BYTES[entry.dtype]
        start = int(random.integers(0, max(1, elements - SAMPLE_ELEMENTS + 1)))
        end = min(start + SAMPLE_ELEMENTS, elements)
        stored = _read_float64(store, key, entry, start, end)
        terms = [
            weight * _read_float64(c.store, c.model[name].key, c.model[name].entry, start, end)
            for weight, c in zip(merge.weights, inputs, strict=True)
        ]
        yield from _compare(name, start, stored, terms, entry.dtype)


def _is_comparable(entry: TensorEntry, place: TensorPlace | None) -> bool:
    if place is None or place.entry.shape != entry.shape:
        return False
    return entry.dtype in OUTPUT_EPSILON and place.entry.dtype in OUTPUT_EPSILON


def _compare(
    name: str, start: int, stored: NDArray[np.float64], terms: list[NDArray[np.float64]], dtype: str
) -> Iterator[str]:
    exact = np.sum(terms, axis=0)
    accumulate = 2.0**-53 if dtype == "F64" else 2.0**-24
    bound = (len(terms) + 2) * accumulate * np.sum(np.abs(terms), axis=0)
    bound += OUTPUT_EPSILON[dtype] * np.abs(exact) * (1 + 2.0**-8) + SMALLEST[dtype]
    wrong = np.abs(stored - exact) > bound
    if not np.isfinite(stored).all() or wrong.any():
        at = int(np.argmax(wrong | ~np.isfinite(stored)))
        yield f"tensor {name!r}, element {start + at}: stored {stored[at]!r}, the inputs give {exact[at]!r}"


def _read_float64(store: Store, key: str, entry: TensorEntry, start: int, end: int) -> NDArray[np.float64]:
    width = DTYPE_BYTES[entry.dtype]
    data = store.read_range(key, entry.offset + start * width, entry.offset + end * width)
    if entry.dtype == "BF16":
        words = np.zeros((end - start, 2), dtype="<u2")
        words[:, 1] = np.frombuffer(data, dtype="<u2")
        return words.view("<f4")[:, 0].astype(np.float64)
    return np.frombuffer(data, dtype={"F64": "<f8", "F32": "<f4", "F16": "<f2"}[entry.dtype]).astype(np.float64)


def _plain_digest(checkpoint: Checkpoint) -> str:
    entries = []
    for place in checkpoint.model.values():
        hasher = new_hasher()
        for data in _read(checkpoint.store, place.key, place.entry.offset, place.entry.offset + place.entry.bytes):
            hasher.update(data)
        entries.append(TensorEntry(**{**place.entry.__dict__, "digest": str(hasher.hexdigest())}))
    return content_digest(entries)


def _read(store: Store, key: str, start: int, end: int) -> Iterator[bytes]:
    for position in range(start, end, READ_BYTES):
        yield store.read_range(key, position, min(position + READ_BYTES, end))


def _shape_of(entry: TensorEntry) -> tuple[str, str, tuple[int, ...], int]:
    return entry.name, entry.dtype, entry.shape, entry.offset
