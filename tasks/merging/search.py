"""Choose merge weights by held-out loss: the greedy soup, and a search on the simplex. No I/O.

Both see a loss function of a weight vector that gives a tuning loss and a loss on text of its own, which
chooses nothing and is only reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.merging.methods import build_weights


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Held-out loss of one weight vector, nats per token."""

    tuning: float
    """On the text that chooses."""
    hold_out: float
    """On text that chooses nothing."""


Weights = tuple[float, ...]
Measure = Callable[[Weights], Loss]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Chosen weights and how they were found."""

    weights: Weights
    """One per input, summing to 1."""
    trace: dict[str, Any]
    """For the manifest: every trial, the chosen loss, and the simple average's beside it."""


def greedy(count: int, measure: Measure) -> Found:
    """The greedy soup (Wortsman et al., arXiv 2203.05482).

    The best single input first; then each next one is kept if the uniform average with it has no higher tuning loss.
    """
    trials = []
    singles = [measure(_uniform([index], count)) for index in range(count)]
    order = sorted(range(count), key=lambda index: (singles[index].tuning, -index))
    members, best = [order[0]], singles[order[0]]
    for index in order[1:]:
        loss = measure(_uniform([*members, index], count))
        kept = loss.tuning <= best.tuning
        trials.append({"added": index, "tuning": loss.tuning, "hold_out": loss.hold_out, "kept": kept})
        if kept:
            members, best = [*members, index], loss
    return Found(
        weights=_uniform(members, count),
        trace={
            "singles": [loss.tuning for loss in singles],
            "trials": trials,
            **_comparison(best, measure(build_weights("sma", count))),
        },
    )


def search(count: int, measure: Measure, *, max_trials: int) -> Found:
    """Weights on the simplex with the least tuning loss that SciPy's COBYQA finds in ``max_trials`` measurements.

    The weights are the softmax of ``count`` - 1 numbers and a zero; the search starts at the simple average.
    """
    from scipy.optimize import minimize

    trials: list[tuple[Weights, Loss]] = []

    def objective(point: Sequence[float]) -> float:
        weights = softmax([*point, 0.0])
        trials.append((weights, measure(weights)))
        return trials[-1][1].tuning

    average = measure(build_weights("sma", count))
    if count > 1:
        minimize(
            objective,
            [0.0] * (count - 1),
            method="COBYQA",
            bounds=[(-6.0, 6.0)] * (count - 1),
            options={"maxfev": max_trials, "initial_tr_radius": 0.7, "final_tr_radius": 1e-2},
        )
    weights, best = min(trials, key=lambda trial: trial[1].tuning, default=(build_weights("sma", count), average))
    if average.tuning <= best.tuning:
        weights, best = build_weights("sma", count), average
    history = [{"weights": list(w), "tuning": loss.tuning, "hold_out": loss.hold_out} for w, loss in trials]
    return Found(weights=weights, trace={"trials": history, **_comparison(best, average)})


def softmax(values: Sequence[float]) -> Weights:
    """Positive weights summing to 1."""
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    total = math.fsum(powers)
    return tuple(power / total for power in powers)


def _uniform(members: Sequence[int], count: int) -> Weights:
    return tuple(1.0 / len(members) if index in members else 0.0 for index in range(count))


def _comparison(best: Loss, average: Loss) -> dict[str, float]:
    return {
        "tuning_loss": best.tuning,
        "hold_out_loss": best.hold_out,
        "sma_tuning_loss": average.tuning,
        "sma_hold_out_loss": average.hold_out,
    }
