"""The network under FSDP2, its float32 masters, and AdamW on this rank's slices.

Parameters stay float32 and sharded on dimension 0 over all workers; forward and backward run in the
compute dtype. The optimizer works on the plain local tensors behind the DTensors, which skips the
per-operation cost of DTensor dispatch and leaves moments in the same slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from configs.schema import Config
from configs.training import OptimizerConfig
from tasks.models.build import build_model


@dataclass(frozen=True, kw_only=True)
class RankSlice:
    """What one rank holds of one parameter."""

    name: str
    """Name in memory."""
    parameter: torch.nn.Parameter
    """The sharded parameter (a DTensor)."""
    local: torch.nn.Parameter
    """The same storage as a plain tensor; empty where this rank holds no rows."""
    row_start: int
    """First row of dimension 0 that ``local`` holds."""

    @property
    def shape(self) -> torch.Size:
        """Global shape."""
        return self.parameter.shape


@dataclass(frozen=True, kw_only=True)
class ShardedModel:
    """One rank's share of the network and its optimizer."""

    network: torch.nn.Module
    """The wrapped network; call it for a forward pass."""
    slices: tuple[RankSlice, ...]
    """One per parameter, in the network's order."""
    optimizer: torch.optim.AdamW
    """Steps the local slices."""

    def step(self, learning_rate: float) -> None:
        """One AdamW update from the gradients at hand, which are dropped after."""
        for item in self.slices:
            gradient = item.parameter.grad
            item.local.grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        for item in self.slices:
            item.parameter.grad = None
            item.local.grad = None

    def gradient_norm(self) -> torch.Tensor:
        """Global L2 norm of all gradients, a float32 scalar equal on every rank."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def clip_gradients(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale all gradients so that their global norm is at most ``max_norm``."""
        torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), max_norm, norm)


def build_sharded_model(config: Config, rank: int, world_size: int) -> ShardedModel:
    """Build, shard and wrap the network; initial weights depend on the seed alone."""
    network = build_model(config.model, config.training.sequence_length, seed=config.seed)
    mesh = init_device_mesh("cpu", (world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.training.compute_dtype == "bfloat16" else None, reduce_dtype=torch.float32
    )
    if config.training.fsdp_unit == "layer":
        for layer in network.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=config.training.fsdp_unit == "layer")
    slices = tuple(_rank_slice(name, p, rank, world_size) for name, p in network.named_parameters())
    return ShardedModel(network=network, slices=slices, optimizer=_build_optimizer(slices, config.optimizer))


def first_row(num_rows: int, rank: int, world_size: int) -> int:
    """First row of dimension 0 that FSDP2 gives to ``rank``: chunks of equal size, the last ones shorter."""
    return min(rank * -(-num_rows // world_size), num_rows)


def _rank_slice(name: str, parameter: torch.nn.Parameter, rank: int, world_size: int) -> RankSlice:
    assert isinstance(parameter, DTensor)
    local = torch.nn.Parameter(parameter.to_local().detach())
    return RankSlice(
        name=name, parameter=parameter, local=local, row_start=first_row(parameter.shape[0], rank, world_size)
    )


def _build_optimizer(slices: tuple[RankSlice, ...], optimizer: OptimizerConfig) -> torch.optim.AdamW:
    matrices = [item.local for item in slices if len(item.shape) >= 2]
    vectors = [item.local for item in slices if len(item.shape) < 2]
    groups = [
        {"params": matrices, "weight_decay": optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        foreach=True,
    )
