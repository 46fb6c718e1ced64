"""Router health per layer, and the load-balance loss per layer.

transformers' own auxiliary loss pools all layers before it multiplies load and probability: layers
that each collapsed on a different expert score as perfectly balanced. Both numbers here are per
layer.

Legend: T tokens, E experts, K top-k, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def expert_counts(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Tokens routed to each expert, float32 ``[E]``, from logits ``[T, E]``."""
    chosen_TK = router_logits.topk(top_k, dim=-1).indices
    return torch.bincount(chosen_TK.flatten(), minlength=router_logits.shape[-1]).float()


def load_balance_loss(router_logits: Sequence[torch.Tensor], top_k: int) -> torch.Tensor:
    """Mean over layers of E * sum_e load_e * probability_e (Switch Transformer, arXiv 2101.03961, Eq. 4-6).

    ``router_logits`` holds ``[T, E]`` per layer. Loads are shares of the K*T assignments, so a
    balanced layer scores 1 and a collapsed one up to E. Differentiable through the probabilities.
    """
    losses = []
    for logits_TE in router_logits:
        load_E = expert_counts(logits_TE.detach(), top_k) / (logits_TE.shape[0] * top_k)
        probability_E = logits_TE.float().softmax(dim=-1).mean(dim=0)
        losses.append(logits_TE.shape[-1] * (load_E * probability_E).sum())
    return torch.stack(losses).mean()


def router_metrics(counts_LE: torch.Tensor) -> dict[str, float]:
    """Health of each layer from its global counts ``[L, E]``.

    ``load_max_ratio``: busiest expert over the mean (1 is balanced); ``load_entropy``: entropy of the
    load over its largest value (1 is balanced, 0 collapsed); ``dead_experts``: experts with less than
    1 % of an even share.
    """
    metrics = {}
    for layer, counts_E in enumerate(counts_LE):
        load_E = counts_E / counts_E.sum()
        even = 1.0 / len(load_E)
        entropy = -(load_E * load_E.clamp_min(1e-12).log()).sum() / torch.log(torch.tensor(float(len(load_E))))
        metrics[f"router/layer_{layer}/load_max_ratio"] = float(load_E.max() / even)
        metrics[f"router/layer_{layer}/load_entropy"] = float(entropy)
        metrics[f"router/layer_{layer}/dead_experts"] = float((load_E < 0.01 * even).sum())
    return metrics
