"""Readings of routers against each family's own rules, computed again here from hidden states and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from configs.model import ModelConfig
from tasks.models.routers import RouterReading, correction_biases, find_routers, watch_routers
from tests.tasks.models.families import FAMILIES, MIXTURES, SEQUENCE_LENGTH, build_trained_like, random_tokens

TOLERANCE = 1e-6
"""float32 sums of 32 products around 0.1, in another order."""
SEQUENCES = 2
T, E, K = SEQUENCES * SEQUENCE_LENGTH, 6, 2


@pytest.fixture(params=list(MIXTURES))
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return MIXTURES[request.param]


@pytest.fixture
def network(model: ModelConfig) -> PreTrainedModel:
    return build_trained_like(model, seed=11)


def run(network: torch.nn.Module, model: ModelConfig, seed: int = 0) -> torch.Tensor:
    return network(input_ids=random_tokens(model, sequences=SEQUENCES, seed=seed)).logits


def slow_choice(model: ModelConfig, logits: list[float], bias: list[float]) -> set[int]:
    """The family's rule for one token, in plain Python (DeepSeek-V3: arXiv 2412.19437, Eq. 14-16 and section 2.1.2)."""
    scores = logits
    if model.family == "deepseek_v3":
        scores = [1 / (1 + 2.718281828459045**-x) + b for x, b in zip(logits, bias, strict=True)]
        size = model.num_experts // model.num_expert_groups
        groups = [range(first, first + size) for first in range(0, model.num_experts, size)]
        worth = [sum(sorted(scores[e] for e in group)[-2:]) for group in groups]
        best = sorted(range(len(groups)), key=lambda g: -worth[g])[: model.num_groups_per_token]
        allowed = [expert for g in best for expert in groups[g]]
    else:
        allowed = list(range(model.num_experts))
    return set(sorted(allowed, key=lambda e: -scores[e])[: model.num_experts_per_token])


# What is read


def test_watch_routers_reads_every_layer_with_experts_once(network: PreTrainedModel, model: ModelConfig) -> None:
    watch = watch_routers(network)
    run(network, model)
    readings = watch.take()
    assert [reading.layer for reading in readings] == list(watch.layers) == list(range(model.num_dense_layers, 3))
    assert {(tuple(r.logits.shape), tuple(r.chosen.shape), r.chosen.dtype) for r in readings} == {
        ((T, E), (T, K), torch.int64)
    }
    assert watch.take() == []


def test_watch_routers_logits_and_choice_follow_the_familys_rule(network: PreTrainedModel, model: ModelConfig) -> None:
    inputs: dict[int, torch.Tensor] = {}
    for layer, router in find_routers(network).items():
        router.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0].detach()}))
    watch = watch_routers(network)
    run(network, model)
    biases = correction_biases(network)
    for reading in watch.take():
        weight = network.get_parameter(f"model.layers.{reading.layer}.mlp.gate.weight")
        expected_TE = inputs[reading.layer].reshape(T, -1) @ weight.detach().T
        assert torch.allclose(reading.logits, expected_TE, rtol=0, atol=TOLERANCE)
        bias = biases[reading.layer].tolist() if biases else []
        for logits, chosen in zip(reading.logits.tolist(), reading.chosen.tolist(), strict=True):
            assert set(chosen) == slow_choice(model, logits, bias)


def test_correction_bias_changes_the_choice_and_not_the_logits() -> None:
    model = FAMILIES["deepseek_v3"]
    network = build_trained_like(model, seed=11)
    watch = watch_routers(network)
    run(network, model)
    before = watch.take()[0]
    for bias in correction_biases(network).values():
        bias.copy_(torch.tensor([5.0, 0.0, 5.0, 0.0, 0.0, 0.0]))
    run(network, model)
    after = watch.take()[0]
    assert torch.equal(before.logits, after.logits)
    assert {tuple(sorted(chosen)) for chosen in after.chosen.tolist()} == {(0, 2)}
    assert {tuple(sorted(chosen)) for chosen in before.chosen.tolist()} != {(0, 2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_correction_biases_are_deepseeks_alone_and_float32(family: str) -> None:
    biases = correction_biases(build_trained_like(FAMILIES[family], seed=1))
    assert list(biases) == ([1, 2] if family == "deepseek_v3" else [])
    assert all(bias.dtype == torch.float32 and bias.shape == (E,) for bias in biases.values())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_watch_routers_dense_network_gives_none(family: str) -> None:
    network = build_trained_like(FAMILIES[family], seed=1)
    watch = watch_routers(network)
    run(network, FAMILIES[family])
    assert (watch.layers, watch.take()) == ((), [])


def test_affinities_of_a_token_sum_to_one_and_follow_their_kind() -> None:
    logits_TE = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.bfloat16)
    chosen_TK = torch.tensor([[1]])
    for kind, expected in (("softmax", [0.2595, 0.7054, 0.0351]), ("sigmoid", [0.3705, 0.5412, 0.0883])):
        found = RouterReading(layer=0, kind=kind, logits=logits_TE, chosen=chosen_TK).affinities()
        assert found.dtype == torch.float32
        assert found.tolist()[0] == pytest.approx(expected, abs=1e-3)
        assert float(found.sum()) == pytest.approx(1.0)


# When it is read


def test_take_after_two_forward_passes_gives_both_in_order(network: PreTrainedModel, model: ModelConfig) -> None:
    watch = watch_routers(network)
    run(network, model, seed=1)
    first = watch.take()
    run(network, model, seed=1)
    run(network, model, seed=2)
    both = watch.take()
    assert [reading.layer for reading in both] == [*watch.layers, *watch.layers]
    assert torch.equal(both[0].logits, first[0].logits)
    assert not torch.equal(both[len(watch.layers)].logits, first[0].logits)


def test_remove_takes_no_more_readings(network: PreTrainedModel, model: ModelConfig) -> None:
    watch = watch_routers(network)
    watch.remove()
    run(network, model)
    assert watch.take() == []


@pytest.mark.parametrize("how", ["transformers", "wrapper"])
def test_watch_routers_activation_checkpointing_counts_once_and_keeps_the_gradient(
    network: PreTrainedModel, model: ModelConfig, how: str
) -> None:
    expected = gradients_of_a_router_loss(network, model)
    if how == "transformers":
        network.activation_checkpointing_enable()
        network.train()
    else:
        for number, layer in enumerate(network.model.layers):
            network.model.layers[number] = checkpoint_wrapper(layer)
    runs = count_router_runs(network)
    found = gradients_of_a_router_loss(network, model)
    # The recomputation did happen, and the watch did not see it: the helper asserts one reading a layer.
    assert runs == [2] * len(runs)
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], rtol=1e-5, atol=1e-7), name


