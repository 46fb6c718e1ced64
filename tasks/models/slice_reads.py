"""Read parameters, or the rows of them that a rank holds, straight into tensors, many ranges at once."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cluster.storage import Store
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import DTYPE_BYTES
from tasks.checkpoints.tensor_reader import TensorReader
from tasks.models.disk_layout import pieces_of

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
READ_BYTES = 64 << 20
"""Longest single read; larger ranges are cut, so that their parts overlap too."""
NUM_READERS = 8
"""Reads in flight. One stream of object storage gives some 100 MB/s, a node's network many times that."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SliceRead:
    """A range of one stored tensor and where its values belong."""

    place: TensorPlace
    """The stored tensor."""
    start: int
    """First element in row-major order."""
    target: torch.Tensor
    """One-dimensional view of the tensor that is filled, as many elements as are read."""


def plan_reads(
    places: Mapping[str, TensorPlace],
    name: str,
    shape: torch.Size,
    row_start: int,
    target: torch.Tensor,
    prefix: str = "",
) -> Iterator[SliceRead]:
    """Reads that fill ``target``: rows ``row_start`` and on of the parameter with layout name ``name`` and whole ``shape``.

    ``target`` is contiguous. ``prefix`` selects a tensor derived from the parameter, such as a moment. No byte of other
    rows is read.
    """
    num_rows = target.shape[0] if target.ndim else 1
    for piece in pieces_of(name, shape) if target.numel() else ():
        place = places[prefix + piece.disk_name]
        if piece.expert is None:
            yield from _cut(place, row_start * (target.numel() // num_rows), target.view(-1))
        elif row_start <= piece.expert < row_start + num_rows:
            yield from _cut(place, 0, target[piece.expert - row_start, piece.row_start : piece.row_end].view(-1))


def run_reads(store: Store, reads: Iterable[SliceRead]) -> None:
    """Fill every target, :data:`NUM_READERS` at a time where reads wait for a network; values take the targets' dtype.

    Raises what the first failed read raised, and starts no more then.
    """
    readers = NUM_READERS if store.reads_ahead else 1
    with TensorReader(store) as reader, concurrent.futures.ThreadPoolExecutor(readers, "restore") as pool:
        running = [pool.submit(_fill, reader, read) for read in reads]
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _cut(place: TensorPlace, start: int, target: torch.Tensor) -> Iterator[SliceRead]:
    step = READ_BYTES // DTYPE_BYTES[place.dtype]
    for first in range(0, target.numel(), step):
        yield SliceRead(place=place, start=start + first, target=target[first : first + step])


def _fill(reader: TensorReader, read: SliceRead) -> None:
    end, dtype = read.start + read.target.numel(), TORCH_DTYPES[read.place.dtype]
    if dtype == read.target.dtype and read.target.device.type == "cpu":
        memory: Any = read.target.view(torch.uint8).numpy()
        reader.read_into(read.place, read.start, end, memoryview(memory))
        return
    data = bytearray(read.target.numel() * DTYPE_BYTES[read.place.dtype])
    reader.read_into(read.place, read.start, end, memoryview(data))
    read.target.copy_(torch.frombuffer(data, dtype=dtype))
