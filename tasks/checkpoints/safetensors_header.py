"""The safetensors header: eight bytes of length, JSON of names, dtypes, shapes and offsets.

Parsed from untrusted bytes to typed entries, so that planning needs no tensor data and a hostile
header costs little.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.storage import Store

MAX_HEADER_BYTES = 100 << 20
"""The format's own limit; 23,000 tensors take about 3 MB."""
LENGTH_BYTES = 8

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_TOO_LARGE = 2**63


class CheckpointError(Exception):
    """A checkpoint is damaged or lies about itself; the message names URL, tensor and offset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of one shard."""

    name: str
    """Name on disk."""
    dtype: str
    """safetensors dtype, such as ``F32`` or ``BF16``."""
    shape: tuple[int, ...]
    """Global shape."""
    offset: int
    """First byte in the file, counted from the file's start."""
    bytes: int
    """Length in bytes."""
    digest: str = ""
    """BLAKE3 of the tensor's bytes; empty where it is not known yet."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"tensor {self.name!r}: dtype {self.dtype!r} is not known")
        if self.offset < 0 or min(self.shape, default=0) < 0 or self.bytes != tensor_bytes(self.dtype, self.shape):
            raise ValueError(
                f"tensor {self.name!r}: {self.dtype} {list(self.shape)} at byte {self.offset} does not take {self.bytes} bytes"
            )


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


def read_header(store: Store, key: str) -> list[TensorEntry]:
    """Entries of the safetensors object ``key``, in file order.

    Raises :class:`CheckpointError` for anything but a header whose tensors tile the data section
    exactly: truncated, oversized, overlapping, gaps, unknown dtypes, duplicate names.
    """
    url = f"{store.url}/{key}"
    size = store.size(key)
    if size < LENGTH_BYTES:
        raise CheckpointError(f"{url}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(store.read_range(key, 0, LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES or LENGTH_BYTES + length > size:
        raise CheckpointError(
            f"{url}: header claims {length} bytes; the file has {size}, the format allows {MAX_HEADER_BYTES}"
        )
    text = store.read_range(key, LENGTH_BYTES, LENGTH_BYTES + length)
    return _parse_entries(url, text, data_start=LENGTH_BYTES + length, file_bytes=size)


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[TensorEntry]]:
    """Header bytes for ``(name, dtype, shape)`` laid out in the given order, and their entries.

    The header is padded with spaces so that data starts at a multiple of 8, as the format asks.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + tensor_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = LENGTH_BYTES + len(text)
    entries = [
        TensorEntry(
            name=name,
            dtype=dtype,
            shape=shape,
            offset=start + table[name]["data_offsets"][0],
            bytes=tensor_bytes(dtype, shape),
        )
        for name, dtype, shape in tensors
    ]
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, entries


def _parse_entries(url: str, text: bytes, *, data_start: int, file_bytes: int) -> list[TensorEntry]:
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_refuse_duplicates(url))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{url}: header is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{url}: header is not a JSON object")
    entries = [_parse_entry(url, name, item, data_start) for name, item in table.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.offset, entry.bytes))
    position = data_start
    for entry in entries:
        if entry.offset != position:
            kind = "overlaps its neighbour" if entry.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{url}: tensor {entry.name!r} at byte {entry.offset} {kind} (expected {position})")
        position += entry.bytes
    if position != file_bytes:
        raise CheckpointError(f"{url}: tensors end at byte {position}, the file at {file_bytes}; truncated or padded")
    return entries


def _parse_entry(url: str, name: str, item: Any, data_start: int) -> TensorEntry:
    # On this path for every tensor of every input: messages are made only when they are needed.
    if type(item) is not dict or not item.keys() >= _ENTRY_KEYS:
        raise CheckpointError(f"{url}: tensor {name!r}: entry needs dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not name.isprintable():
        raise CheckpointError(f"{url}: tensor {name!r}: a name of characters that cannot be printed or encoded")
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{url}: tensor {name!r}: dtype {dtype!r} is not known; known: {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{url}: tensor {name!r}: shape {shape!r} or data_offsets {offsets!r} are not non-negative integers"
        )
    expected = DTYPE_BYTES[dtype] * math.prod(shape)
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{url}: tensor {name!r}: {dtype} {shape} needs {expected} bytes, data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    # Equal in every input of a merge, and kept once.
    name, dtype, shape = sys.intern(name), sys.intern(dtype), _kept_once(tuple(shape))
    return TensorEntry(name=name, dtype=dtype, shape=shape, offset=data_start + offsets[0], bytes=expected)


@functools.lru_cache(maxsize=1 << 14)
def _kept_once(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _are_sizes(values: Any) -> bool:
    if type(values) is not list:
        return False
    return all(type(value) is int and 0 <= value < _TOO_LARGE for value in values)


def _refuse_duplicates(url: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{url}: {twice!r} appears twice in the header")
        return table

    return build
