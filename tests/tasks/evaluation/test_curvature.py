"""Second order around a merge: exact on a quadratic bowl, and on a small network against differences of its gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.evaluation.curvature import (
    LossSurface,
    Vector,
    average,
    contour,
    cross_ratio,
    cross_terms,
    dot,
    is_average_better,
    merge_gain,
    minus,
    principal_direction,
)

SIZE = 5


class Bowl(LossSurface):
    """Half x'Hx in place of a network's loss."""

    def __init__(self, hessian: torch.Tensor) -> None:
        network = torch.nn.Module()
        network.register_parameter("x", torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64)))
        super().__init__(network, torch.zeros((1, 2), dtype=torch.int64))
        self._hessian = hessian

    def _part(self, _rows: torch.Tensor) -> torch.Tensor:
        x = self._parameters["x"]
        return x @ self._hessian @ x / 2


def draw(seed: int, count: int) -> tuple[Bowl, list[Vector]]:
    """A positive definite bowl and points in it."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn((SIZE, SIZE), dtype=torch.float64, generator=generator)
    hessian = root @ root.T + 0.1 * torch.eye(SIZE, dtype=torch.float64)
    return Bowl(hessian), [{"x": torch.randn(SIZE, dtype=torch.float64, generator=generator)} for _ in range(count)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8))
def test_gain_in_a_bowl_is_half_the_trace_of_hessian_times_covariance(seed: int, count: int) -> None:
    bowl, points = draw(seed, count)
    gain = merge_gain(bowl, points)
    rows = torch.stack([point["x"] for point in points])
    by_hand = 0.5 * torch.trace(bowl._hessian @ torch.cov(rows.T, correction=0).reshape(SIZE, SIZE))
    assert gain.predicted == pytest.approx(float(by_hand), rel=1e-9)
    assert gain.measured == pytest.approx(gain.predicted, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8))
def test_equation_15_always_holds_where_the_hessian_is_positive(seed: int, count: int) -> None:
    bowl, points = draw(seed, count)
    table = cross_terms(bowl, points, {"x": torch.zeros(SIZE, dtype=torch.float64)})
    assert is_average_better(table) and cross_ratio(table) < 1
    mean_loss = sum(table[i][i] for i in range(count)) / 2 / count
    assert bowl.loss(average(points)) == pytest.approx(sum(map(sum, table)) / 2 / count**2)
    assert bowl.loss(average(points)) < mean_loss


def test_equation_15_fails_on_a_saddle() -> None:
    bowl = Bowl(-torch.eye(SIZE, dtype=torch.float64))
    points = [{"x": torch.eye(SIZE, dtype=torch.float64)[i]} for i in range(3)]
    assert not is_average_better(cross_terms(bowl, points, {"x": torch.zeros(SIZE, dtype=torch.float64)}))


class Network(torch.nn.Module):
    """Next-token logits of a byte by an embedding, attention and a projection, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = torch.nn.Embedding(11, 8, dtype=torch.float64)
        self.head = torch.nn.Linear(8, 11, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Network:
        assert not use_cache
        x = self.embedding(input_ids).unsqueeze(1)
        mixed = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1)
        self.logits = self.head(torch.tanh(mixed))
        return self


def test_hessian_of_a_network_is_the_difference_of_its_gradients() -> None:
    network = Network()
    tokens = torch.randint(0, 11, (19, 6), generator=torch.Generator().manual_seed(0))
    surface = LossSurface(network, tokens)
    point = {name: p.detach().clone() for name, p in network.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in point.items()}

    def gradient(shift: float) -> Vector:
        surface.place({name: point[name] + shift * direction[name] for name in point})
        network.zero_grad()
        logits = network(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    step = 1e-3
    by_differences = {name: value / (2 * step) for name, value in minus(gradient(step), gradient(-step)).items()}
    surface.place(point)
    found = surface.hessian_times(direction)
    error = minus(found, by_differences)
    assert dot(error, error) < 1e-5 * dot(found, found)


def test_loss_is_the_mean_over_all_tokens_whatever_the_chunks() -> None:
    network, tokens = Network(), torch.randint(0, 11, (19, 6), generator=torch.Generator().manual_seed(0))
    point = {name: p.detach().clone() for name, p in network.named_parameters()}
    logits = network(input_ids=tokens[:, :-1], use_cache=False).logits
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert LossSurface(network, tokens).loss(point) == pytest.approx(whole.item(), abs=1e-6)


def test_principal_direction_is_one_standard_deviation_long() -> None:
    deviations = [
        torch.tensor([[2.0, 0.0]]),
        torch.tensor([[-2.0, 0.0]]),
        torch.tensor([[0.0, 0.5]]),
        torch.tensor([[0.0, -0.5]]),
    ]
    axis = principal_direction(deviations)
    assert axis.abs().flatten().tolist() == pytest.approx([2**0.5, 0.0], abs=1e-6)


def test_contour_has_the_snapshots_where_they_are_and_their_average_at_the_origin() -> None:
    generator = torch.Generator().manual_seed(1)

    class Flat(LossSurface):
        def loss(self, point: Vector) -> float:  # type: ignore[override]
            return float((point["a"] ** 2).sum() + (point["b"] ** 2).sum())

    surface = Flat(torch.nn.Linear(2, 2), torch.zeros((1, 2), dtype=torch.int64))
    points = [{name: torch.randn(2, 3, generator=generator) for name in "ab"} for _ in range(4)]
    found = contour(surface, points, ("a", "b"), 7)
    assert [len(ticks) for ticks in found.ticks] == [7, 7] and len(found.losses) == 7
    for k in (0, 1):
        along = [place[k] for place in found.places]
        assert sum(along) == pytest.approx(0, abs=1e-5)
        assert sum(value**2 for value in along) / len(along) == pytest.approx(1, abs=1e-4)
        assert found.ticks[k][0] < min(along) and max(along) < found.ticks[k][-1]
    centre = average(points)
    axis_a, axis_b = (principal_direction([p[name] - centre[name] for p in points]) for name in "ab")
    corner = {"a": centre["a"] + found.ticks[0][0] * axis_a, "b": centre["b"] + found.ticks[1][2] * axis_b}
    assert found.losses[2][0] == pytest.approx(surface.loss(corner), rel=1e-5)
