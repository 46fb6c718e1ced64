"""Digests of what a checkpoint holds, computed from its bytes as they are now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tasks.checkpoints.digest import content_digest, new_hasher
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.safetensors_header import DTYPE_BYTES, TensorEntry
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


def digest_of_weights(checkpoint: Checkpoint) -> str:
    """Content digest of ``checkpoint``: its manifest's word or, without one, from every weight, read once."""
    if checkpoint.manifest is not None:
        return checkpoint.manifest.digest
    return digest_of_tensors(checkpoint, dict(tensor_digests(checkpoint)))


def digest_of_tensors(checkpoint: Checkpoint, digests: Mapping[str, str]) -> str:
    """Content digest of ``checkpoint`` from the ``digests`` of all its weights by name."""
    return content_digest(
        TensorEntry(name=name, dtype=p.dtype, shape=p.shape, offset=0, bytes=p.num_bytes, digest=digests[name])
        for name, p in checkpoint.model.items()
    )
