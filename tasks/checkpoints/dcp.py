"""Read torch.distributed.checkpoint (DCP) folders: which tensors they hold, and in which regions of which objects.

torchtitan, OLMo-core and Megatron-Core (``torch_dist``) write them. The index, ``.metadata``, is a pickle; it
is read as inert data against an exact list of classes and never executed. Neither torch nor pickle is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster.errors import ObjectMissing
from cluster.storage import Store
from tasks.checkpoints.dcp_fields import (
    MAX_SIZE,
    is_kind,
    is_size,
    parse_fields,
    parse_mapping,
    parse_name,
    parse_sizes,
)
from tasks.checkpoints.dcp_names import is_state, split_names
from tasks.checkpoints.inert_pickle import collector_paused, read_pickle
from tasks.checkpoints.inert_values import Name, Record
from tasks.checkpoints.regions import Region, TensorPlace, ordered, require_tiling
from tasks.checkpoints.safetensors_header import CheckpointError, tensor_bytes
from tasks.checkpoints.torch_archive import DTYPES

METADATA_KEY = ".metadata"
MAX_METADATA_BYTES = 2 << 30
SMALL_METADATA_BYTES = 8 << 20
"""Read whatever the objects hold: 60,000 chunks."""
CHUNK_BYTES = 16
"""At least, of the metadata for one chunk; in practice 140."""
SIZE_REQUESTS = 16
"""At once: a large run has thousands of objects."""
_DCP = "torch.distributed.checkpoint"
ALLOWED = frozenset(
    {
        *(
            f"{_DCP}.metadata.{name}"
            for name in (
                "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
            )
        ),
        f"{_DCP}.filesystem._StorageInfo",
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        "torch.Size",
        "torch.serialization._get_layout",
        "collections.OrderedDict",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        "pathlib.PurePosixPath",
        *(f"torch.{name}" for name in DTYPES),
    }
)  # fmt: skip
_EXTRA_STATE = re.compile(r"(^|\.)_extra_state(/|$)")
"""What Transformer Engine keeps of FP8 scales."""


@dataclass(frozen=True, kw_only=True)
class DcpContents:
    """What a DCP folder holds."""

    model: dict[str, TensorPlace]
    """Weights by name."""
    state: dict[str, TensorPlace]
    """Training state: moments as ``exp_avg.<name>`` and ``exp_avg_sq.<name>``, other tensors under their own names."""
    ignored: tuple[str, ...]
    """Entries that are no tensors, or whose shape is not that of the tensor they belong to."""


@collector_paused()
def open_dcp(store: Store) -> DcpContents:
    """Contents of the DCP folder at ``store``, from ``.metadata`` and the sizes of its objects.

    Raises :class:`CheckpointError` for anything that is not plain, complete and consistent: classes outside the allow-list
    (nothing is executed), regions that overlap or leave gaps, objects that are missing or too short, paths that leave the folder.
    """
    where = f"{store.url}/{METADATA_KEY}"
    _require_plausible_size(store, where)
    data = store.read(METADATA_KEY)
    metadata = parse_fields(read_pickle(data, ALLOWED, where), "Metadata", where)
    entries = parse_mapping(metadata.get("state_dict_metadata"), where)
    _require_plausible_chunks(entries, len(data), where)
    stored = _stored_chunks(metadata.get("storage_data"), where)
    _require_objects(store, stored)
    places, ignored = {}, []
    for key, entry in entries.items():
        name = parse_name(key, where)
        if is_kind(entry, "TensorStorageMetadata") and not _EXTRA_STATE.search(name):
            places[name] = _place(name, parse_fields(entry, "TensorStorageMetadata", where), stored, where)
        elif is_kind(entry, "TensorStorageMetadata") or is_kind(entry, "BytesStorageMetadata"):
            ignored.append(name)
        else:
            raise CheckpointError(f"{where}: entry {name!r} is neither a tensor nor bytes")
    ignored += _without_reshaped(places, metadata.get("mcore_data"), where)
    paths = metadata.get("planner_data")
    model, state = split_names(places, {} if paths is None else parse_mapping(paths, where), where)
    if not model:
        raise CheckpointError(f"{where}: no weights among {len(places)} tensors ({', '.join(list(places)[:5])} ...)")
    return DcpContents(model=model, state=state, ignored=tuple(ignored))


def _stored_chunks(storage_data: Any, where: str) -> dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]:
    """(Entry, coordinates) to (object, offset, length)."""
    if not isinstance(storage_data, dict):
        raise CheckpointError(f"{where}: no storage_data")
    chunks: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]] = {}
    # A million chunks name few tensors and fewer objects: each is looked at once.
    names: set[Any] = set()
    paths: set[Any] = set()
    for index, info in storage_data.items():
        key, value = parse_fields(index, "MetadataIndex", where), parse_fields(info, "_StorageInfo", where)
        name: Any = key.get("fqn")
        path: Any = value.get("relative_path")
        offset, length = value.get("offset"), value.get("length")
        if type(name) is not str or name not in names:
            names.add(parse_name(name, where))
        if type(path) is not str or path not in paths:
            paths.add(_inside(path, name, where))
        if not is_size(offset) or not is_size(length) or not length:
            raise CheckpointError(f"{where}: {name!r} is stored in {path!r} at a byte or length that is none")
        if value.get("transform_descriptors"):
            raise CheckpointError(
                f"{where}: {name!r} was compressed or transformed as it was saved, and cannot be read by range: save without extensions"
            )
        coordinates = None if key.get("offset") is None else parse_sizes(key["offset"], where)
        chunks.setdefault((name, coordinates), (path, offset, length))
    return chunks


def _inside(path: Any, name: str, where: str) -> str:
    parse_name(path, f"{where}: object of {name!r}")
    if path.startswith("/") or ".." in path.split("/"):
        raise CheckpointError(f"{where}: {name!r} is said to lie in {path!r}, which leaves the folder")
    return str(path)


def _require_plausible_size(store: Store, where: str) -> None:
    """Reading costs memory of ten times the metadata. Every chunk takes more bytes in its object than in the metadata."""
    size = store.size(METADATA_KEY)
    if size > MAX_METADATA_BYTES:
        raise CheckpointError(f"{where}: {size} bytes of metadata; at most {MAX_METADATA_BYTES} are read")
    if size <= SMALL_METADATA_BYTES:
        return
    held = 0
    for key in store.keys(""):
        held += store.size(key) if key != METADATA_KEY else 0
        if held >= size:
            return
    raise CheckpointError(
        f"{where}: {size} bytes of metadata for {held} bytes of tensors: damaged, or not a checkpoint"
    )


def _require_plausible_chunks(entries: Mapping[Any, Any], length: int, where: str) -> None:
    """A hostile file may name one long list of chunks for every tensor."""
    states = [entry.state for entry in entries.values() if isinstance(entry, Record) and isinstance(entry.state, dict)]
    num_chunks = sum(len(chunks) for state in states if isinstance(chunks := state.get("chunks"), list))
    if num_chunks * CHUNK_BYTES > length:
        raise CheckpointError(f"{where}: {num_chunks} chunks in {length} bytes of metadata: tensors share their chunks")


def _require_objects(store: Store, stored: Mapping[Any, tuple[str, int, int]]) -> None:
    ends: dict[str, int] = {}
    for path, offset, length in stored.values():
        ends[path] = max(ends.get(path, 0), offset + length)
    with ThreadPoolExecutor(SIZE_REQUESTS) as requests:
        for (path, end), size in zip(ends.items(), requests.map(lambda key: _size(store, key), ends), strict=True):
            if size is None or size < end:
                found = "does not exist" if size is None else f"has {size} bytes"
                raise CheckpointError(
                    f"{store.url}/{path} {found}, the metadata speaks of {end}: truncated or not complete"
                )


def _size(store: Store, key: str) -> int | None:
    try:
        return store.size(key)
    except ObjectMissing:
        return None


def _place(key: str, entry: Mapping[str, Any], stored: Mapping[Any, tuple[str, int, int]], where: str) -> TensorPlace:
    where = f"{where}: tensor {key!r}"
    dtype = _dtype(entry.get("properties"), where)
    shape = parse_sizes(entry.get("size"), where)
    if tensor_bytes(dtype, shape) >= MAX_SIZE:
        raise CheckpointError(f"{where}: {dtype} {list(shape)} is larger than any storage")
    chunks = entry.get("chunks")
    if not isinstance(chunks, list):
        raise CheckpointError(f"{where}: no chunks")
    regions: dict[tuple[int, ...], Region] = {}
    for chunk in chunks:
        fields = parse_fields(chunk, "ChunkStorageMetadata", where)
        start, extent = parse_sizes(fields.get("offsets"), where), parse_sizes(fields.get("sizes"), where)
        if 0 in extent and 0 not in shape:
            continue  # a rank without a share
        if (found := stored.get((key, start))) is None:
            raise CheckpointError(f"{where}: the chunk at {list(start)} is stored nowhere")
        path, offset, length = found
        if length < tensor_bytes(dtype, extent):
            raise CheckpointError(
                f"{where}: the chunk at {list(start)} of {list(extent)} does not fit in {length} bytes"
            )
        region = Region(key=path, offset=offset, start=start, shape=extent, archive_bytes=length)
        if regions.setdefault(start, region) != region:
            raise CheckpointError(f"{where}: two chunks at {list(start)}")
    # An empty tensor keeps its empty regions.
    place = TensorPlace(dtype=dtype, shape=shape, regions=ordered(regions.values()) or tuple(regions.values()))
    require_tiling(place, where)
    return place


def _dtype(properties: Any, where: str) -> str:
    state = properties.state if isinstance(properties, Record) else None
    first = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    if not isinstance(first, Name) or first.module != "torch" or first.name not in DTYPES:
        raise CheckpointError(f"{where}: its dtype is not known; known: {', '.join(DTYPES)}")
    return DTYPES[first.name]


def _without_reshaped(places: dict[str, TensorPlace], mcore_data: Any, where: str) -> list[str]:
    """Remove the optimizer tensors that Megatron-Core stores flattened: grid of chunks x elements of a chunk.

    Their elements lie in another order than those of the weights they belong to. Weights are never stored so.
    """
    reshaped = []
    for key, value in mcore_data.items() if isinstance(mcore_data, dict) else ():
        if key in places and isinstance(value, dict) and value.get("nd_reformulated_orig_global_shape"):
            if not is_state(key):
                raise CheckpointError(f"{where}: tensor {key!r} is stored flattened by rank: it cannot be placed")
            reshaped.append(key)
            del places[key]
    return reshaped
