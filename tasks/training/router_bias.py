"""Load balancing without a loss: the update of DeepSeek-V3's router bias.

A bias per expert is added to its score when experts are chosen, not when their outputs are weighted. After each step
the bias of an expert that got more tokens than the mean goes down by a fixed amount, of one that got fewer up
(arXiv 2408.15664, Algorithm 1; arXiv 2412.19437, section 2.1.2). No gradient, no optimizer state.

Legend: E experts, L layers with experts.
"""

from __future__ import annotations

import torch

from tasks.models.routers import correction_biases


def updated_bias(bias_E: torch.Tensor, counts_E: torch.Tensor, speed: float) -> torch.Tensor:
    """``bias + speed * sign(mean(counts) - counts)``, float32 ``[E]``, computed in float32.

    ``counts_E`` are tokens per expert of one step over the whole gang. An expert at the mean exactly keeps its bias.
    """
    counts_E = counts_E.float()
    return bias_E.float() + speed * (counts_E.mean() - counts_E).sign()


@torch.no_grad()
def update_router_biases(network: torch.nn.Module, counts_LE: torch.Tensor, speed: float) -> None:
    """Move the correction bias of each layer of ``network`` in place, once a step, after the optimizer.

    ``counts_LE`` holds the tokens per expert of the layers with experts, ascending, summed over all micro-batches and all
    ranks (:func:`tasks.training.router_health.layer_counts`, then all-reduced), so that every rank computes the same bias.
    ``speed`` 0 changes nothing. Raises :class:`ValueError` if the counts are not those of the network's routers.
    """
    if not speed:
        return
    biases = list(correction_biases(network).values())
    expected = (len(biases), biases[0].shape[0]) if biases else (0, 0)
    if not biases or tuple(counts_LE.shape) != expected:
        raise ValueError(f"counts of shape {list(counts_LE.shape)} for router biases of shape {list(expected)}")
    for bias_E, counts_E in zip(biases, counts_LE.to(biases[0].device), strict=True):
        bias_E.copy_(updated_bias(bias_E, counts_E, speed))
