"""Which rank holds which rows of which parameter: the gang as a grid, planned without a process group.

The ranks of a gang form a grid ``[replica, expert shard, expert]``, the last index running fastest. A replica is one
whole copy of the model. Within a replica, all ranks together are the shards of ordinary parameters; fused experts are
first cut over the expert index (expert parallelism), then each cut over the expert shards. All cuts are on dimension 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.fields import require
from configs.schema import Config


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """The grid of a gang; a pure function of configuration and number of ranks."""

    replicas: int
    """Whole copies of the model R (FSDP2's replicate dimension)."""
    shards: int
    """Ranks S of one replica; R * S is the number of ranks."""
    expert_parallel: int
    """Ranks X of a replica that share out each layer's experts; divides S."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.replicas * self.shards

    @property
    def expert_shards(self) -> int:
        """Ranks S / X over which one cut of the experts is sharded further."""
        return self.shards // self.expert_parallel

    def replica_of(self, rank: int) -> int:
        """Index of the copy that ``rank`` belongs to."""
        return rank // self.shards

    def shard_of(self, rank: int) -> int:
        """Index of ``rank`` within its replica."""
        return rank % self.shards

    def expert_of(self, rank: int) -> int:
        """Index of ``rank`` within its expert-parallel group."""
        return rank % self.expert_parallel

    def rows(self, num_rows: int, shard: int, *, is_expert: bool) -> tuple[int, int]:
        """First row and row after the last that ``shard`` of any replica holds of a parameter with ``num_rows`` rows."""
        if not is_expert:
            return _cut(0, num_rows, shard, self.shards)
        held = num_rows // self.expert_parallel
        return _cut(shard % self.expert_parallel * held, held, shard // self.expert_parallel, self.expert_shards)


def plan_mesh(config: Config, world_size: int) -> MeshPlan:
    """Lay out ``world_size`` ranks as ``config`` asks for; needs neither workers nor a process group.

    Raises :class:`configs.errors.ConfigError` if the ranks, the experts or the sequences of a batch cannot be cut so.
    """
    training, model = config.training, config.model
    replicas, experts = training.data_parallel_replicas, training.expert_parallel
    require(
        world_size % replicas == 0,
        "training.data_parallel_replicas",
        replicas,
        f"it must divide the {world_size} workers of the gang (training.num_workers)",
    )
    shards = world_size // replicas
    require(
        experts == 1 or model.is_moe,
        "training.expert_parallel",
        experts,
        f"1, since model.family={model.family!r} has no experts",
    )
    require(
        shards % experts == 0,
        "training.expert_parallel",
        experts,
        f"it must divide the {shards} workers of a replica (training.num_workers={world_size} / "
        f"training.data_parallel_replicas={replicas})",
    )
    require(
        experts == 1 or model.num_experts % experts == 0,
        "training.expert_parallel",
        experts,
        f"it must divide model.num_experts={model.num_experts}",
    )
    sequences = training.batch_sequences
    require(
        sequences % (world_size * training.micro_batches) == 0,
        "training.micro_batches",
        training.micro_batches,
        f"workers * micro batches ({world_size} * {training.micro_batches}) must divide the {sequences} sequences of a "
        "batch (training.batch_tokens / training.sequence_length)",
    )
    return MeshPlan(replicas=replicas, shards=shards, expert_parallel=experts)


def _cut(start: int, num_rows: int, index: int, parts: int) -> tuple[int, int]:
    """Rows of part ``index`` as FSDP2 cuts them: equal parts, the last ones shorter or empty."""
    size = -(-num_rows // parts)
    return start + min(index * size, num_rows), start + min((index + 1) * size, num_rows)
