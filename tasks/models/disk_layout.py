"""Names on disk against tensors in memory.

transformers 5 fuses the experts of a layer in memory (``experts.gate_up_proj [E, 2F, D]``,
``experts.down_proj [E, D, F]``) and writes one tensor an expert. Manifests, merges and parameter
groups speak the disk layout; this file is the only place that knows both.

Legend: E experts, F expert hidden, D model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_GATE_UP = ".experts.gate_up_proj"
_DOWN = ".experts.down_proj"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of an in-memory parameter that is one tensor on disk."""

    disk_name: str
    """Name on disk."""
    expert: int | None
    """Index along dimension 0 of a fused parameter; None if the parameter is the tensor itself."""
    row_start: int
    """First row (dimension 1 of a fused parameter, dimension 0 otherwise)."""
    row_end: int
    """Row after the last."""
    shape: tuple[int, ...]
    """Shape on disk."""

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """View of this piece in the whole ``parameter``."""
        return parameter if self.expert is None else parameter[self.expert, self.row_start : self.row_end]


def pieces_of(name: str, shape: torch.Size | tuple[int, ...]) -> Iterator[Piece]:
    """Disk tensors of the in-memory parameter ``name``; together they tile it exactly."""
    fused = len(shape) == 3
    if fused and name.endswith(_GATE_UP):
        base, half = name.removesuffix(_GATE_UP), shape[1] // 2
        for expert in range(shape[0]):
            for row_start, projection in ((0, "gate_proj"), (half, "up_proj")):
                yield _expert_piece(f"{base}.experts.{expert}.{projection}.weight", expert, row_start, half, shape)
    elif fused and name.endswith(_DOWN):
        base = name.removesuffix(_DOWN)
        for expert in range(shape[0]):
            yield _expert_piece(f"{base}.experts.{expert}.down_proj.weight", expert, 0, shape[1], shape)
    else:
        rows = shape[0] if shape else 1
        yield Piece(disk_name=name, expert=None, row_start=0, row_end=rows, shape=tuple(shape))


def _expert_piece(disk_name: str, expert: int, row_start: int, rows: int, shape: torch.Size | tuple[int, ...]) -> Piece:
    return Piece(
        disk_name=disk_name, expert=expert, row_start=row_start, row_end=row_start + rows, shape=(rows, *shape[2:])
    )
