"""Balance of a gang's routers: the same for one rank and two, over micro batches, and left alone where it should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.model import ModelConfig
from tasks.models.disk_layout import model_buffers, model_parameters
from tasks.models.routers import watch_routers
from tasks.training.router_balance import RouterBalance
from tasks.training.router_health import balance_loss, layer_counts
from tests.gloo_ranks import end_ranks, start_ranks
from tests.tasks.models.families import FAMILIES, MIXTURES, build_trained_like, random_tokens

SEQUENCES = 8
COEFFICIENT = 0.5
GRADIENT_TOLERANCE = 1e-6
"""Router gradients are about 1e-3; the mean of two ranks' float32 sums is rounded otherwise than one sum."""
RANK = """
import sys
from safetensors.torch import save_file
from tests.gloo_ranks import gloo_rank
from tests.tasks.training.test_router_balance import one_step
family, folder = sys.argv[4:]
with gloo_rank() as (rank, world_size):
    save_file(one_step(family, rank, world_size), f"{folder}/result-{rank}")
"""


def configured(family: str, **changes: float) -> ModelConfig:
    return replace(FAMILIES[family], router_loss_coefficient=COEFFICIENT, **changes)


def one_step(family: str, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """A step of one rank: gradients of its routers, the counts, and the biases after."""
    model = configured(family)
    network = build_trained_like(model, seed=4)
    balance = RouterBalance(network, model)
    share = SEQUENCES // world_size
    rows = random_tokens(model, sequences=SEQUENCES)[rank * share : (rank + 1) * share]
    network(input_ids=rows)
    balance.loss(num_sequences=share).backward()
    counts = balance.finish_step()
    assert counts is not None
    gradients = {name: p.grad for name, p in model_parameters(network).items() if p.grad is not None}
    routers = {name: gradient for name, gradient in gradients.items() if name.endswith(".gate.weight")}
    return {"counts": counts, **routers, **model_buffers(network)}


def run_ranks(family: str, folder: Path, world_size: int) -> list[dict[str, torch.Tensor]]:
    end_ranks(start_ranks(["-c", RANK], world_size, folder, family, str(folder)))
    return [load_file(folder / f"result-{rank}") for rank in range(world_size)]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_one_rank_and_two_see_the_same_gradients_counts_and_biases(family: str, tmp_path: Path) -> None:
    alone, (first, second) = one_step(family, 0, 1), run_ranks(family, tmp_path, 2)
    assert torch.equal(first["counts"], alone["counts"]) and torch.equal(second["counts"], alone["counts"])
    routers = [name for name in alone if name.endswith(".gate.weight")]
    assert len(routers) == len(alone["counts"])
    for name in routers:
        assert float(alone[name].abs().max()) > 100 * GRADIENT_TOLERANCE
        assert torch.allclose((first[name] + second[name]) / 2, alone[name], rtol=0, atol=GRADIENT_TOLERANCE)
        assert not torch.equal(first[name], second[name])
    biases = [name for name in alone if "correction_bias" in name]
    assert len(biases) == (2 if family == "deepseek_v3" else 0)
    for name in biases:
        assert torch.equal(first[name], alone[name]) and torch.equal(second[name], alone[name])


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("family", MIXTURES)
def test_loss_is_the_coefficient_times_the_balance_loss(family: str) -> None:
    model = configured(family)
    network = build_trained_like(model, seed=4)
    watch, balance = watch_routers(network), RouterBalance(network, model)
    network(input_ids=random_tokens(model, sequences=2))
    expected = COEFFICIENT * balance_loss(watch.take(), num_sequences=2)
    assert torch.equal(balance.loss(num_sequences=2), expected)
    assert balance.layers == watch.layers


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("coefficient", [COEFFICIENT, 0.0])
def test_finish_step_counts_all_micro_batches_and_begins_anew(family: str, coefficient: float) -> None:
    model = replace(configured(family), router_loss_coefficient=coefficient)
    network = build_trained_like(model, seed=4)
    watch, balance = watch_routers(network), RouterBalance(network, model)
    for _ in range(2):
        for seed in (1, 2, 3):
            network(input_ids=random_tokens(model, seed=seed))
            loss = balance.loss(num_sequences=2)
            assert (float(loss.detach()) == 0) is (coefficient == 0)
        expected = layer_counts(watch.take())
        counts = balance.finish_step(is_applied=False)
        assert counts is not None and torch.equal(counts, expected)
    assert balance.finish_step() is None


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("speed", "is_applied", "moved"), [(None, True, 0.001), (0.25, True, 0.25), (0.0, True, 0.0), (0.25, False, 0.0)])  # fmt: skip
def test_finish_step_moves_the_biases_by_the_speed_once(speed: float | None, is_applied: bool, moved: float) -> None:
    model = replace(configured("deepseek_v3"), router_bias_speed=speed)
    network = build_trained_like(model, seed=4)
    before = {name: bias.clone() for name, bias in model_buffers(network).items()}
    balance = RouterBalance(network, model)
    for seed in (1, 2):
        network(input_ids=random_tokens(model, seed=seed))
        balance.loss(num_sequences=2)
    counts = balance.finish_step(is_applied=is_applied)
    assert counts is not None
    for (name, bias), counts_E in zip(model_buffers(network).items(), counts, strict=True):
        direction = [(x < counts_E.mean()).float() - (x > counts_E.mean()).float() for x in counts_E]
        assert torch.equal(bias, before[name] + moved * torch.tensor(direction))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dense_network_needs_no_group_and_has_nothing_to_balance(family: str) -> None:
    model = FAMILIES[family]
    network = build_trained_like(model, seed=4)
    balance = RouterBalance(network, model)
    network(input_ids=random_tokens(model))
    assert (float(balance.loss(num_sequences=2)), balance.finish_step(), balance.layers) == (0.0, None, ())
