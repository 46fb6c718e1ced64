"""Expert parallelism: each rank of a group holds some of a layer's experts, and tokens travel to them and back.

The module takes the place of transformers' fused experts under the same names, and is called alike by every family:
``experts(hidden, chosen experts, weights)``. Two exchanges a layer in the forward pass, two in the backward pass; sizes
are those of the tokens actually sent, nothing is dropped and nothing padded.

Legend: T tokens of this rank, K top-k, A = T * K assignments, G assignments received, X ranks of the group, E experts,
D model, F expert hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class ParallelExperts(nn.Module):
    """The experts of one layer that this rank of an expert-parallel group holds."""

    gate_up_proj: nn.Parameter
    """``[E / X, 2F, D]``."""
    down_proj: nn.Parameter
    """``[E / X, D, F]``."""

    def __init__(self, fused: nn.Module, group: dist.ProcessGroup, *, grouped_mm: bool) -> None:
        """Keep this rank's cut of ``fused``, transformers' experts with all E of them (gated, without biases)."""
        super().__init__()
        index, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.group = group
        self.grouped_mm = grouped_mm
        for name in ("gate_up_proj", "down_proj"):
            whole = fused.get_parameter(name)
            assert whole.shape[0] % self.num_ranks == 0
            held = whole.shape[0] // self.num_ranks
            cut = whole.detach()[index * held : (index + 1) * held]
            self.register_parameter(name, nn.Parameter(cut.clone()))
        self.num_held = self.gate_up_proj.shape[0]
        assert isinstance(fused.act_fn, nn.Module)
        self.act_fn: nn.Module = fused.act_fn

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes depend on the data at every step
    def forward(self, hidden_TD: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Weighted sum ``[T, D]`` over each token's experts, wherever they are, in the dtype of ``hidden_TD``.

        Collective over the group: each of its ranks must call it as often, with any number of tokens.
        """
        top_k = chosen_TK.shape[1]
        experts_A, order_A = torch.sort(chosen_TK.flatten(), stable=True)
        counts_E = torch.bincount(experts_A, minlength=self.num_ranks * self.num_held)
        counts_XE = self._exchange_counts(counts_E)
        sent = counts_E.view(self.num_ranks, self.num_held).sum(dim=1).tolist()
        received = counts_XE.sum(dim=1).tolist()
        arrived_GD = _send(hidden_TD[order_A // top_k], sent, received, self.group)
        by_expert_G = torch.sort(_expert_of_arrivals(counts_XE), stable=True).indices
        computed_GD = self._compute(arrived_GD[by_expert_G], counts_XE.sum(dim=0))
        back_AD = _send(computed_GD[_inverse(by_expert_G)], received, sent, self.group)
        outputs_TKD = back_AD[_inverse(order_A)].view(*chosen_TK.shape, -1)
        summed_TD: torch.Tensor = (outputs_TKD * weights_TK.unsqueeze(-1)).sum(dim=1)
        return summed_TD.to(hidden_TD.dtype)

    def _exchange_counts(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Tokens that each rank sends to each expert held here, ``[X, E / X]``."""
        received = torch.empty_like(counts_E)
        dist.all_to_all_single(received, counts_E, group=self.group)
        return received.view(self.num_ranks, self.num_held)

    def _compute(self, tokens_GD: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        gate_up, down = (_average_gradient(w, self.num_ranks) for w in (self.gate_up_proj, self.down_proj))
        gate_GF, up_GF = self._multiply(tokens_GD.to(gate_up.dtype), gate_up, counts).chunk(2, dim=-1)
        return self._multiply(self.act_fn(gate_GF) * up_GF, down, counts)

    def _multiply(self, rows: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """``rows``, sorted by expert, each times the transposed matrix of its expert."""
        if self.grouped_mm:
            offsets = counts.cumsum(dim=0, dtype=torch.int32)
            return nn.functional.grouped_mm(rows, weights.transpose(-2, -1), offs=offsets)
        parts = zip(torch.split(rows, counts.tolist()), weights.unbind(), strict=True)
        return torch.cat([nn.functional.linear(part, weight) for part, weight in parts])


def distribute_experts(network: nn.Module, group: dist.ProcessGroup, *, grouped_mm: bool) -> None:
    """Replace the fused experts of every layer of ``network`` by the cut of this rank of ``group``."""
    for name, module in list(network.named_modules()):
        if is_fused_experts(module):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, ParallelExperts(module, group, grouped_mm=grouped_mm))


def is_fused_experts(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' experts of one layer: two parameters with the expert as dimension 0."""
    names = {name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3}
    return names == {"gate_up_proj", "down_proj"} and not isinstance(module, ParallelExperts)


def _send(rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    moved: torch.Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return moved


def _average_gradient(weight: torch.Tensor, num_ranks: int) -> torch.Tensor:
    same: torch.Tensor = _MeanOverGroup.apply(weight, num_ranks)  # type: ignore[no-untyped-call]
    return same


class _Exchange(torch.autograd.Function):
    """All-to-all of rows with differing sizes; its gradient is the exchange the other way."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sent, received = ctx.sizes
        return _exchange(gradients[0], received, sent, ctx.group), None, None, None


class _MeanOverGroup(torch.autograd.Function):
    """A weight as it is; its gradient over X.

    An expert sees the tokens of all X ranks of the group, so its gradient is the sum of what X ranks would have had.
    FSDP2 then averages over the other ranks alone; with this factor the result is the mean over all ranks, as for every
    other parameter.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, num_ranks: int) -> torch.Tensor:
        ctx.num_ranks = num_ranks
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0] / ctx.num_ranks, None


def _exchange(rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


def _expert_of_arrivals(counts_XE: torch.Tensor) -> torch.Tensor:
    """Local expert of every row as it arrives: by sending rank, then by expert."""
    experts = torch.arange(counts_XE.shape[1], device=counts_XE.device).expand_as(counts_XE)
    return experts.flatten().repeat_interleave(counts_XE.flatten())


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse
