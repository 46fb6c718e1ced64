"""Keep the routers of a gang balanced while it trains: loss, bias and counts, from one watch on the network.

Legend: B sequences, E experts, L layers with experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from configs.model import ModelConfig
from tasks.models.routers import watch_routers
from tasks.training.router_bias import update_router_biases
from tasks.training.router_health import balance_loss, layer_counts


class RouterBalance:
    """Load-balance loss of each forward pass, router bias after each step, and the step's counts.

    Every rank calls :meth:`loss` once after each forward pass and :meth:`finish_step` once a step, in the same order: both
    are collective over all ranks. On a dense network neither does anything.
    """

    def __init__(self, network: torch.nn.Module, model: ModelConfig) -> None:
        self._network, self._model = network, model
        self._watch = watch_routers(network)
        # Softmax routers share loads over the gang in the loss; sigmoid ones look at each sequence alone.
        self._is_loss_shared = model.family != "deepseek_v3" and model.router_loss_coefficient > 0
        self._counts_LE: torch.Tensor | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have a router, ascending: the rows of the counts."""
        return self._watch.layers

    def loss(self, *, num_sequences: int) -> torch.Tensor:
        """``router_loss_coefficient`` times the load-balance loss of the forward pass just made; a float32 scalar.

        Add it to the language model's loss of the same B ``num_sequences``. The mean over ranks is that of the global
        batch, whatever the number of ranks. Zero, without gradient, if there is no such loss.
        """
        readings = self._watch.take()
        if not readings:
            return torch.zeros(())
        counts_LE = layer_counts(readings)
        if self._is_loss_shared:
            dist.all_reduce(counts_LE)
        self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE
        if not self._model.router_loss_coefficient:
            return torch.zeros((), device=counts_LE.device)
        gang_LE = counts_LE if self._is_loss_shared else None
        return self._model.router_loss_coefficient * balance_loss(
            readings, num_sequences=num_sequences, counts_LE=gang_LE
        )

    def finish_step(self, *, is_applied: bool = True) -> torch.Tensor | None:
        """Tokens per expert of the step over the gang, float32 ``[L, E]``; None for a dense network.

        Moves DeepSeek-V3's router biases, unless the optimizer left the step out (``is_applied`` False): a batch that is
        not trusted with the weights is not with these either. Call it after the optimizer.
        """
        counts_LE, self._counts_LE = self._counts_LE, None
        if counts_LE is None:
            return None
        if not self._is_loss_shared:
            dist.all_reduce(counts_LE)
        if is_applied:
            update_router_biases(self._network, counts_LE, self._model.bias_speed)
        return counts_LE