def gradients_of_a_router_loss(network: torch.nn.Module, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Gradients of the language model's loss plus a function of all logits of all routers."""
    watch = watch_routers(network)
    logits = run(network, model)
    readings = watch.take()
    routed = torch.stack([reading.affinities().square().mean() for reading in readings]).sum()
    torch.autograd.backward(logits.float().logsumexp(-1).mean() + routed)
    assert [reading.layer for reading in readings] == list(watch.layers)
    assert watch.take() == []
    watch.remove()
    gradients = {
        name.replace("_checkpoint_wrapped_module.", ""): p.grad.clone()
        for name, p in network.named_parameters()
        if p.grad is not None
    }
    assert any(".mlp.gate.weight" in name for name in gradients)
    network.zero_grad()
    return gradients


def count_router_runs(network: torch.nn.Module) -> list[int]:
    routers = find_routers(network)
    runs = [0] * len(routers)

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            runs[index] += 1

        return hook

    for index, router in enumerate(routers.values()):
        router.register_forward_pre_hook(count(index))
    return runs


def test_watch_routers_reentrant_checkpointing_refused(network: PreTrainedModel, model: ModelConfig) -> None:
    for number, layer in enumerate(network.model.layers):
        network.model.layers[number] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.REENTRANT)
    watch_routers(network)
    with pytest.raises(RuntimeError, match=r"router logits of layer \d carry no gradient.*use_reentrant=False"):
        run(network, model)


@pytest.mark.parametrize("frozen", [True, False])
def test_watch_routers_without_gradients_is_no_error(
    network: PreTrainedModel, model: ModelConfig, frozen: bool
) -> None:
    watch = watch_routers(network)
    if frozen:
        network.requires_grad_(False)
        run(network, model)
    else:
        with torch.no_grad():
            run(network, model)
    assert len(watch.take()) == len(watch.layers)


def test_watch_routers_after_a_forward_that_failed_is_closed(network: PreTrainedModel, model: ModelConfig) -> None:
    watch = watch_routers(network)
    with pytest.raises(IndexError):
        network(input_ids=torch.full((1, 4), model.vocab_size))
    network.model(input_ids=random_tokens(model))
    assert watch.take() == []


# Under FSDP2 and compilation


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("before", [True, False])
def test_watch_routers_under_fsdp_reads_the_same(network: PreTrainedModel, model: ModelConfig, before: bool) -> None:
    watch = watch_routers(network)
    expected_logits = run(network, model)
    expected = watch.take()
    if not before:
        watch.remove()
    for layer in network.model.layers:
        fully_shard(layer)
    fully_shard(network)
    if not before:
        watch = watch_routers(network)
    assert torch.equal(run(network, model), expected_logits)
    found = watch.take()
    assert [reading.layer for reading in found] == [reading.layer for reading in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.chosen, theirs.chosen)


@pytest.mark.usefixtures("one_rank")
def test_watch_routers_under_bfloat16_keeps_the_correction_bias_in_float32() -> None:
    model = FAMILIES["deepseek_v3"]
    network = build_trained_like(model, seed=11)
    before = {layer: bias.clone() for layer, bias in correction_biases(network).items()}
    fully_shard(network, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    watch = watch_routers(network)
    torch.autograd.backward(run(network, model).float().logsumexp(-1).mean())
    assert len(watch.take()) == 2
    for layer, bias in correction_biases(network).items():
        assert bias.dtype == torch.float32 and torch.equal(bias, before[layer])


# Dynamo looks at every tensor's .grad and warns itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("what", ["network", "layers"])
def test_watch_routers_compiled_reads_the_same(network: PreTrainedModel, model: ModelConfig, what: str) -> None:
    watch = watch_routers(network)
    expected_logits = run(network, model)
    expected = watch.take()
    torch._dynamo.reset()
    if what == "network":
        network.compile(backend="aot_eager")
    else:
        for layer in network.model.layers:
            layer.compile(backend="aot_eager")
    for _ in range(2):
        logits = run(network, model)
        found = watch.take()
        assert [reading.layer for reading in found] == [reading.layer for reading in expected]
        assert torch.allclose(logits, expected_logits, rtol=0, atol=1e-5)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours.logits, theirs.logits, rtol=0, atol=TOLERANCE)
            assert ours.logits.requires_grad
        torch.autograd.backward(logits.logsumexp(-1).mean() + found[0].affinities().square().mean())
        assert watch.take() == []
