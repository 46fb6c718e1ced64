"""Names on disk against tensors in memory.

transformers 5 fuses the experts of a layer in memory (``experts.gate_up_proj [E, 2F, D]``,
``experts.down_proj [E, D, F]``) and writes one tensor an expert; for Mixtral it also renames the block and
its projections. Manifests, merges and parameter groups speak the disk layout; this file is the only place
that knows both.

A tensor goes by its *layout name* here: the name in memory, without what wrappers put in, and with
Mixtral's block called as on disk. From that alone :func:`pieces_of` knows the family.

Legend: E experts, F expert hidden, D model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_GATE_UP = ".experts.gate_up_proj"
_DOWN = ".experts.down_proj"
_MIXTRAL_BLOCK = ".block_sparse_moe"
_WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")
"""Path components that activation checkpointing, compilation and FSDP add."""


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
    """Disk tensors of the parameter with layout name ``name``; together they tile it exactly."""
    fused = len(shape) == 3
    if fused and name.endswith(_GATE_UP):
        base, half = name.removesuffix(_GATE_UP), shape[1] // 2
        gate, up = ("w1", "w3") if base.endswith(_MIXTRAL_BLOCK) else ("gate_proj", "up_proj")
        for expert in range(shape[0]):
            for row_start, projection in ((0, gate), (half, up)):
                yield _expert_piece(f"{base}.experts.{expert}.{projection}.weight", expert, row_start, half, shape)
    elif fused and name.endswith(_DOWN):
        base = name.removesuffix(_DOWN)
        down = "w2" if base.endswith(_MIXTRAL_BLOCK) else "down_proj"
        for expert in range(shape[0]):
            yield _expert_piece(f"{base}.experts.{expert}.{down}.weight", expert, 0, shape[1], shape)
    else:
        rows = shape[0] if shape else 1
        yield Piece(disk_name=name, expert=None, row_start=0, row_end=rows, shape=tuple(shape))


def model_parameters(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every parameter of ``network`` by its layout name, tied ones once, in the network's order."""
    return {_layout_name(network, name): parameter for name, parameter in network.named_parameters()}


def model_buffers(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are part of the model on disk, by layout name: DeepSeek-V3's ``e_score_correction_bias [E]``.

    Those that a network computes from its configuration, such as rotary frequencies, are not among them.
    The tensors are the network's own, whole on every rank under FSDP2; writing to them changes the network.
    """
    return {
        _layout_name(network, f"{path}.{name}" if path else name): buffer
        for path, module in network.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def model_tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """:func:`model_parameters` and :func:`model_buffers` together: all that a checkpoint of ``network`` holds."""
    return {**model_parameters(network), **model_buffers(network)}


def _layout_name(network: torch.nn.Module, name: str) -> str:
    name = _WRAPPERS.sub("", name)
    if getattr(getattr(network, "config", None), "model_type", None) == "mixtral":
        return name.replace(".mlp.", f"{_MIXTRAL_BLOCK}.")
    return name


def _expert_piece(disk_name: str, expert: int, row_start: int, rows: int, shape: torch.Size | tuple[int, ...]) -> Piece:
    return Piece(
        disk_name=disk_name, expert=expert, row_start=row_start, row_end=row_start + rows, shape=(rows, *shape[2:])
    )
