"""Move one rank's share of the training state to and from a snapshot.

Every tensor of the disk layout has one owner among the ranks, balanced by bytes. To write, ranks
gather one parameter at a time and its owner keeps a host copy; no rank ever holds the whole model.
To read, each rank fetches only the byte ranges of the rows it holds, so the world size may change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor

from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.models.disk_layout import pieces_of
from tasks.models.weights import read_slice, require_census
from tasks.training.sharded_model import RankSlice, ShardedModel
from tasks.training.share import HostShare

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_share(model: ShardedModel, rank: int, world_size: int) -> HostShare:
    """Collectively gather what this rank writes of a snapshot, as host copies."""
    owners = assign_owners(model.slices, world_size)
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    for item, owner in zip(model.slices, owners, strict=True):
        _collect(item, item.parameter, "", weights if owner == rank else None)
        for moment in MOMENTS:
            _collect(
                item, _as_sharded(item, _moment(model, item, moment)), f"{moment}.", moments if owner == rank else None
            )
    number = sorted(set(owners)).index(rank) + 1 if rank in owners else 0
    return HostShare(number=number, of=len(set(owners)), model=weights, state=moments)


def restore_rank(model: ShardedModel, checkpoint: Checkpoint, *, with_moments: bool, optimizer_steps: int) -> None:
    """Fill this rank's weights, and its AdamW moments if asked, from ``checkpoint``.

    Raises :class:`CheckpointError` unless weights and moments are complete and fit the network.
    """
    parameters = {item.name: item.parameter for item in model.slices}
    require_census(parameters, checkpoint.model, checkpoint.url)
    for item in model.slices:
        read_slice(checkpoint.store, checkpoint.model, item.name, item.shape, item.row_start, item.local.data)
    if not with_moments:
        return
    if not checkpoint.state:
        raise CheckpointError(f"{checkpoint.url} holds no training state to resume from, only weights")
    for moment in MOMENTS:
        require_census(parameters, checkpoint.state, checkpoint.url, prefix=f"{moment}.")
        for item in model.slices:
            target = _moment(model, item, moment)
            read_slice(checkpoint.store, checkpoint.state, item.name, item.shape, item.row_start, target, f"{moment}.")
    for item in model.slices:
        model.optimizer.state[item.local]["step"] = torch.tensor(float(optimizer_steps))


def assign_owners(slices: Iterable[RankSlice], world_size: int) -> list[int]:
    """Owner rank of each parameter: largest first, to the rank with the fewest bytes."""
    sizes = [math.prod(item.shape) for item in slices]
    loads = [0] * world_size
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners


def _collect(item: RankSlice, sharded: torch.Tensor, prefix: str, into: dict[str, torch.Tensor] | None) -> None:
    whole = sharded.full_tensor() if isinstance(sharded, DTensor) else sharded
    if into is not None:
        for piece in pieces_of(item.name, item.shape):
            into[prefix + piece.disk_name] = piece.of(whole.detach()).clone(memory_format=torch.contiguous_format)


def _as_sharded(item: RankSlice, local: torch.Tensor) -> torch.Tensor:
    parameter = item.parameter
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _moment(model: ShardedModel, item: RankSlice, moment: str) -> torch.Tensor:
    state = model.optimizer.state[item.local]
    if moment not in state:
        state.setdefault("step", torch.tensor(0.0))
        state[moment] = torch.zeros_like(item.local, memory_format=torch.preserve_format)
    tensor = state[moment]
    assert isinstance(tensor, torch.Tensor)
    return tensor
