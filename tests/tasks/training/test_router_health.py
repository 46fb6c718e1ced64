"""Router health per layer, against a slow oracle; a collapsed layer must show."""

from __future__ import annotations

import math

import pytest
import torch

from tasks.training.router_health import expert_counts, load_balance_loss, router_metrics

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


# Counts


@pytest.mark.parametrize("top_k", [1, 2, 3, E])
def test_expert_counts_equal_the_oracle(top_k: int) -> None:
    logits = random_logits(1)
    counts = expert_counts(logits, top_k)
    assert counts.dtype == torch.float32
    assert counts.tolist() == oracle_counts(logits, top_k)
    assert counts.sum() == T * top_k


def test_expert_counts_unused_experts_are_zero_not_missing() -> None:
    assert expert_counts(collapsed_on(0), 1).tolist() == [T] + [0] * (E - 1)


# The loss


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balance_loss_equals_the_oracle(top_k: int) -> None:
    layers = [random_logits(seed, scale) for seed, scale in ((1, 0.1), (2, 1.0), (3, 5.0))]
    assert float(load_balance_loss(layers, top_k)) == pytest.approx(oracle_loss(layers, top_k), rel=TOLERANCE)


def test_load_balance_loss_balanced_layer_is_one() -> None:
    assert float(load_balance_loss([balanced()], K)) == pytest.approx(1.0, rel=TOLERANCE)


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balance_loss_collapsed_layer_is_experts_over_top_k(top_k: int) -> None:
    # All probability on one expert, which takes one of K assignments.
    assert float(load_balance_loss([collapsed_on(3)], top_k)) == pytest.approx(E / top_k, rel=TOLERANCE)


def test_load_balance_loss_layers_collapsed_on_different_experts_show() -> None:
    # Pooled over layers, as transformers does it, these eight layers look perfectly balanced.
    layers = [collapsed_on(expert) for expert in range(E)]
    assert oracle_loss([torch.cat(layers)], 1) == pytest.approx(1.0, rel=TOLERANCE)
    assert float(load_balance_loss(layers, 1)) == pytest.approx(E, rel=TOLERANCE)


def test_load_balance_loss_one_collapsed_layer_of_two_shows() -> None:
    assert (
        float(load_balance_loss([balanced(), collapsed_on(0)], 1)) > float(load_balance_loss([balanced()] * 2, 1)) + 1
    )


def test_load_balance_loss_gradient_pushes_away_from_the_busy_expert() -> None:
    logits = collapsed_on(3, strength=2.0).requires_grad_()
    load_balance_loss([logits], 1).backward()
    assert logits.grad is not None
    descent_E = -logits.grad.sum(dim=0)
    assert descent_E[3] < 0
    assert (descent_E[[0, 1, 2, 4, 5, 6, 7]] > 0).all()


def test_load_balance_loss_low_precision_logits_are_summed_in_float32() -> None:
    logits = random_logits(4)
    loss = load_balance_loss([logits.bfloat16()], K)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(oracle_loss([logits.bfloat16()], K), rel=TOLERANCE)


# Metrics


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


@pytest.mark.parametrize(("count", "dead"), [(0, 1), (9, 1), (11, 0)])
def test_router_metrics_dead_below_one_percent_of_an_even_share(count: int, dead: int) -> None:
    # 4 experts and 4,000 assignments: an even share is 1,000, a hundredth of it 10.
    counts = [count, 1330, 1330, 1340 - count]
    assert sum(counts) == 4000
    assert metrics_of(counts)["router/layer_0/dead_experts"] == dead


def test_router_metrics_values_are_plain_floats() -> None:
    assert {type(value) for value in metrics_of([1, 2]).values()} == {float}
