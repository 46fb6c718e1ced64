"""The loss around a merge to second order: what averaging gains by the Hessian, and a plane through the snapshots.

The gain of averaging theta_1..theta_k over their mean loss is, to second order around their average, half the trace of
H Cov(theta), with the population covariance; the linear term vanishes there. Around an optimum theta*, with
delta_i = theta_i - theta*, the average is better than the mean loss exactly if
sum_{i != j} delta_i' H delta_j < (k - 1) sum_i delta_i' H delta_i (arXiv 2505.12082, Eq. 15).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Vector = dict[str, torch.Tensor]
"""A point, or a direction, by parameter name."""
CHUNK = 8
"""Sequences of one forward and backward pass."""


@dataclass(frozen=True, kw_only=True)
class MergeGain:
    """What averaging gained on a text, and what the Hessian says it should have."""

    losses: tuple[float, ...]
    """Of each snapshot, nats per token."""
    merged_loss: float
    """Of their average."""
    predicted: float
    """Half the trace of H Cov, nats per token."""

    @property
    def measured(self) -> float:
        """Mean loss of the snapshots less that of their average."""
        return sum(self.losses) / len(self.losses) - self.merged_loss


@dataclass(frozen=True, kw_only=True)
class Contour:
    """Loss in the plane of two tensors of a layer."""

    names: tuple[str, str]
    """The tensors."""
    ticks: tuple[tuple[float, ...], tuple[float, ...]]
    """Of both axes, in standard deviations of the snapshots along them."""
    losses: tuple[tuple[float, ...], ...]
    """Nats per token, ``[second axis][first axis]``."""
    places: tuple[tuple[float, float], ...]
    """Of the snapshots; their average is at the origin."""


class LossSurface:
    """Mean cross-entropy of ``network`` on ``tokens_BS1 [sequences, S + 1]``, as a function of its parameters."""

    def __init__(self, network: torch.nn.Module, tokens_BS1: torch.Tensor) -> None:
        self._network, self._tokens = network.eval(), tokens_BS1
        self._parameters = {name: p for name, p in network.named_parameters() if p.is_floating_point()}

    def place(self, point: Mapping[str, torch.Tensor]) -> None:
        """Set the parameters."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(point[name])

    def loss(self, point: Mapping[str, torch.Tensor]) -> float:
        """Nats per token at ``point``."""
        self.place(point)
        with torch.no_grad():
            return float(sum(float(self._part(rows)) for rows in torch.split(self._tokens, CHUNK)))

    def hessian_times(self, direction: Mapping[str, torch.Tensor]) -> Vector:
        """The Hessian where the network stands, times ``direction``: two backward passes a chunk, no approximation.

        Routers choose their experts as they do there: what a step does to the choice itself is not in any derivative.
        """
        names = list(self._parameters)
        total = {name: torch.zeros_like(self._parameters[name]) for name in names}
        # The fused attention kernels have no second derivative.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for rows in torch.split(self._tokens, CHUNK):
                wanted = [self._parameters[name] for name in names]
                first = torch.autograd.grad(self._part(rows), wanted, create_graph=True, allow_unused=True)
                products = [(g * direction[n]).sum() for n, g in zip(names, first, strict=True) if g is not None]
                along = torch.stack(products).sum()
                second = torch.autograd.grad(along, wanted, allow_unused=True)
                for name, value in zip(names, second, strict=True):
                    if value is not None:
                        total[name] += value
        return total

    def _part(self, rows: torch.Tensor) -> torch.Tensor:
        """The part of the mean loss that ``rows`` make."""
        logits_BSV = self._network(input_ids=rows[:, :-1], use_cache=False).logits.float()
        summed = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        return summed / self._tokens[:, 1:].numel()


def average(points: Sequence[Vector]) -> Vector:
    """Their mean, summed in float64."""
    return {
        name: torch.stack([point[name].double() for point in points]).mean(0).to(points[0][name].dtype)
        for name in points[0]
    }


def merge_gain(surface: LossSurface, points: Sequence[Vector]) -> MergeGain:
    """Measure what averaging ``points`` gains, and predict it from the Hessian at their average."""
    centre = average(points)
    losses = tuple(surface.loss(point) for point in points)
    merged = surface.loss(centre)
    curvatures = [dot(delta, surface.hessian_times(delta)) for delta in (minus(point, centre) for point in points)]
    return MergeGain(losses=losses, merged_loss=merged, predicted=sum(curvatures) / len(points) / 2)


def cross_terms(surface: LossSurface, points: Sequence[Vector], optimum: Vector) -> list[list[float]]:
    """delta_i' H delta_j with H and deltas at ``optimum``, ``[k][k]``, made symmetric."""
    surface.place(optimum)
    deltas = [minus(point, optimum) for point in points]
    products = [surface.hessian_times(delta) for delta in deltas]
    table = [[dot(first, second) for second in products] for first in deltas]
    return [[(table[i][j] + table[j][i]) / 2 for j in range(len(points))] for i in range(len(points))]


def is_average_better(table: Sequence[Sequence[float]]) -> bool:
    """Eq. 15 of the cross terms ``table``."""
    return _off_diagonal(table) < (len(table) - 1) * sum(row[i] for i, row in enumerate(table))


def cross_ratio(table: Sequence[Sequence[float]]) -> float:
    """Left side of Eq. 15 by its right side: below 1 the average is better, below 0 the cross terms are negative on balance."""
    return _off_diagonal(table) / ((len(table) - 1) * sum(row[i] for i, row in enumerate(table)))


def contour(surface: LossSurface, points: Sequence[Vector], names: tuple[str, str], count: int) -> Contour:
    """Loss on ``count`` by ``count`` points of the plane of two tensors, everything else as in the average of ``points``.

    Each axis is the first principal direction of the points' deviations within its tensor. The grid covers the points and a
    quarter of their range to every side.
    """
    centre = average(points)
    deviations = [[point[name] - centre[name] for point in points] for name in names]
    axes = [principal_direction(found) for found in deviations]
    along = [
        [float((d * axis).sum() / (axis * axis).sum()) for d in found]
        for found, axis in zip(deviations, axes, strict=True)
    ]
    ticks = [_ticks(min(values), max(values), count) for values in along]
    losses = [
        [
            surface.loss({**centre, names[0]: centre[names[0]] + x * axes[0], names[1]: centre[names[1]] + y * axes[1]})
            for x in ticks[0]
        ]
        for y in ticks[1]
    ]
    return Contour(
        names=names,
        ticks=(ticks[0], ticks[1]),
        losses=tuple(tuple(row) for row in losses),
        places=tuple(zip(*along, strict=True)),
    )


def _ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    margin = 0.25 * (high - low)
    return tuple(torch.linspace(low - margin, high + margin, count).tolist())


def principal_direction(deviations: Sequence[torch.Tensor]) -> torch.Tensor:
    """First principal direction of ``deviations``, its length one standard deviation of theirs along it."""
    rows = torch.stack([d.flatten().double() for d in deviations])
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    scale = values[0] / len(deviations) ** 0.5
    axis: torch.Tensor = directions[0] * scale
    return axis.reshape(deviations[0].shape).to(deviations[0].dtype)


def minus(point: Vector, other: Vector) -> Vector:
    """``point`` less ``other``."""
    return {name: point[name] - other[name] for name in point}


def dot(first: Vector, second: Vector) -> float:
    """Sum of products, in float64."""
    return sum(float((first[name].double() * second[name].double()).sum()) for name in first)


def _off_diagonal(table: Sequence[Sequence[float]]) -> float:
    return sum(value for i, row in enumerate(table) for j, value in enumerate(row) if i != j)
