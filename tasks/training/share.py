"""A rank's share of a snapshot as host memory, and its two objects on storage.

Gathering is collective; what it gives is plain host tensors that nobody trains on, so that writing them needs no
other rank and may go on beside the next steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from cluster.storage import Store
from tasks.checkpoints.manifest import Shard
from tasks.checkpoints.safetensors_header import TensorEntry
from tasks.checkpoints.writer import write_shard

DISK_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


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


def write_share(share: HostShare, store: Store) -> list[Shard]:
    """Write the model shard and the state shard of one rank; no collectives."""
    if not share.number:
        return []
    suffix = f"{share.number:05d}-of-{share.of:05d}.safetensors"
    parts: tuple[tuple[Literal["model", "state"], dict[str, torch.Tensor]], ...] = (
        ("model", share.model),
        ("state", share.state),
    )
    return [_write(store, f"{part}-{suffix}", tensors, part) for part, tensors in parts]


def _write(store: Store, key: str, tensors: dict[str, torch.Tensor], part: Literal["model", "state"]) -> Shard:
    specs = [(name, DISK_DTYPES[tensors[name].dtype], tuple(tensors[name].shape)) for name in sorted(tensors)]

    def chunks_of(entry: TensorEntry) -> list[memoryview]:
        flat: Any = tensors[entry.name].reshape(-1).view(torch.uint8).numpy()
        return [memoryview(flat)]

    return write_shard(store, key, specs, chunks_of, part)
