"""Cut a task into chunks: what is read from one input at a time and added at once.

A chunk is a run of elements of one or several tensors that share their dtypes and weights, so that thousands of
small expert tensors cost no more calls than a few large ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tasks.checkpoints.safetensors_header import DTYPE_BYTES
from tasks.merging.planned import PlannedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Elements ``start`` (included) to ``end`` (excluded) of one tensor."""

    tensor: PlannedTensor
    """The tensor."""
    start: int
    """First element."""
    end: int
    """Element after the last."""

    @property
    def size(self) -> int:
        """Elements."""
        return self.end - self.start


Chunk = tuple[Segment, ...]


def cut_chunks(tensors: Iterable[PlannedTensor], chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of ``tensors`` in order; at most ``chunk_bytes`` are read from any input for one."""
    segments: list[Segment] = []
    room, kind = 0, None
    for tensor in tensors:
        if _kind(tensor) != kind or not room:
            if segments:
                yield tuple(segments)
            segments, kind = [], _kind(tensor)
            room = _capacity(tensor, chunk_bytes)
        start = 0
        while start < tensor.num_elements:
            end = min(tensor.num_elements, start + room)
            segments.append(Segment(tensor=tensor, start=start, end=end))
            room -= end - start
            start = end
            if not room:
                yield tuple(segments)
                segments, room = [], _capacity(tensor, chunk_bytes)
    if segments:
        yield tuple(segments)


def _kind(tensor: PlannedTensor) -> Any:
    """What all tensors of a chunk have in common."""
    dtypes = tuple(place.dtype for place in tensor.sources)
    stated = tuple(bool(place.digest) for place in tensor.sources)
    return dtypes, stated, tensor.read_as, tensor.accumulate, tensor.write_dtype, tensor.vector


def _capacity(tensor: PlannedTensor, chunk_bytes: int) -> int:
    return max(1, chunk_bytes // max(DTYPE_BYTES[place.dtype] for place in tensor.sources))
