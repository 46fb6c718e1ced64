"""What the network and batches of a workload must be for snapshots and gangs, found before any worker starts."""

from __future__ import annotations

import torch
from torch import nn

from configs.errors import UserError
from configs.schema import Config
from tasks.models.disk_layout import model_buffers
from tasks.workload import Side, Workload, open_workload


def require_workload(config: Config) -> None:
    """Find a workload's mistakes before any worker starts: build its network, read a row of both sides.

    Raises :class:`configs.errors.UserError` as :func:`tasks.workload.open_workload` and the workload itself do.
    """
    workload = open_workload(config)
    draw_whole(workload, config)
    sides: tuple[Side, ...] = ("train", "held_out")
    for side in sides:
        batches = workload.batches(config, side)
        try:
            rows = batches.read(0, 1)
            if len(rows) != 1:
                raise UserError(f"workload.entry={config.workload.entry!r}: one sequence was read, {len(rows)} came")
        finally:
            batches.close()


def draw_whole(workload: Workload, config: Config) -> nn.Module:
    """The network of a workload with the initial weights of ``config.seed``, in host memory.

    Raises :class:`configs.errors.UserError` for a network whose tensors no snapshot could hold.
    """
    torch.manual_seed(config.seed)
    network = workload.build(config)
    require_storable(network, config)
    return network


def require_storable(network: nn.Module, config: Config) -> None:
    """Raise :class:`configs.errors.UserError` unless parameters and saved buffers of ``network`` are what snapshots hold."""
    entry = config.workload.entry
    if not isinstance(network, nn.Module) or not any(True for _ in network.parameters()):
        raise UserError(
            f"workload.entry={entry!r}: build gave {type(network).__name__}, expected a module with parameters"
        )
    wrong = [
        f"{name} is {str(p.dtype).removeprefix('torch.')} {list(p.shape)}"
        for name, p in network.named_parameters()
        if p.dtype != torch.float32 or p.ndim == 0 or p.numel() == 0 or not p.requires_grad
    ]
    wrong += [f"buffer {name} is {b.dtype}" for name, b in model_buffers(network).items() if b.dtype != torch.float32]
    if wrong:
        raise UserError(
            f"workload.entry={entry!r}: snapshots hold float32 parameters that are trained, of one dimension or more, and "
            f"float32 buffers; its network has others: {'; '.join(wrong[:10])}. Keep complex numbers as two real ones, "
            "leave what is frozen without gradient by detach(), and register other buffers with persistent=False"
        )
