"""Router health per layer, and the load-balance loss per layer.

transformers' own auxiliary loss pools all layers before it multiplies load and probability: layers
that each collapsed on a different expert score as perfectly balanced. Both numbers here are per
layer.

Legend: B sequences, S tokens of a sequence, T tokens, E experts, K top-k, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tasks.models.routers import RouterReading


def layer_counts(readings: Sequence[RouterReading]) -> torch.Tensor:
    """Tokens that went to each expert, float32 ``[L, E]``, layers ascending, summed over forward passes.

    What was really chosen counts, DeepSeek-V3's bias and groups included. All-reduce it for the gang's counts.
    """
    counts: dict[int, torch.Tensor] = {}
    for reading in readings:
        counts_E = _count(reading.chosen.flatten(), reading.logits.shape[-1])
        counts[reading.layer] = counts_E + counts[reading.layer] if reading.layer in counts else counts_E
    return torch.stack([counts[layer] for layer in sorted(counts)])


def balance_loss(
    readings: Sequence[RouterReading], *, num_sequences: int, counts_LE: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over layers, and over forward passes, of E * sum_e load_e * probability_e; a float32 scalar.

    A balanced layer scores 1, a collapsed one up to E. Differentiable through the probabilities, not the loads, which are
    shares of the K*T assignments. Softmax routers: over all tokens of the forward pass together (Switch Transformer,
    arXiv 2101.03961, Eq. 4-6), here this rank's; with ``counts_LE``, :func:`layer_counts` of the same pass all-reduced, the
    whole gang's: then the mean of all ranks' losses is the loss of the global batch, whatever the number of ranks
    (arXiv 2501.11873). Sigmoid routers: DeepSeek-V3's complementary loss (arXiv 2412.19437, Eq. 17-20), sequence by
    sequence and then the mean, with normalised sigmoids as probabilities, and loads of the top-k of the scores themselves:
    bias, groups and other sequences play no part. ``num_sequences`` is B of the forward pass; T is B*S.
    """
    loads = {} if counts_LE is None else dict(zip(sorted({r.layer for r in readings}), counts_LE, strict=True))
    losses = [
        _sequence_loss(r, num_sequences) if r.kind == "sigmoid" else _batch_loss(r, loads.get(r.layer))
        for r in readings
    ]
    return torch.stack(losses).mean()


def _batch_loss(reading: RouterReading, counts_E: torch.Tensor | None) -> torch.Tensor:
    num_experts = reading.logits.shape[1]
    if counts_E is None:
        counts_E = _count(reading.chosen.flatten(), num_experts)
    return num_experts * (counts_E / counts_E.sum() * reading.affinities().mean(dim=0)).sum()


def _sequence_loss(reading: RouterReading, num_sequences: int) -> torch.Tensor:
    top_k, num_experts = reading.chosen.shape[1], reading.logits.shape[1]
    affinity_BSE = reading.affinities().view(num_sequences, -1, num_experts)
    best_BSK = affinity_BSE.detach().topk(top_k, dim=-1).indices
    load_BE = _count(best_BSK.flatten(1), num_experts) / (affinity_BSE.shape[1] * top_k)
    return num_experts * (load_BE * affinity_BSE.mean(dim=1)).sum(dim=-1).mean()


def _count(chosen: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert is in the last dimension of ``chosen``: ``[..., N]`` to float32 ``[..., E]``."""
    # Sums of ones: exact in any order, and without the wait for the device that bincount needs.
    zeros = torch.zeros(*chosen.shape[:-1], num_experts, device=chosen.device)
    return zeros.scatter_add_(-1, chosen, torch.ones(chosen.shape, device=chosen.device))


def router_metrics(counts_LE: torch.Tensor, layers: Sequence[int] | None = None) -> dict[str, float]:
    """Health of each layer from its global counts ``[L, E]``; ``layers`` are their numbers, 0 to L-1 if not given.

    ``load_max_ratio``: busiest expert over the mean (1 is balanced); ``load_entropy``: entropy of the
    load over its largest value (1 is balanced, 0 collapsed); ``dead_experts``: experts with less than
    1 % of an even share.
    """
    metrics = {}
    for layer, counts_E in zip(range(len(counts_LE)) if layers is None else layers, counts_LE, strict=True):
        load_E = counts_E / counts_E.sum()
        even = 1.0 / len(load_E)
        entropy = -(load_E * load_E.clamp_min(1e-12).log()).sum() / torch.log(torch.tensor(float(len(load_E))))
        metrics[f"router/layer_{layer}/load_max_ratio"] = float(load_E.max() / even)
        metrics[f"router/layer_{layer}/load_entropy"] = float(entropy)
        metrics[f"router/layer_{layer}/dead_experts"] = float((load_E < 0.01 * even).sum())
    return metrics
