"""A rank's share of a snapshot as host memory, and its two objects on storage.

Gathering is collective; what it gives is plain host tensors that nobody trains on, so that writing them needs no
other rank and may go on beside the next steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cluster.storage import Store
from tasks.checkpoints.manifest import Shard
from tasks.checkpoints.safetensors_header import TensorEntry
from tasks.checkpoints.writer import write_shard

DISK_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
PIECE_BYTES = 16 << 20
"""Hashed and written in one go: long enough to spend the time outside Python's lock, short enough to be stopped soon."""


@dataclass(frozen=True, kw_only=True)
class HostShare:
    """What one rank writes of a snapshot; empty on a rank that owns no tensor."""

    number: int
    """Place among the ranks that write, from 1; 0 on one that writes nothing."""
    of: int
    """Ranks that write."""
    model: dict[str, torch.Tensor]
    """Weights by name on disk, contiguous, in host memory, nobody else's."""
    state: dict[str, torch.Tensor]
    """AdamW moments by ``exp_avg.`` or ``exp_avg_sq.`` and the name on disk, likewise."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for part in (self.model, self.state) for tensor in part.values())


@dataclass(frozen=True, kw_only=True)
class ShareObject:
    """One object of a share."""

    key: str
    """Below the snapshot's folder."""
    part: Literal["model", "state"]
    """Weights or training state."""
    tensors: dict[str, torch.Tensor]
    """By name on disk."""


def share_objects(share: HostShare) -> list[ShareObject]:
    """The model object and the state object of a share; none of an empty one."""
    if not share.number:
        return []
    suffix = f"{share.number:05d}-of-{share.of:05d}.safetensors"
    return [
        ShareObject(key=f"model-{suffix}", part="model", tensors=share.model),
        ShareObject(key=f"state-{suffix}", part="state", tensors=share.state),
    ]


def write_object(item: ShareObject, store: Store, check: Callable[[], None] = lambda: None) -> Shard:
    """Write one object whole or not at all; ``check`` is called between pieces and may raise to stop.

    Safe to run again after an error: what an earlier attempt may have left under the key is neither read nor overwritten.
    """
    tensors = item.tensors
    specs = [(name, DISK_DTYPES[tensors[name].dtype], tuple(tensors[name].shape)) for name in sorted(tensors)]

    def pieces_of(entry: TensorEntry) -> Iterator[memoryview]:
        flat: Any = tensors[entry.name].reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(flat), PIECE_BYTES):
            check()
            yield memoryview(flat[start : start + PIECE_BYTES])

    return write_shard(store, item.key, specs, pieces_of, item.part)
