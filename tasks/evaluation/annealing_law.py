"""A law of loss under any learning-rate schedule, fitted on a run's own held-out losses (Tissue et al., arXiv 2408.11029).

``L(s) = L0 + A S1(s)^-alpha - C S2(s)``: S1 is the area under the learning rate up to step s, S2 the annealing area, in
which every fall of the learning rate counts from then on with a memory that fades by ``decay`` a step:
``S2(s) = sum over i <= s of m_i, m_i = decay m_(i-1) + (eta_(i-1) - eta_i)``. The rise during warm-up is not counted.

A curve at constant learning rate says nothing about C: it takes a curve whose learning rate falls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.signal import lfilter

DECAYS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
"""Fading of the annealing area's memory a step that are tried; the paper's lie between 0.99 and 0.999."""
MIN_POINTS = 6
HUBER_DELTA = 1e-3
"""Residuals of log losses beyond this count linearly, so that a few odd points do not decide (the paper's choice)."""
_EXPONENTS = (0.2, 0.5, 1.0)


class LawUnknown(Exception):
    """The curves do not hold what the law's parameters need; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """Held-out losses of one way through training, with the learning rates that led there."""

    learning_rates: NDArray[np.float64]
    """Of steps 1 to n, ``[n]``."""
    warmup_steps: int
    """Steps at the beginning whose rise of the learning rate does not count as annealing backwards."""
    steps: tuple[int, ...]
    """Completed steps at which the loss was measured, each from 1 to n."""
    losses: tuple[float, ...]
    """Nats per token at ``steps``."""

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.losses):
            raise ValueError(f"{len(self.steps)} steps, but {len(self.losses)} losses")
        if self.steps and not 1 <= min(self.steps) <= max(self.steps) <= len(self.learning_rates):
            raise ValueError(f"steps must lie from 1 to {len(self.learning_rates)}")


@dataclass(frozen=True, kw_only=True)
class AnnealingLaw:
    """Fitted parameters."""

    floor: float
    """L0, nats per token."""
    scale: float
    """A, in nats times learning rate steps to the power of ``exponent``."""
    exponent: float
    """alpha."""
    annealing: float
    """C, nats per learning rate and step."""
    decay: float
    """Fading of the annealing area's memory a step."""
    error: float
    """Root mean square of the residuals that it was fitted with, nats per token."""

    def loss_at(self, learning_rates: NDArray[np.float64], warmup_steps: int, step: int) -> float:
        """Loss after ``step`` steps at these learning rates, ``[n]`` with n >= step."""
        total, annealed = areas(learning_rates[:step], warmup_steps, self.decay)
        return float(self.floor + self.scale * total[-1] ** -self.exponent - self.annealing * annealed[-1])


def areas(
    learning_rates: NDArray[np.float64], warmup_steps: int, decay: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """S1 and S2 after each step, both ``[n]``, in units of the learning rate times steps."""
    falls = -np.diff(learning_rates, prepend=learning_rates[:1])
    falls[: warmup_steps + 1] = 0.0
    return np.cumsum(learning_rates), np.cumsum(lfilter([1.0], [1.0, -decay], falls))


def fit_law(curves: Sequence[LossCurve]) -> AnnealingLaw:
    """The law that fits all ``curves`` best: Huber loss on log losses, as the paper fits, from several starts.

    Points within warm-up are left out. Raises :class:`LawUnknown` where there are fewer than :data:`MIN_POINTS` others,
    or no point at which the learning rate had fallen.
    """
    kept = [_after_warmup(curve) for curve in curves]
    losses = np.array([loss for curve in kept for loss in curve.losses])
    if len(losses) < MIN_POINTS:
        raise LawUnknown(f"{len(losses)} losses after warm-up are too few for a law of five parameters ({MIN_POINTS})")
    if not np.isfinite(losses).all() or (losses <= 0).any():
        raise LawUnknown("some losses are not finite and positive")
    best: AnnealingLaw | None = None
    for decay in DECAYS:
        points = [_areas_at(curve, decay) for curve in kept]
        total = np.concatenate([s1 for s1, _ in points])
        annealed = np.concatenate([s2 for _, s2 in points])
        if not (annealed > 0).any():
            raise LawUnknown(
                "the learning rate never fell where the loss was measured: what annealing gives is not in these curves"
            )
        law = _fit(losses, total, annealed, decay)
        if best is None or law.error < best.error:
            best = law
    assert best is not None
    return best


def _fit(
    losses: NDArray[np.float64], total: NDArray[np.float64], annealed: NDArray[np.float64], decay: float
) -> AnnealingLaw:
    lowest, width = float(losses.min()), float(np.ptp(losses)) or 1e-3
    reference, largest = float(np.median(total)), float(annealed.max())

    def unpack(x: NDArray[np.float64]) -> tuple[float, float, float, float]:
        # Scaled so that all are near one; positive by construction.
        floor, scale, exponent, annealing = np.exp(np.clip(x, -60.0, 60.0))
        return float(floor), float(scale), float(exponent), float(annealing)

    def predict(x: NDArray[np.float64]) -> NDArray[np.float64]:
        floor, scale, exponent, annealing = unpack(x)
        return floor + scale * (total / reference) ** -exponent - annealing * annealed / largest

    def residuals(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log(np.maximum(predict(x), 1e-9)) - np.log(losses)

    starts = [np.log([0.9 * lowest, width, exponent, 0.05 * lowest]) for exponent in _EXPONENTS]
    fits = [least_squares(residuals, start, loss="huber", f_scale=HUBER_DELTA, max_nfev=2000) for start in starts]
    x = min(fits, key=lambda fit: float(fit.cost)).x
    floor, scale, exponent, annealing = unpack(x)
    return AnnealingLaw(
        floor=floor,
        scale=scale * reference**exponent,
        exponent=exponent,
        annealing=annealing / largest,
        decay=decay,
        error=math.sqrt(float(np.mean((predict(x) - losses) ** 2))),
    )


def _after_warmup(curve: LossCurve) -> LossCurve:
    kept = [(s, loss) for s, loss in zip(curve.steps, curve.losses, strict=True) if s > curve.warmup_steps]
    return LossCurve(
        learning_rates=curve.learning_rates,
        warmup_steps=curve.warmup_steps,
        steps=tuple(s for s, _ in kept),
        losses=tuple(loss for _, loss in kept),
    )


def _areas_at(curve: LossCurve, decay: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    total, annealed = areas(curve.learning_rates, curve.warmup_steps, decay)
    at = np.array(curve.steps, dtype=np.int64) - 1
    return total[at], annealed[at]
