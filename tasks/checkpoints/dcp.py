"""Read torch.distributed.checkpoint (DCP) folders: which tensors they hold, and in which regions of which objects.

torchtitan, OLMo-core and Megatron-Core (``torch_dist``) write them. The index, ``.metadata``, is a pickle; it
is read as inert data against an exact list of classes and never executed. Neither torch nor pickle is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.storage import Store
from tasks.checkpoints.inert_pickle import Name, Record, read_pickle
from tasks.checkpoints.regions import Region, TensorPlace, ordered, require_tiling
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.torch_archive import DTYPES

METADATA_KEY = ".metadata"
MAX_METADATA_BYTES = 2 << 30
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
_STATE_PARTS = re.compile(
    r"^(optim|optimizer|optimizers|lr_scheduler|scheduler|opt_param_scheduler|dataloader|data_loader|train_state|trainer|"
    r"rng|rng_state|ema|iteration|rerun_state_machine|chained_\d+)(\.|$)"
)
_MOMENT_LAST = re.compile(r"(?:^|\.)(?:optim|optimizer)\.state\.(?P<name>.+)\.(?P<moment>exp_avg|exp_avg_sq|step)$")
_MOMENT_FIRST = re.compile(
    r"(?:^|\.)(?:optim|optimizer)\.state\.(?P<moment>exp_avg|exp_avg_sq|fp32_param|step)\.(?P<name>.+)$"
)


@dataclass(frozen=True, kw_only=True)
class DcpContents:
    """What a DCP folder holds."""

    model: dict[str, TensorPlace]
    """Weights by name."""
    state: dict[str, TensorPlace]
    """Training state: moments as ``exp_avg.<name>`` and ``exp_avg_sq.<name>``, other tensors under their own names."""
    ignored: tuple[str, ...]
    """Entries that are no tensors."""


def open_dcp(store: Store) -> DcpContents:
    """Contents of the DCP folder at ``store``, from ``.metadata`` and the sizes of its objects.

    Raises :class:`CheckpointError` for anything that is not plain, complete and consistent: classes outside the allow-list
    (nothing is executed), regions that overlap or leave gaps, objects that are missing or too short, paths that leave the folder.
    """
    where = f"{store.url}/{METADATA_KEY}"
    if (size := store.size(METADATA_KEY)) > MAX_METADATA_BYTES:
        raise CheckpointError(f"{where}: {size} bytes of metadata; at most {MAX_METADATA_BYTES} are read")
    metadata = _fields(read_pickle(store.read(METADATA_KEY), ALLOWED, where), "Metadata", where)
    entries = _mapping(metadata.get("state_dict_metadata"), where)
    stored = _stored_chunks(metadata.get("storage_data"), where)
    _require_objects(store, stored)
    places, ignored = {}, []
    for key, entry in entries.items():
        if not isinstance(entry, Record) or entry.name.name != "TensorStorageMetadata":
            ignored.append(str(key))
            continue
        places[str(key)] = _place(str(key), _fields(entry, "TensorStorageMetadata", where), stored, where)
    _refuse_reshaped(metadata.get("mcore_data"), where)
    paths = metadata.get("planner_data")
    model, state = split_names(places, paths if isinstance(paths, dict) else {})
    if not model:
        raise CheckpointError(f"{where}: no weights among {len(places)} tensors ({', '.join(list(places)[:5])} ...)")
    return DcpContents(model=model, state=state, ignored=tuple(ignored))


def split_names(
    places: Mapping[str, TensorPlace], paths: Mapping[str, Any]
) -> tuple[dict[str, TensorPlace], dict[str, TensorPlace]]:
    """Weights and training state, each under the name that other formats give it.

    ``paths`` are the keys by which each entry was reached before the nested state dict was flattened: below a key ``model`` lie
    the weights. A flat state dict has no such key, and Hugging Face names themselves begin with ``model.``.
    """
    nested = {key: _below_model(paths.get(key)) for key in places}
    if not any(nested.values()):
        model_keys = [key for key in places if not _STATE_PARTS.match(key)]
        # Megatron-Core keeps no paths: only a doubled prefix then tells a nested dict from Hugging Face names.
        doubled = any(key.startswith(("model.model.", "model.lm_head.")) for key in model_keys)
        strip = doubled and all(key.startswith("model.") for key in model_keys)
        nested = {key: key.removeprefix("model.") if strip else key for key in model_keys}
    model = {name: places[key] for key, name in nested.items() if name is not None}
    state = {_state_name(key): place for key, place in places.items() if nested.get(key) is None}
    return model, state


def _below_model(path: Any) -> str | None:
    if not isinstance(path, tuple) or "model" not in path[:-1]:
        return None
    return ".".join(str(part) for part in path[path.index("model") + 1 :])


def _state_name(key: str) -> str:
    match = _MOMENT_FIRST.search(key) or _MOMENT_LAST.search(key)
    if match is None:
        return key
    moment = "master" if match["moment"] == "fp32_param" else match["moment"]
    return f"{moment}.{match['name']}"


def _stored_chunks(storage_data: Any, where: str) -> dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]:
    """(Entry, coordinates) to (object, offset, length)."""
    if not isinstance(storage_data, dict):
        raise CheckpointError(f"{where}: no storage_data")
    chunks = {}
    for index, info in storage_data.items():
        key, value = _fields(index, "MetadataIndex", where), _fields(info, "_StorageInfo", where)
        name, path = key.get("fqn"), value.get("relative_path")
        offset, length = value.get("offset"), value.get("length")
        if not isinstance(name, str) or not isinstance(path, str) or not _is_size(offset) or not _is_size(length):
            raise CheckpointError(f"{where}: storage of {name!r} is {path!r}, {offset!r}, {length!r}")
        if path.startswith("/") or ".." in path.split("/") or not path or "\0" in path:
            raise CheckpointError(f"{where}: {name!r} is said to lie in {path!r}, which leaves the folder")
        if value.get("transform_descriptors"):
            raise CheckpointError(
                f"{where}: {name!r} was stored through {value['transform_descriptors']!r}, which cannot be read by range"
            )
        coordinates = None if key.get("offset") is None else _sizes(key["offset"], f"{where}: {name!r}")
        assert offset is not None and length is not None
        chunks[name, coordinates] = (path, offset, length)
    return chunks


def _require_objects(store: Store, stored: Mapping[Any, tuple[str, int, int]]) -> None:
    ends: dict[str, int] = {}
    for path, offset, length in stored.values():
        ends[path] = max(ends.get(path, 0), offset + length)
    for path, end in sorted(ends.items()):
        if (size := store.size(path)) < end:
            raise CheckpointError(
                f"{store.url}/{path}: {size} bytes, the metadata speaks of {end}: truncated or not complete"
            )


def _place(key: str, entry: Mapping[str, Any], stored: Mapping[Any, tuple[str, int, int]], where: str) -> TensorPlace:
    where = f"{where}: tensor {key!r}"
    properties = entry.get("properties")
    dtype = _dtype(properties, where)
    shape = _sizes(entry.get("size"), where)
    chunks = entry.get("chunks")
    if not isinstance(chunks, list):
        raise CheckpointError(f"{where}: no chunks")
    regions: dict[tuple[int, ...], Region] = {}
    for chunk in chunks:
        fields = _fields(chunk, "ChunkStorageMetadata", where)
        start, extent = _sizes(fields.get("offsets"), where), _sizes(fields.get("sizes"), where)
        if (found := stored.get((key, start))) is None:
            raise CheckpointError(f"{where}: the chunk at {list(start)} is stored nowhere")
        path, offset, length = found
        regions[start] = Region(key=path, offset=offset, start=start, shape=extent, archive_bytes=length)
    # An empty tensor keeps its one empty region.
    place = TensorPlace(dtype=dtype, shape=shape, regions=ordered(regions.values()) or tuple(regions.values()))
    require_tiling(place, where)
    return place


def _dtype(properties: Any, where: str) -> str:
    state = properties.state if isinstance(properties, Record) else None
    first = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    if not isinstance(first, Name) or first.name not in DTYPES:
        raise CheckpointError(f"{where}: dtype {first!r} is not known")
    return DTYPES[first.name]


def _refuse_reshaped(mcore_data: Any, where: str) -> None:
    """Megatron-Core stores some flattened optimizer tensors in another shape than their global one; weights never."""
    if not isinstance(mcore_data, dict):
        return
    for key, value in mcore_data.items():
        reshaped = isinstance(value, dict) and value.get("nd_reformulated_orig_global_shape")
        if reshaped and not _STATE_PARTS.match(str(key)):
            raise CheckpointError(f"{where}: tensor {key!r} is stored flattened from {reshaped!r}: it cannot be placed")


def _fields(record: Any, kind: str, where: str) -> dict[str, Any]:
    if not isinstance(record, Record) or record.name.name != kind or not isinstance(record.state, dict):
        raise CheckpointError(f"{where}: expected {kind}, got {type(record).__name__}")
    return record.state


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if isinstance(value, Record) and value.name.name == "OrderedDict":
        return dict(value.items)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: no state_dict_metadata")
    return value


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    """The integers of a torch.Size."""
    numbers = value.args[0] if isinstance(value, Record) and value.name.name == "Size" and value.args else value
    if not isinstance(numbers, (tuple, list)) or not all(_is_size(number) for number in numbers):
        raise CheckpointError(f"{where}: {type(value).__name__} is not a shape")
    return tuple(numbers)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
