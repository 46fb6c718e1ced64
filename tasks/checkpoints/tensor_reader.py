"""Read elements of stored tensors by range, wherever their regions lie."""

from __future__ import annotations

from types import TracebackType

from cluster.storage import RangeReader, Store
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import DTYPE_BYTES


class TensorReader:
    """Reads ranges of elements of one checkpoint's tensors; keeps its objects open. Safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._objects: dict[str, RangeReader] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for opened in self._objects.values():
            opened.close()

    def read_into(self, place: TensorPlace, start: int, end: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with elements ``start`` (included) to ``end`` (excluded) of ``place``, in row-major order.

        ``buffer`` is writable, of exactly that many bytes. Raises :class:`cluster.errors.StorageError` if storage fails.
        """
        width = DTYPE_BYTES[place.dtype]
        region = place.regions[0]
        self._object(region.key).read_into(region.offset + start * width, buffer)

    def _object(self, key: str) -> RangeReader:
        if key not in self._objects:
            self._objects[key] = self.store.open_reader(key)
        return self._objects[key]
