"""Router health per layer, against a slow oracle; a collapsed layer must show."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from tasks.models.routers import RouterReading, watch_routers
from tasks.training.router_health import (
    balance_loss,
    layer_counts,
    router_metrics,
)
from tests.tasks.models.families import MIXTURES, SEQUENCE_LENGTH, build_trained_like, random_tokens

T, E, K = 64, 8, 2
TOLERANCE = 1e-5
"""float32 sums of T * E = 512 terms around 1: 512 * 2**-24 is 3e-5 at worst, 1e-6 as random errors add up."""


def random_logits(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(T, E, generator=torch.Generator().manual_seed(seed))


def collapsed_on(expert: int, strength: float = 30.0) -> torch.Tensor:
    """Every token wants ``expert``."""
    logits = torch.zeros(T, E)
    logits[:, expert] = strength
    return logits


def balanced() -> torch.Tensor:
    """Token t wants experts t and t + 1, modulo E; T is a multiple of E."""
    logits = torch.zeros(T, E)
    for token in range(T):
        logits[token, token % E] = 5.0
        logits[token, (token + 1) % E] = 4.0
    return logits


def oracle_counts(logits: torch.Tensor, top_k: int) -> list[int]:
    counts = [0] * logits.shape[1]
    for row in logits.tolist():
        for expert in sorted(range(len(row)), key=lambda e: -row[e])[:top_k]:
            counts[expert] += 1
    return counts


def oracle_loss(layers: list[torch.Tensor], top_k: int) -> float:
    """Switch Transformer, Eq. 4 to 6, layer by layer, in plain Python floats."""
    losses = []
    for logits in layers:
        tokens, experts = logits.shape
        probabilities = [0.0] * experts
        for row in logits.tolist():
            exponentials = [math.exp(x - max(row)) for x in row]
            for expert, value in enumerate(exponentials):
                probabilities[expert] += value / sum(exponentials) / tokens
        loads = [count / (tokens * top_k) for count in oracle_counts(logits, top_k)]
        losses.append(experts * sum(f * p for f, p in zip(loads, probabilities, strict=True)))
    return sum(losses) / len(losses)


def oracle_metrics(counts: list[int]) -> dict[str, float]:
    total = sum(counts)
    loads = [count / total for count in counts]
    return {
        "load_max_ratio": max(loads) * len(loads),
        "load_entropy": -sum(x * math.log(x) for x in loads if x) / math.log(len(loads)),
        "dead_experts": float(sum(x < 0.01 / len(loads) for x in loads)),
    }


def metrics_of(*layers: list[int]) -> dict[str, float]:
    return router_metrics(torch.tensor(layers, dtype=torch.float32))


def reading(
    logits: torch.Tensor, top_k: int, *, layer: int = 0, kind: Literal["softmax", "sigmoid"] = "softmax"
) -> RouterReading:
    return RouterReading(layer=layer, kind=kind, logits=logits, chosen=logits.topk(top_k, dim=-1).indices)


def oracle_sequence_loss(logits: torch.Tensor, top_k: int, num_sequences: int) -> float:
    """DeepSeek-V3 (arXiv 2412.19437), Eq. 17 to 20 with alpha 1, sequence by sequence, in plain Python floats."""
    rows = logits.tolist()
    length, experts = len(rows) // num_sequences, len(rows[0])
    losses = []
    for number in range(num_sequences):
        sequence = [[1 / (1 + math.exp(-x)) for x in row] for row in rows[number * length : (number + 1) * length]]
        loss = 0.0
        for expert in range(experts):
            chosen = sum(expert in sorted(range(experts), key=lambda e: -row[e])[:top_k] for row in sequence)
            f = experts / (top_k * length) * chosen
            p = sum(row[expert] / sum(row) for row in sequence) / length
            loss += f * p
        losses.append(loss)
    return sum(losses) / len(losses)


# Readings


@pytest.mark.parametrize("name", MIXTURES)
def test_layer_counts_of_a_network_are_where_its_tokens_went(name: str) -> None:
    model = MIXTURES[name]
    network = build_trained_like(model, seed=2)
    watch = watch_routers(network)
    chosen: dict[int, list[int]] = {layer: [] for layer in watch.layers}
    for layer in watch.layers:
        # What the experts were called with, seen apart from the watch.
        network.model.layers[layer].mlp.experts.register_forward_pre_hook(
            lambda _, args, layer=layer: chosen[layer].extend(args[1].flatten().tolist())
        )
    for seed in (1, 2):
        network(input_ids=random_tokens(model, sequences=3, seed=seed))
    counts = layer_counts(watch.take())
    assert counts.dtype == torch.float32
    assert counts.tolist() == [[chosen[layer].count(e) for e in range(model.num_experts)] for layer in watch.layers]
    assert counts.sum(dim=1).tolist() == [2 * 3 * SEQUENCE_LENGTH * model.num_experts_per_token] * len(watch.layers)


def test_layer_counts_are_in_the_order_of_layers_and_summed_over_passes() -> None:
    passes = [reading(collapsed_on(4), 1, layer=5), reading(collapsed_on(1), 1, layer=2)] * 2
    counts = layer_counts(passes)
    assert counts[:, [1, 4]].tolist() == [[2 * T, 0], [0, 2 * T]]
    assert counts.sum() == 4 * T


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_softmax_equals_the_oracle_whatever_the_sequences(top_k: int) -> None:
    layers = [random_logits(seed, scale) for seed, scale in ((1, 0.1), (2, 1.0), (3, 5.0))]
    readings = [reading(logits, top_k, layer=number) for number, logits in enumerate(layers)]
    for num_sequences in (1, 4):
        found = float(balance_loss(readings, num_sequences=num_sequences))
        assert found == pytest.approx(oracle_loss(layers, top_k), rel=TOLERANCE)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("num_sequences", [1, 4])
def test_balance_loss_sigmoid_equals_the_oracle_sequence_by_sequence(top_k: int, num_sequences: int) -> None:
    layers = [random_logits(seed, scale) for seed, scale in ((1, 0.1), (2, 1.0), (3, 5.0))]
    readings = [reading(logits, top_k, layer=number, kind="sigmoid") for number, logits in enumerate(layers)]
    expected = sum(oracle_sequence_loss(logits, top_k, num_sequences) for logits in layers) / len(layers)
    assert float(balance_loss(readings, num_sequences=num_sequences)) == pytest.approx(expected, rel=TOLERANCE)


def test_balance_loss_sigmoid_sequences_collapsed_on_different_experts_show() -> None:
    # Over the batch the eight experts share the tokens evenly; within each sequence one has them all.
    logits = torch.full((T, E), -9.0)
    logits[torch.arange(T), torch.arange(T) // (T // E)] = 9.0
    readings = [reading(logits, 1, kind="sigmoid")]
    # exp(-9) of each of the seven others takes 0.1 % off.
    assert float(balance_loss(readings, num_sequences=E)) == pytest.approx(E, rel=2e-3)
    assert float(balance_loss(readings, num_sequences=1)) == pytest.approx(1.0, rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_balance_loss_of_ranks_with_the_gangs_counts_is_that_of_the_whole_batch(
    kind: Literal["softmax", "sigmoid"],
) -> None:
    # Rank 0 of four has a share of its own kind: without the gang's counts the mean of the ranks is another number.
    layers = [torch.cat([random_logits(seed)[:48], collapsed_on(2, 3.0)[:16]]) for seed in (1, 2)]
    whole = [reading(logits.clone().requires_grad_(), K, layer=3 * n, kind=kind) for n, logits in enumerate(layers)]
    shares = [
        [reading(logits[part : part + 16].clone().requires_grad_(), K, layer=3 * n, kind=kind) for n, logits in enumerate(layers)]
        for part in range(0, T, 16)
    ]  # fmt: skip
    counts = torch.stack([layer_counts(share) for share in shares]).sum(dim=0)
    expected = balance_loss(whole, num_sequences=8)
    mean = torch.stack([balance_loss(share, num_sequences=2, counts_LE=counts) for share in shares]).mean()
    assert float(mean.detach()) == pytest.approx(float(expected.detach()), rel=TOLERANCE)
    alone = torch.stack([balance_loss(share, num_sequences=2) for share in shares]).mean()
    assert (abs(float((alone - expected).detach())) > 1e-3) is (kind == "softmax")
    torch.autograd.backward([expected, mean])
    for layer in range(len(layers)):
        found = torch.cat([share[layer].logits.grad for share in shares])
        assert torch.allclose(found, whole[layer].logits.grad, rtol=1e-4, atol=1e-9)


def test_balance_loss_counts_of_other_layers_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        balance_loss([reading(random_logits(1), K)], num_sequences=1, counts_LE=torch.ones(2, E))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_balance_loss_layers_collapsed_on_different_experts_show(kind: Literal["softmax", "sigmoid"]) -> None:
    readings = [reading(collapsed_on(expert) - 15, 1, layer=expert, kind=kind) for expert in range(E)]
    assert float(balance_loss(readings, num_sequences=2)) == pytest.approx(E, rel=TOLERANCE)


def test_balance_loss_sigmoid_loads_ignore_bias_and_groups() -> None:
    logits = random_logits(3)
    elsewhere = RouterReading(layer=0, kind="sigmoid", logits=logits, chosen=torch.zeros(T, K, dtype=torch.int64))
    expected = balance_loss([reading(logits, K, kind="sigmoid")], num_sequences=2)
    assert torch.equal(balance_loss([elsewhere], num_sequences=2), expected)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_balance_loss_gradient_pushes_away_from_the_busy_expert(kind: Literal["softmax", "sigmoid"]) -> None:
    logits = collapsed_on(3, strength=2.0).requires_grad_()
    balance_loss([reading(logits, 1, kind=kind)], num_sequences=2).backward()
    assert logits.grad is not None
    descent_E = -logits.grad.sum(dim=0)
    assert descent_E[3] < 0
    assert (descent_E[[0, 1, 2, 4, 5, 6, 7]] > 0).all()


@pytest.mark.parametrize("name", MIXTURES)
def test_balance_loss_of_a_network_descends_to_balance(name: str) -> None:
    # The loss does what it is for in every family: trained alone, it spreads a batch's tokens.
    model = MIXTURES[name]
    network = build_trained_like(model, seed=2)
    routers = [p for key, p in network.named_parameters() if key.endswith(".mlp.gate.weight")]
    with torch.no_grad():
        for weight_ED in routers:
            weight_ED[0] += 0.2 * network.model.embed_tokens.weight.mean(dim=0).sign()
    optimizer = torch.optim.SGD(routers, lr=0.3)
    watch, tokens = watch_routers(network), random_tokens(model, sequences=4)
    losses = []
    for _ in range(30):
        network(input_ids=tokens)
        loss = balance_loss(watch.take(), num_sequences=4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert losses[-1] - 1 < 0.7 * (losses[0] - 1)


def test_balance_loss_low_precision_logits_are_summed_in_float32() -> None:
    logits = random_logits(4).bfloat16()
    loss = balance_loss([reading(logits, K)], num_sequences=1)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(oracle_loss([logits], K), rel=TOLERANCE)


@pytest.mark.parametrize("counts", [[5, 3, 2, 6], [1, 1, 1, 97], [10, 0, 0, 0], [1000, 1, 999, 2]])
def test_router_metrics_equal_the_oracle(counts: list[int]) -> None:
    expected = {f"router/layer_0/{name}": value for name, value in oracle_metrics(counts).items()}
    assert metrics_of(counts) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_router_metrics_balanced_layer_is_one_and_none_dead() -> None:
    assert metrics_of([7, 7, 7, 7]) == pytest.approx(
        {"router/layer_0/load_max_ratio": 1.0, "router/layer_0/load_entropy": 1.0, "router/layer_0/dead_experts": 0.0}
    )


def test_router_metrics_collapsed_layer_shows_beside_a_balanced_one() -> None:
    metrics = metrics_of([8, 8, 8, 8], [32, 0, 0, 0])
    assert metrics["router/layer_0/load_entropy"] == pytest.approx(1.0)
    assert metrics["router/layer_1/load_entropy"] == pytest.approx(0.0, abs=TOLERANCE)
    assert metrics["router/layer_1/load_max_ratio"] == pytest.approx(4.0)
    assert metrics["router/layer_1/dead_experts"] == 3


def test_router_metrics_are_named_by_the_layers_given() -> None:
    metrics = router_metrics(torch.tensor([[1.0, 1.0], [2.0, 0.0]]), layers=(3, 7))
    assert metrics["router/layer_3/dead_experts"] == 0
    assert metrics["router/layer_7/dead_experts"] == 1
    assert len(metrics) == 6


@pytest.mark.parametrize(("count", "dead"), [(0, 1), (9, 1), (11, 0)])
def test_router_metrics_dead_below_one_percent_of_an_even_share(count: int, dead: int) -> None:
    # 4 experts and 4,000 assignments: an even share is 1,000, a hundredth of it 10.
    counts = [count, 1330, 1330, 1340 - count]
    assert sum(counts) == 4000
    assert metrics_of(counts)["router/layer_0/dead_experts"] == dead


def test_router_metrics_values_are_plain_floats() -> None:
    assert {type(value) for value in metrics_of([1, 2]).values()} == {float}
