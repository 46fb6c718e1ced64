"""The update of DeepSeek-V3's router bias: against the rule by hand, and against what it is for."""

from __future__ import annotations

import pytest
import torch

from tasks.models.disk_layout import model_buffers
from tasks.models.routers import watch_routers
from tasks.training.router_bias import update_router_biases, updated_bias
from tasks.training.router_health import layer_counts
from tests.tasks.models.families import FAMILIES, build_trained_like, random_tokens

DEEPSEEK = FAMILIES["deepseek_v3"]
E = DEEPSEEK.num_experts


def biases_of(network: torch.nn.Module) -> torch.Tensor:
    return torch.stack([bias.clone() for bias in model_buffers(network).values()])


# One layer


def test_updated_bias_lowers_the_busy_and_raises_the_idle_by_the_speed() -> None:
    # The mean of the counts is 10.
    bias = torch.tensor([0.5, 0.5, -0.25, 0.0])
    found = updated_bias(bias, torch.tensor([30.0, 10.0, 0.0, 0.0]), 0.125)
    assert found.tolist() == [0.375, 0.5, -0.125, 0.125]


def test_updated_bias_depends_on_the_sign_alone() -> None:
    for far in (1.0, 1000.0):
        counts = torch.tensor([1000.0 + far, 1000.0 - far, 1000.0, 1000.0])
        assert updated_bias(torch.zeros(4), counts, 0.5).tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_updated_bias_is_float32_and_leaves_its_inputs_alone() -> None:
    bias, counts = torch.zeros(4, dtype=torch.float64), torch.tensor([4, 0, 1, 1])
    assert updated_bias(bias, counts, 0.5).dtype == torch.float32
    assert (bias.tolist(), counts.tolist()) == ([0.0] * 4, [4, 0, 1, 1])


# The network


def test_update_router_biases_moves_each_layers_own_bias_in_place() -> None:
    network = build_trained_like(DEEPSEEK, seed=1)
    before = biases_of(network)
    pointers = [bias.data_ptr() for bias in model_buffers(network).values()]
    counts = torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 9.0]])
    update_router_biases(network, counts, 0.25)
    step = torch.full((2, E), 0.25)
    step[0, 0] = step[1, 5] = -0.25
    assert torch.equal(biases_of(network), before + step)
    assert [bias.data_ptr() for bias in model_buffers(network).values()] == pointers


def test_update_router_biases_of_half_the_counts_twice_over_the_gang_is_the_same_everywhere() -> None:
    # Ranks that sum their counts first agree to the bit; each on its own counts would drift apart.
    tokens = random_tokens(DEEPSEEK, sequences=8)
    networks = [build_trained_like(DEEPSEEK, seed=1) for _ in range(3)]
    watches = [watch_routers(network) for network in networks]
    parts = [tokens, tokens[:4], tokens[4:]]
    for network, part in zip(networks, parts, strict=True):
        network(input_ids=part)
    whole, first, second = (layer_counts(watch.take()) for watch in watches)
    for network in networks[1:]:
        update_router_biases(network, first + second, 0.01)
    update_router_biases(networks[0], whole, 0.01)
    assert not torch.equal(first, second)
    assert torch.equal(biases_of(networks[0]), biases_of(networks[1]))
    assert torch.equal(biases_of(networks[1]), biases_of(networks[2]))


def test_update_router_biases_balances_a_collapsed_router_without_touching_a_weight() -> None:
    network = build_trained_like(DEEPSEEK, seed=1)
    for bias in model_buffers(network).values():
        bias.copy_(torch.tensor([0.3, 0.3, 0.0, 0.0, 0.0, 0.0]))
    weights = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    watch, tokens = watch_routers(network), random_tokens(DEEPSEEK, sequences=16)
    ratios = []
    for _ in range(60):
        with torch.no_grad():
            network(input_ids=tokens)
        counts = layer_counts(watch.take())
        ratios.append(float((counts.max(dim=1).values / counts.mean(dim=1)).max()))
        update_router_biases(network, counts, 0.01)
    # At first two experts of six have all tokens: three times their share each.
    assert ratios[0] == pytest.approx(3.0)
    assert min(ratios[-10:]) < 1.3
    assert all(torch.equal(parameter, weights[name]) for name, parameter in network.named_parameters())


def test_update_router_biases_speed_zero_changes_nothing_even_without_biases() -> None:
    network = build_trained_like(DEEPSEEK, seed=1)
    before = biases_of(network)
    update_router_biases(network, torch.rand(2, E), 0.0)
    assert torch.equal(biases_of(network), before)
    update_router_biases(build_trained_like(FAMILIES["mixtral"], seed=1), torch.rand(3, E), 0.0)


@pytest.mark.parametrize(
    ("family", "shape"), [("deepseek_v3", (3, E)), ("deepseek_v3", (2, E - 1)), ("mixtral", (3, E))]
)
def test_update_router_biases_counts_of_another_network_refused(family: str, shape: tuple[int, int]) -> None:
    network = build_trained_like(FAMILIES[family], seed=1)
    with pytest.raises(ValueError, match=r"counts of shape"):
        update_router_biases(network, torch.ones(shape), 0.1)
