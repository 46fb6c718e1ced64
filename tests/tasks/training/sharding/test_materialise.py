"""Weights drawn layer by layer are those of a network built whole, and no later layer is in memory meanwhile."""

from __future__ import annotations

import pytest
import torch

from tasks.models.build import build_model
from tasks.training.sharding.materialise import build_on_meta, materialise
from tests.sharded_gang import FAMILIES, Case, case_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_drawn_by_layer_are_those_of_a_network_built_whole(family: str, tied: bool) -> None:
    overrides = (f"model.tie_embeddings={str(tied).lower()}",)
    config = case_config(Case(name="", family=family, overrides=overrides), 1)
    whole = build_model(config.model, config.training.sequence_length, seed=7)
    network = build_on_meta(config)
    materialise(network, seed=7, device=CPU, cut=lambda _layer: None)
    expected = dict(whole.named_parameters()) | dict(whole.named_buffers())
    drawn = dict(network.named_parameters()) | dict(network.named_buffers())
    assert drawn.keys() == expected.keys()
    assert all(torch.equal(drawn[name], value) for name, value in expected.items())
    assert (network.lm_head.weight is network.model.embed_tokens.weight) == tied


def test_layers_get_memory_one_after_the_other() -> None:
    network = build_on_meta(case_config(Case(name="", family="qwen3_moe"), 1))
    assert all(parameter.is_meta for parameter in network.parameters())
    in_memory: list[list[bool]] = []

    def cut(layer: torch.nn.Module) -> None:
        assert not any(parameter.is_meta for parameter in layer.parameters())
        in_memory.append([not next(other.parameters()).is_meta for other in network.model.layers])

    materialise(network, seed=1, device=CPU, cut=cut)
    assert in_memory == [[True, False], [True, True]]
