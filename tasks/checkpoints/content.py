"""Digests of what a checkpoint holds, computed from its bytes as they are now."""

from __future__ import annotations

from collections.abc import Iterator

from tasks.checkpoints.digest import new_hasher
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.safetensors_header import DTYPE_BYTES
from tasks.checkpoints.tensor_reader import TensorReader

READ_BYTES = 8 << 20


def tensor_digests(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Name and BLAKE3 of every weight of ``checkpoint``, one after another in constant memory."""
    buffer = memoryview(bytearray(READ_BYTES))
    with TensorReader(checkpoint.store) as reader:
        for name, place in checkpoint.model.items():
            hasher = new_hasher()
            width = DTYPE_BYTES[place.dtype]
            for start in range(0, place.num_elements, READ_BYTES // width):
                end = min(start + READ_BYTES // width, place.num_elements)
                data = buffer[: (end - start) * width]
                reader.read_into(place, start, end, data)
                hasher.update(data)
            yield name, str(hasher.hexdigest())
