"""What the routers of a network did in a forward pass, in the same words for every family of mixtures of experts.

transformers reports router logits for some families only, and never what was chosen. A forward hook on each
router sees both: all of them return (logits, weights, chosen experts).

Legend: T tokens, E experts, K top-k, L layers with experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

ROUTER_KINDS: dict[str, Literal["softmax", "sigmoid"]] = {
    "Qwen3MoeTopKRouter": "softmax",
    "OlmoeTopKRouter": "softmax",
    "MixtralTopKRouter": "softmax",
    "DeepseekV3TopkRouter": "sigmoid",
}
"""Router classes of transformers and how they score experts; FSDP's wrapping adds a subclass."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterReading:
    """One layer's router in one forward pass over T tokens."""

    layer: int
    """Number of the layer in the network, from 0; dense layers count."""
    kind: Literal["softmax", "sigmoid"]
    """How logits become scores."""
    logits: torch.Tensor
    """``[T, E]``, in the dtype the router computed in, with gradient. Tokens of a sequence are neighbours."""
    chosen: torch.Tensor
    """``[T, K]`` int64: the experts that the tokens went to, DeepSeek's bias and groups included."""

    def affinities(self) -> torch.Tensor:
        """Score of each expert for each token, float32 ``[T, E]``, differentiable; a token's sum to 1.

        Softmax of the logits, or for sigmoid routers the normalised sigmoids of DeepSeek-V3
        (arXiv 2412.19437, Eq. 19), without the correction bias.
        """
        if self.kind == "softmax":
            return self.logits.float().softmax(dim=-1)
        scores_TE = self.logits.float().sigmoid()
        return scores_TE / scores_TE.sum(dim=-1, keepdim=True)


class RouterWatch:
    """Readings of a network's routers since they were last taken; made by :func:`watch_routers`.

    Only forward passes of the watched network itself count: what activation checkpointing computes again during
    backward does not run through the network's own forward, and leaves no second reading.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        routers = find_routers(network)
        self.layers: tuple[int, ...] = tuple(routers)
        """Layers that have a router, ascending."""
        self._readings: list[RouterReading] = []
        self._inside = False
        self._gradients = False
        self._handles = [
            network.register_forward_pre_hook(self._enter),
            # Also after a forward that raised: the next backward must not find the watch open.
            network.register_forward_hook(self._leave, always_call=True),
            *(router.register_forward_hook(_Note(self, layer, router)) for layer, router in routers.items()),
        ]

    def take(self) -> list[RouterReading]:
        """All readings since the last call, in the order of forward passes and layers; the watch holds none of them after.

        Take them after each forward pass, also where nobody looks at them: they keep its graph alive.
        """
        taken, self._readings = self._readings, []
        return taken

    def remove(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()

    def note(self, reading: RouterReading, *, is_trained: bool) -> None:
        """Keep ``reading`` if the network's own forward is running.

        Raises :class:`RuntimeError` if training lost the gradient on the way, as re-entrant activation checkpointing does.
        """
        if not self._inside:
            return
        if self._gradients and is_trained and not reading.logits.requires_grad:
            raise RuntimeError(
                f"the router logits of layer {reading.layer} carry no gradient, so a load-balance loss would do nothing; "
                "activation checkpointing must be the non-reentrant kind (use_reentrant=False)"
            )
        self._readings.append(reading)

    def _enter(self, *_: Any) -> None:
        self._inside = True
        self._gradients = torch.is_grad_enabled()

    def _leave(self, *_: Any) -> None:
        self._inside = False


class _Note:
    """Forward hook of one router."""

    def __init__(self, watch: RouterWatch, layer: int, router: torch.nn.Module) -> None:
        self._watch, self._layer = watch, layer
        self._kind = _kind_of(router)

    def __call__(self, router: torch.nn.Module, _inputs: Any, output: Any) -> None:
        logits_TE, _, chosen_TK = output
        assert self._kind is not None
        reading = RouterReading(layer=self._layer, kind=self._kind, logits=logits_TE, chosen=chosen_TK)
        self._watch.note(reading, is_trained=any(parameter.requires_grad for parameter in router.parameters()))


def watch_routers(network: torch.nn.Module) -> RouterWatch:
    """Watch every router of ``network``; under FSDP2, activation checkpointing and gradient accumulation alike.

    May be called before or after wrapping. Call ``network`` itself, not a part of it. A dense network has no routers and
    gives no readings.
    """
    return RouterWatch(network)


def find_routers(network: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Layer number to router, ascending; empty for a dense network."""
    found = {}
    for name, module in network.named_modules():
        match = _LAYER.search(name)
        if match and _kind_of(module):
            found[int(match[1])] = module
    return dict(sorted(found.items()))


def correction_biases(network: torch.nn.Module) -> dict[int, torch.Tensor]:
    """Layer number to the correction bias of its router, float32 ``[E]``, the network's own buffer; DeepSeek-V3 only."""
    biases = {}
    for layer, router in find_routers(network).items():
        bias = getattr(router, "e_score_correction_bias", None)
        if isinstance(bias, torch.Tensor):
            biases[layer] = bias
    return biases


def _kind_of(module: torch.nn.Module) -> Literal["softmax", "sigmoid"] | None:
    return next((ROUTER_KINDS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in ROUTER_KINDS), None)
