"""Read elements of stored tensors by range, wherever their regions lie."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from types import TracebackType

import numpy as np

from cluster.storage import RangeReader, Store
from tasks.checkpoints.regions import Region, TensorPlace, transfers
from tasks.checkpoints.safetensors_header import DTYPE_BYTES
from tasks.checkpoints.torch_archive import locate_elements

MAX_OPEN = 64
"""Objects kept open; a checkpoint of many ranks has thousands."""
MAX_FOUND = 65536
"""Archives whose elements are remembered, some 20 MiB; a large checkpoint has a million. Another look costs two reads."""


class TensorReader:
    """Reads ranges of elements of one checkpoint's tensors; keeps its objects open. Safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._objects: OrderedDict[str, RangeReader] = OrderedDict()
        self._found: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._guard = threading.Lock()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for opened in self._objects.values():
            opened.close()

    def read_into(self, place: TensorPlace, start: int, end: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with elements ``start`` (included) to ``end`` (excluded) of ``place``, in row-major order.

        ``buffer`` is writable, of exactly that many bytes. Raises :class:`cluster.errors.StorageError` if storage fails and
        :class:`tasks.checkpoints.safetensors_header.CheckpointError` if an archive does not hold what the metadata says.
        """
        if place.is_whole:
            region = place.regions[0]
            self.read_bytes(region.key, region.offset + start * DTYPE_BYTES[place.dtype], buffer)
        else:
            self._gather(place, start, end, buffer)

    def read_bytes(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``start`` of the object ``key``."""
        self._object(key).read_into(start, buffer)

    def _gather(self, place: TensorPlace, start: int, end: int, buffer: memoryview) -> None:
        """Read each region's share into place: straight where it is contiguous in the tensor, else by way of a copy."""
        width = DTYPE_BYTES[place.dtype]
        strides = [math.prod(place.shape[d + 1 :]) for d in range(len(place.shape))]
        for transfer in transfers(place, start, end):
            first = sum(c * stride for c, stride in zip(transfer.start, strides, strict=True)) - start
            size = math.prod(transfer.shape)
            position = self._elements_of(transfer.region, place.dtype) + transfer.first * width
            if _last(transfer.shape, strides) + 1 == size:
                self.read_bytes(transfer.region.key, position, buffer[first * width : (first + size) * width])
                continue
            data = bytearray(size * width)
            self.read_bytes(transfer.region.key, position, memoryview(data))
            target = np.ndarray(
                transfer.shape,
                dtype=f"V{width}",
                buffer=buffer,
                offset=first * width,
                strides=[stride * width for stride in strides],
            )
            target[...] = np.frombuffer(data, dtype=f"V{width}").reshape(transfer.shape)

    def _elements_of(self, region: Region, dtype: str) -> int:
        """Byte at which the region's elements begin; an archive is looked into once."""
        if not region.archive_bytes:
            return region.offset
        archive = (region.key, region.offset)
        with self._guard:
            found = self._found.get(archive)
        if found is None:
            where = (
                f"{self.store.url}/{region.key}: the chunk at byte {region.offset}, "
                f"which is {dtype} {list(region.shape)} from {list(region.start)}"
            )
            found = locate_elements(lambda start, end: self._read(region.key, start, end), region, dtype, where)
            with self._guard:
                self._found[archive] = found
                if len(self._found) > MAX_FOUND:
                    self._found.popitem(last=False)
        return found

    def _read(self, key: str, start: int, end: int) -> bytes:
        data = bytearray(end - start)
        self.read_bytes(key, start, memoryview(data))
        return bytes(data)

    def _object(self, key: str) -> RangeReader:
        with self._guard:
            if key in self._objects:
                self._objects.move_to_end(key)
                return self._objects[key]
            # One that is dropped here closes itself once no thread reads from it any more.
            while len(self._objects) >= MAX_OPEN:
                self._objects.popitem(last=False)
            self._objects[key] = self.store.open_reader(key)
            return self._objects[key]


def _last(shape: tuple[int, ...], strides: list[int]) -> int:
    """Distance from the first to the last element of a box in the tensor's row-major order."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
