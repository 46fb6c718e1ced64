"""Find a tensor's elements in a ``torch.save`` archive by reading its two ends, and nothing in between.

torch DCP stores every chunk of a tensor as such an archive: a zip file with a small pickle that says dtype, shape and
strides, and one uncompressed member with the elements.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from tasks.checkpoints.inert_pickle import read_pickle
from tasks.checkpoints.inert_values import Name, PersistentId, Record
from tasks.checkpoints.regions import Region
from tasks.checkpoints.safetensors_header import CheckpointError, tensor_bytes

END_BYTES = 4096
"""Read at each end: the directory of an archive of one tensor takes about 800 bytes."""
MAX_PICKLE_BYTES = 1 << 16
LOCAL_HEADER_BYTES = 30
STORAGE_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "BFloat16Storage": "BF16", "HalfStorage": "F16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""torch dtypes by name, as safetensors calls them."""
ALLOWED = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.storage.UntypedStorage",
        "collections.OrderedDict",
        *(f"torch.{name}" for name in STORAGE_DTYPES),
        *(f"torch.{name}" for name in DTYPES),
    }
)

_ZIP_ERRORS = (
    zipfile.BadZipFile, KeyError, IndexError, EOFError, OSError, ValueError, OverflowError, NotImplementedError,
    RuntimeError, struct.error,
)  # fmt: skip
"""What zipfile raises for damaged archives; storage fails with :class:`cluster.errors.StorageError`."""

ReadRange = Callable[[int, int], bytes]
"""Bytes ``start`` (included) to ``end`` (excluded) of the object."""


def locate_elements(read: ReadRange, region: Region, dtype: str, where: str) -> int:
    """Byte of the object at which the elements of ``region`` begin.

    Raises :class:`CheckpointError` naming ``where`` if the archive does not hold exactly a little-endian, uncompressed,
    row-major tensor of ``dtype`` and the region's shape.
    """
    ends = _Ends(read, region.offset, region.archive_bytes)
    try:
        with zipfile.ZipFile(ends) as archive:
            members = {item.filename.split("/", 1)[-1]: item for item in archive.infolist()}
            described = read_pickle(_small(archive, members["data.pkl"], where), ALLOWED, where)
            storage, first_element = _parse(described, dtype, region, where)
            if "byteorder" in members and _small(archive, members["byteorder"], where) != b"little":
                raise CheckpointError(f"{where}: the archive is not little-endian")
            return _first_byte(ends, members[f"data/{storage}"], region, dtype, first_element, where)
    except _ZIP_ERRORS as error:
        raise CheckpointError(f"{where}: not a torch.save archive of one tensor: {str(error)[:200]}") from None


def _small(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> bytes:
    """A member's bytes; never unpacked, as a few bytes could become any number."""
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{where}: {member.filename[:80]!r} of {member.file_size} bytes is compressed or too large"
        )
    return archive.read(member)


def _first_byte(ends: _Ends, data: zipfile.ZipInfo, region: Region, dtype: str, first_element: int, where: str) -> int:
    if data.compress_type != zipfile.ZIP_STORED or data.flag_bits & 0x1:
        raise CheckpointError(f"{where}: the elements are compressed or encrypted; they cannot be read by range")
    ends.seek(data.header_offset)
    header = ends.read(LOCAL_HEADER_BYTES)
    if len(header) < LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{where}: the archive's directory points at no member")
    start = data.header_offset + LOCAL_HEADER_BYTES
    start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    first = tensor_bytes(dtype, (first_element,))
    needed = tensor_bytes(dtype, region.shape)
    if first + needed > data.file_size or start + data.file_size > region.archive_bytes:
        raise CheckpointError(
            f"{where}: the archive holds {data.file_size} bytes of elements, bytes {first} to {first + needed} are needed"
        )
    return region.offset + start + first


def _parse(value: Any, dtype: str, region: Region, where: str) -> tuple[str, int]:
    """Member and first element of the tensor that data.pkl describes, checked against what the metadata said."""
    match value:
        case Record(
            name=Name(name="_rebuild_tensor_v2" | "_rebuild_tensor_v3" as version),
            args=(
                PersistentId(value=("storage", Name() as kind, str(storage), _, int())),
                int(first),
                tuple(shape),
                tuple(strides),
                _requires_grad,
                _hooks,
                *rest,
            ),
        ):
            # Newer dtypes have no storage class of their own: v3 names the dtype.
            named = rest.pop(0) if version == "_rebuild_tensor_v3" and rest else None
            stored = DTYPES.get(named.name, "") if isinstance(named, Name) else STORAGE_DTYPES.get(kind.name, "")
        case _:
            raise CheckpointError(f"{where}: data.pkl describes no plain tensor")
    if stored != dtype or shape != region.shape or first < 0:
        held = f"{stored or kind.name} {_sizes(shape)}"
        raise CheckpointError(f"{where}: the archive holds {held}, the metadata says {dtype} {list(region.shape)}")
    if any(rest):
        raise CheckpointError(f"{where}: the tensor is stored as a negated or conjugated view, not by its elements")
    if not _is_row_major(shape, strides):
        raise CheckpointError(f"{where}: strides {_sizes(strides)} are not row-major; save a contiguous tensor")
    return storage, first


def _sizes(values: tuple[Any, ...]) -> str:
    """``values`` for a message; they may be anything."""
    return str(list(values)) if len(values) <= 16 and all(type(value) is int for value in values) else "not of integers"


def _is_row_major(shape: tuple[int, ...], strides: tuple[Any, ...]) -> bool:
    if len(strides) != len(shape):
        return False
    if 0 in shape:
        return True
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


class _Ends(io.RawIOBase):
    """The archive as a file whose first and last bytes are kept; anything else is read by range."""

    def __init__(self, read: ReadRange, offset: int, length: int) -> None:
        self._read, self._offset, self._length = read, offset, length
        self._position = 0
        head = min(END_BYTES, length)
        tail = max(head, length - END_BYTES)
        self._windows = [(0, read(offset, offset + head))]
        if tail < length:
            self._windows.append((tail, read(offset + tail, offset + length)))

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the archive")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        start = min(self._position, self._length)
        end = self._length if size < 0 else min(start + size, self._length)
        if end - start > MAX_PICKLE_BYTES:
            raise OSError(f"{end - start} bytes of directory are too many for one tensor")
        self._position = end
        for first, data in self._windows:
            if first <= start and end <= first + len(data):
                return data[start - first : end - first]
        return self._read(self._offset + start, self._offset + end)
