"""Read torch.distributed.checkpoint (DCP) folders: which tensors they hold, and in which regions of which objects.

torchtitan, OLMo-core and Megatron-Core (``torch_dist``) write them. The index, ``.metadata``, is a pickle; it
is read as inert data against an exact list of classes and never executed. Neither torch nor pickle is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeGuard

from cluster.errors import ObjectMissing
from cluster.storage import Store
from tasks.checkpoints.dcp_names import is_state, split_names
from tasks.checkpoints.inert_pickle import read_pickle
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
MAX_NAME = 4096
MAX_DIMENSIONS = 64
MAX_SIZE = 1 << 63
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


def open_dcp(store: Store) -> DcpContents:
    """Contents of the DCP folder at ``store``, from ``.metadata`` and the sizes of its objects.

    Raises :class:`CheckpointError` for anything that is not plain, complete and consistent: classes outside the allow-list
    (nothing is executed), regions that overlap or leave gaps, objects that are missing or too short, paths that leave the folder.
    """
    where = f"{store.url}/{METADATA_KEY}"
    _require_plausible_size(store, where)
    data = store.read(METADATA_KEY)
    metadata = _fields(read_pickle(data, ALLOWED, where), "Metadata", where)
    entries = _mapping(metadata.get("state_dict_metadata"), where)
    _require_plausible_chunks(entries, len(data), where)
    stored = _stored_chunks(metadata.get("storage_data"), where)
    _require_objects(store, stored)
    places, ignored = {}, []
    for key, entry in entries.items():
        name = _name(key, where)
        if _is_kind(entry, "TensorStorageMetadata") and not _EXTRA_STATE.search(name):
            places[name] = _place(name, _fields(entry, "TensorStorageMetadata", where), stored, where)
        elif _is_kind(entry, "TensorStorageMetadata") or _is_kind(entry, "BytesStorageMetadata"):
            ignored.append(name)
        else:
            raise CheckpointError(f"{where}: entry {name!r} is neither a tensor nor bytes")
    ignored += _without_reshaped(places, metadata.get("mcore_data"), where)
    paths = metadata.get("planner_data")
    model, state = split_names(places, {} if paths is None else _mapping(paths, where), where)
    if not model:
        raise CheckpointError(f"{where}: no weights among {len(places)} tensors ({', '.join(list(places)[:5])} ...)")
    return DcpContents(model=model, state=state, ignored=tuple(ignored))


def _stored_chunks(storage_data: Any, where: str) -> dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]:
    """(Entry, coordinates) to (object, offset, length)."""
    if not isinstance(storage_data, dict):
        raise CheckpointError(f"{where}: no storage_data")
    chunks: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]] = {}
    for index, info in storage_data.items():
        key, value = _fields(index, "MetadataIndex", where), _fields(info, "_StorageInfo", where)
        name = _name(key.get("fqn"), where)
        path = _name(value.get("relative_path"), f"{where}: object of {name!r}")
        offset, length = value.get("offset"), value.get("length")
        if not _is_size(offset) or not _is_size(length) or not length:
            raise CheckpointError(f"{where}: {name!r} is stored in {path!r} at a byte or length that is none")
        if path.startswith("/") or ".." in path.split("/"):
            raise CheckpointError(f"{where}: {name!r} is said to lie in {path!r}, which leaves the folder")
        if value.get("transform_descriptors"):
            raise CheckpointError(
                f"{where}: {name!r} was compressed or transformed as it was saved, and cannot be read by range: save without extensions"
            )
        coordinates = None if key.get("offset") is None else _sizes(key["offset"], f"{where}: {name!r}")
        chunks.setdefault((name, coordinates), (path, offset, length))
    return chunks


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
    shape = _sizes(entry.get("size"), where)
    if tensor_bytes(dtype, shape) >= MAX_SIZE:
        raise CheckpointError(f"{where}: {dtype} {list(shape)} is larger than any storage")
    chunks = entry.get("chunks")
    if not isinstance(chunks, list):
        raise CheckpointError(f"{where}: no chunks")
    regions: dict[tuple[int, ...], Region] = {}
    for chunk in chunks:
        fields = _fields(chunk, "ChunkStorageMetadata", where)
        start, extent = _sizes(fields.get("offsets"), where), _sizes(fields.get("sizes"), where)
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


def _is_kind(value: Any, kind: str) -> bool:
    return isinstance(value, Record) and value.name.name == kind


def _fields(record: Any, kind: str, where: str) -> dict[Any, Any]:
    if not _is_kind(record, kind) or not isinstance(record.state, dict):
        raise CheckpointError(f"{where}: expected {kind}, got {type(record).__name__}")
    return record.state


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if _is_kind(value, "OrderedDict"):
        pairs = value.items or []
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise CheckpointError(f"{where}: an OrderedDict of other items than named ones")
        return dict(pairs)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {type(value).__name__} instead of a dict by name")
    return value


def _name(value: Any, where: str) -> str:
    """``value`` if it can be a name: messages, headers and URLs will carry it."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise CheckpointError(f"{where}: a name of {type(value).__name__} that is empty, too long or cannot be printed")
    return value


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    """The integers of a torch.Size."""
    numbers = value.args[0] if isinstance(value, Record) and value.name.name == "Size" and value.args else value
    if not isinstance(numbers, (tuple, list)) or len(numbers) > MAX_DIMENSIONS or not all(map(_is_size, numbers)):
        raise CheckpointError(f"{where}: {type(value).__name__} is not a shape")
    return tuple(numbers)


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < MAX_SIZE
