"""Initial weights unit by unit, so that no rank ever holds the whole network.

A network built on the meta device has shapes and no memory. Here each unit (the embedding, a layer, the head) gets
memory and initial weights in turn, in the order in which transformers would have drawn them, and may be cut to this
rank's part before the next unit is drawn. The values are those of a network built whole from the same seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from configs.schema import Config
from tasks.models.build import build_model


def build_on_meta(config: Config) -> PreTrainedModel:
    """The network of ``config`` without memory."""
    with torch.device("meta"):
        return build_model(config.model, config.training.sequence_length)


def materialise(network: PreTrainedModel, *, seed: int, device: torch.device, cut: Callable[[nn.Module], None]) -> None:
    """Give ``network`` memory on ``device`` and the initial weights of ``seed``.

    ``cut`` is called with each layer once it is drawn and moved. Weights are drawn on the CPU in float32, so that they
    do not depend on the device.
    """
    torch.manual_seed(seed)
    layers = set(network.model.layers)
    # The inner model is constructed and initialised before the head is constructed.
    for part in network.children():
        _draw_as_constructors_do(part)
        for module in list(_children_first(part)):
            _draw(network, module, device)
            if module in layers:
                cut(module)
    network.tie_weights()


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """The order in which transformers draws initial weights."""
    for child in module.children():
        yield from _children_first(child)
    yield module


def _draw_as_constructors_do(network: nn.Module) -> None:
    """Advance the generator past what torch's own layers draw when they are constructed, one layer in memory at a time."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            copy.deepcopy(module).to_empty(device="cpu").reset_parameters()


def _draw(network: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """Initialise what ``module`` itself holds, then move it to ``device``."""
    own = [*module._parameters.items(), *module._buffers.items()]
    for name, tensor in own:
        if tensor is not None and tensor.is_meta:
            _place(module, name, torch.empty_like(tensor, device="cpu"))
    network._initialize_weights(module)
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and tensor.device != device:
            _place(module, name, tensor.detach().to(device))


def _place(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor)
    else:
        module._buffers[name] = tensor
