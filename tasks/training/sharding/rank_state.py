"""Move one rank's share of the training state to and from a snapshot.

Every tensor of the disk layout has one owner among the ranks (:mod:`tasks.training.sharding.ownership`). To write, each replica
sends the rows of its tensors to their owners, many tensors in one exchange; experts stay where they are, and no rank
ever holds the whole model. To read, each rank fetches only the byte ranges of the rows it holds, so the world size and
the mesh may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.models.disk_layout import model_buffers
from tasks.models.slice_reads import plan_reads, run_reads
from tasks.models.weights import require_census
from tasks.training.sharding.ownership import Owned, Parameter, plan_ownership, plan_rounds
from tasks.training.sharding.sharded_model import RankSlice, ShardedModel
from tasks.training.snapshots.share import HostShare

MOMENTS = ("exp_avg", "exp_avg_sq")
ROUND_BYTES = 256 << 20
"""What a rank receives in one exchange at most, unless one tensor is larger: bounds memory beside the share itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Moved:
    """A tensor that the ranks of a replica send to its owner: a parameter or one of its moments."""

    owned: Owned
    kind: str
    """``weight`` or the moment's name."""
    item: RankSlice
    """This rank's rows of the parameter."""


def gather_share(model: ShardedModel, rank: int, world_size: int) -> HostShare:
    """Collectively gather what this rank writes of a snapshot, as host copies that training does not touch."""
    assert world_size == model.plan.world_size
    owned = plan_ownership(_parameters(model), model.plan)
    writers = sorted({entry.owner for entry in owned})
    shares: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in ("weight", *MOMENTS)}
    for entry in owned:
        if entry.is_whole and entry.owner == rank:
            for kind, share in shares.items():
                share[entry.piece.disk_name] = _host_copy(_own_part(model, entry, kind))
    for taken in plan_rounds(_to_move(model, owned, rank), ROUND_BYTES):
        for moved, whole in _exchange(model, taken, rank):
            shares[moved.kind][moved.owned.piece.disk_name] = whole
    if rank == writers[0]:
        shares["weight"] |= {name: _host_copy(buffer) for name, buffer in model_buffers(model.network).items()}
    return HostShare(
        number=writers.index(rank) + 1 if rank in writers else 0,
        of=len(writers),
        model=shares["weight"],
        state={f"{moment}.{name}": tensor for moment in MOMENTS for name, tensor in shares[moment].items()},
    )


def restore_rank(
    model: ShardedModel,
    checkpoint: Checkpoint,
    *,
    with_moments: bool,
    optimizer_steps: int = 0,
    parameter_steps: Mapping[str, int] | None = None,
) -> None:
    """Fill this rank's weights and buffers, and its AdamW moments if asked, from ``checkpoint``.

    ``optimizer_steps`` is AdamW's counter, for its bias correction; ``parameter_steps`` those of parameters by layout name,
    where they differ. Raises :class:`CheckpointError` unless weights and
    moments are complete and fit the network; nothing is changed then.
    """
    shapes = {item.name: torch.empty(item.shape, device="meta") for item in model.slices}
    buffers = model_buffers(model.network)
    require_census({**shapes, **buffers}, checkpoint.model, checkpoint.url)
    if with_moments and not checkpoint.state:
        raise CheckpointError(f"{checkpoint.url} holds no training state to resume from, only weights")
    for moment in MOMENTS if with_moments else ():
        require_census(shapes, checkpoint.state, checkpoint.url, prefix=f"{moment}.")
    reads = [read for name, b in buffers.items() for read in plan_reads(checkpoint.model, name, b.shape, 0, b)]
    for item in model.slices:
        reads += plan_reads(checkpoint.model, item.name, item.shape, item.row_start, item.local.detach())
        for moment in MOMENTS if with_moments else ():
            held = _values(model, item, moment)
            reads += plan_reads(checkpoint.state, item.name, item.shape, item.row_start, held, f"{moment}.")
    run_reads(checkpoint.store, reads)
    if with_moments:
        for item in model.slices:
            steps = (parameter_steps or {}).get(item.name, optimizer_steps)
            model.optimizer.state[item.local]["step"].fill_(float(steps))


def _parameters(model: ShardedModel) -> tuple[Parameter, ...]:
    return tuple(Parameter(name=item.name, shape=tuple(item.shape), is_expert=item.is_expert) for item in model.slices)


def _to_move(model: ShardedModel, owned: tuple[Owned, ...], rank: int) -> list[tuple[int, int, _Moved]]:
    """What this rank's replica has to exchange, in an order that all its ranks agree on."""
    replica = model.plan.replica_of(rank)
    return [
        (entry.owner, entry.num_elements * 4, _Moved(owned=entry, kind=kind, item=model.slices[entry.index]))
        for entry in owned
        if not entry.is_whole and model.plan.replica_of(entry.owner) == replica
        for kind in ("weight", *MOMENTS)
    ]


def _exchange(model: ShardedModel, taken: list[_Moved], rank: int) -> list[tuple[_Moved, torch.Tensor]]:
    """Send each owner this rank's rows of its tensors, in one collective; returns this rank's own tensors, whole."""
    plan = model.plan
    first_rank = plan.replica_of(rank) * plan.shards
    taken = sorted(taken, key=lambda moved: moved.owned.owner)
    values = [_values(model, moved.item, moved.kind).reshape(-1) for moved in taken]
    sent = [0] * plan.shards
    for moved, value in zip(taken, values, strict=True):
        sent[moved.owned.owner - first_rank] += value.numel()
    mine = [moved for moved in taken if moved.owned.owner == rank]
    sizes = [[_rows_size(moved.item, model, shard) for moved in mine] for shard in range(plan.shards)]
    received_sizes = [sum(size) for size in sizes]
    received = torch.empty(sum(received_sizes), dtype=torch.float32, device=model.device)
    dist.all_to_all_single(received, torch.cat(values), received_sizes, sent, group=model.shard_group)
    host = received.cpu()
    if len(mine) == 1:
        return [(mine[0], host.view(mine[0].item.shape))]
    parts = [torch.split(part, size) for part, size in zip(torch.split(host, received_sizes), sizes, strict=True)]
    return [
        (moved, torch.cat([part[index] for part in parts]).view(moved.item.shape)) for index, moved in enumerate(mine)
    ]


def _rows_size(item: RankSlice, model: ShardedModel, shard: int) -> int:
    """Elements that ``shard`` holds of a parameter."""
    start, end = model.plan.rows(item.shape[0], shard, is_expert=item.is_expert)
    return (end - start) * (item.shape.numel() // item.shape[0])


def _own_part(model: ShardedModel, entry: Owned, kind: str) -> torch.Tensor:
    """The tensor of ``entry`` as a view into this rank's rows."""
    item = model.slices[entry.index]
    values = _values(model, item, kind)
    if entry.piece.expert is None:
        return values
    return values[entry.piece.expert - item.row_start, entry.piece.row_start : entry.piece.row_end]


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _values(model: ShardedModel, item: RankSlice, kind: str) -> torch.Tensor:
    """What this rank holds of a weight or moment; moments that no step has made yet begin as zeros."""
    if kind == "weight":
        return item.local.detach()
    state = model.optimizer.state[item.local]
    if kind not in state:
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=item.local.device))
        state[kind] = torch.zeros_like(item.local, memory_format=torch.preserve_format)
    tensor = state[kind]
    assert isinstance(tensor, torch.Tensor)
    return tensor
