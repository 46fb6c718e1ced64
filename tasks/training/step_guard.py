"""Guards between the backward pass and the optimizer: refuse an update, or clip it, by what was usual so far.

They are what others do about spikes instead of going back: OLMo-core skips the update, ZClip shrinks it. A guard
sees the global loss and gradient norm alone, computes in float64 and draws nothing at random, so every rank comes to
the same decision without talking to the others. Its state is plain JSON and part of the training state: a resumed
run decides as the uninterrupted one.

Whatever the guard, ``none`` included, an update is refused if its loss or gradient norm is not finite: one NaN in the
gradient makes every weight and moment that it touches NaN for good. Refusing keeps the weights as they were, it cures
nothing: where weights are NaN already every step is refused, and it is for the spike detector, to which a non-finite
value is an alarm at once, to have the run go back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from configs.training import OptimizerConfig

OLMO_MIN_STEPS = 20
"""OLMo-core skips nothing before so many steps are measured, nor before half a window is."""
ZCLIP_EPSILON = 1e-6
"""Added to ZClip's standard deviation, as in its authors' code."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of one update."""

    apply: bool
    """Whether the optimizer steps; if not, weights, moments and the optimizer's own step count stay as they are."""
    max_norm: float | None = None
    """The guard's limit on the global gradient norm; null for none. ``training.max_gradient_norm`` holds besides."""
    reason: str = ""
    """Why the update is refused or clipped; empty where it is neither."""


class StepGuard(Protocol):
    """Judges updates one by one; equal on every rank that is given equal numbers."""

    def observe(self, loss: float, gradient_norm: float) -> Decision:
        """Judge the next update by its global loss (nats) and its global gradient norm before clipping."""
        ...

    def state(self) -> dict[str, Any]:
        """All that decides later judgements, as plain JSON; floats survive JSON exactly."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`. Raises ValueError if it is not this guard's."""
        ...


def build_guard(optimizer: OptimizerConfig) -> StepGuard:
    """The guard that ``optimizer.guard`` names, fresh."""
    if optimizer.guard == "skip-step":
        return SkipStep(window_steps=optimizer.guard_window_steps, sigma=optimizer.guard_sigma)
    if optimizer.guard == "zclip":
        return ZClip(
            decay=optimizer.zclip_decay,
            threshold=optimizer.zclip_threshold,
            warmup_steps=optimizer.zclip_warmup_steps,
        )
    return NoGuard()


class NoGuard:
    """Refuses updates that are not finite, and nothing else."""

    def observe(self, loss: float, gradient_norm: float) -> Decision:
        """Judge an update."""
        return _refusal_of_nonfinite(loss, gradient_norm) or Decision(apply=True)

    def state(self) -> dict[str, Any]:
        """There is none."""
        return {"guard": "none"}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Check the name."""
        _require_own("none", state)


class SkipStep:
    """OLMo-core's rule: no update if loss or gradient norm is ``sigma`` standard deviations from its recent mean.

    Mean and sample standard deviation are of the ``window_steps`` steps before this one, skipped ones included, so that
    a lasting change of level is accepted within a window. As there, the distance counts on both sides: a loss that
    falls abruptly is skipped too. Judging begins when ``max(20, window_steps // 2)`` steps are measured, this one
    included. Source: ``SkipStepOptimizer`` in OLMo-core's ``src/olmo_core/optim/skip_step_optimizer.py``.

    One difference: a non-finite value is not remembered. There it makes the mean NaN, and every step is skipped for a
    whole window.
    """

    def __init__(self, *, window_steps: int, sigma: float) -> None:
        self._min_steps = max(OLMO_MIN_STEPS, window_steps // 2)
        self._sigma = sigma
        self._losses: deque[float] = deque(maxlen=window_steps)
        self._norms: deque[float] = deque(maxlen=window_steps)

    def observe(self, loss: float, gradient_norm: float) -> Decision:
        """Judge an update, then remember it."""
        if refusal := _refusal_of_nonfinite(loss, gradient_norm):
            return refusal
        reason = ""
        if len(self._losses) + 1 >= self._min_steps:
            reason = self._unusual("loss", loss, self._losses) or self._unusual(
                "gradient norm", gradient_norm, self._norms
            )
        self._losses.append(loss)
        self._norms.append(gradient_norm)
        return Decision(apply=not reason, reason=reason)

    def state(self) -> dict[str, Any]:
        """The window, oldest first."""
        return {"guard": "skip-step", "losses": list(self._losses), "gradient_norms": list(self._norms)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a window."""
        _require_own("skip-step", state)
        losses, norms = _numbers(state, "losses"), _numbers(state, "gradient_norms")
        if len(losses) != len(norms):
            raise ValueError(f"state of guard skip-step holds {len(losses)} losses and {len(norms)} gradient norms")
        self._losses = deque(losses, maxlen=self._losses.maxlen)
        self._norms = deque(norms, maxlen=self._norms.maxlen)

    def _unusual(self, name: str, value: float, window: Sequence[float]) -> str:
        mean, deviation = _mean_and_deviation(window, degrees_lost=1)
        # Not a quotient: where all was equal so far, deviation 0, only a value that differs is unusual.
        if abs(value - mean) <= self._sigma * deviation:
            return ""
        return (
            f"{name} {value:.4g} is more than {self._sigma:g} standard deviations ({deviation:.2g}) from the mean "
            f"{mean:.4g} of {len(window)} steps"
        )


class ZClip:
    """ZClip (arXiv 2504.02507): clips gradient norms that are unusual by their z-score, the more so the further out.

    For a norm g, with mean m and variance v of the norms so far: ``z = (g - m) / (sqrt(v) + 1e-6)``. Above the
    ``threshold`` t the gradient is clipped to ``m + t * sqrt(v) / (z / t)`` (the paper's reciprocal clipping: at ``z = t``
    that is t deviations, and it falls to the mean as z grows). Then, with g the clipped norm,
    ``m <- a m + (1 - a) g`` and ``v <- a v + (1 - a) (g - m)**2`` with the new m and ``a = decay``. The first
    ``warmup_steps`` norms pass and give the first mean and population variance.

    Source: the paper's section on the method, and for order and epsilon its authors' ``zclip.py`` (bluorion-com/ZClip).
    There a fixed limit of 1.0 holds besides; here that is ``training.max_gradient_norm``.
    """

    def __init__(self, *, decay: float, threshold: float, warmup_steps: int) -> None:
        self._decay = decay
        self._threshold = threshold
        self._warmup_steps = warmup_steps
        self._warmup_norms: list[float] = []
        self._mean_and_variance: tuple[float, float] | None = None

    def observe(self, loss: float, gradient_norm: float) -> Decision:
        """Judge an update, then move mean and variance by it."""
        if refusal := _refusal_of_nonfinite(loss, gradient_norm):
            return refusal
        if self._mean_and_variance is None:
            self._warm_up(gradient_norm)
            return Decision(apply=True)
        mean, variance = self._mean_and_variance
        deviation = math.sqrt(variance)
        score = (gradient_norm - mean) / (deviation + ZCLIP_EPSILON)
        limit = mean + self._threshold**2 * deviation / score if score > self._threshold else None
        norm = gradient_norm if limit is None else limit
        mean = self._decay * mean + (1 - self._decay) * norm
        variance = self._decay * variance + (1 - self._decay) * (norm - mean) ** 2
        self._mean_and_variance = mean, variance
        reason = "" if limit is None else f"gradient norm {gradient_norm:.4g}, z-score {score:.3g}, cut to {limit:.4g}"
        return Decision(apply=True, max_norm=limit, reason=reason)

    def state(self) -> dict[str, Any]:
        """Norms of the warm-up, or mean and variance."""
        return {
            "guard": "zclip",
            "warmup_norms": list(self._warmup_norms),
            "mean_and_variance": list(self._mean_and_variance or ()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from mean and variance, or within the warm-up."""
        _require_own("zclip", state)
        warmup, moments = _numbers(state, "warmup_norms"), _numbers(state, "mean_and_variance")
        if len(moments) not in (0, 2) or (moments and moments[1] < 0):
            raise ValueError(f"state of guard zclip: mean_and_variance is {moments}, expected a mean and a variance")
        self._warmup_norms = warmup
        self._mean_and_variance = (moments[0], moments[1]) if moments else None

    def _warm_up(self, norm: float) -> None:
        self._warmup_norms.append(norm)
        if len(self._warmup_norms) >= self._warmup_steps:
            mean, deviation = _mean_and_deviation(self._warmup_norms, degrees_lost=0)
            self._mean_and_variance = mean, deviation**2
            self._warmup_norms = []


def _refusal_of_nonfinite(loss: float, gradient_norm: float) -> Decision | None:
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        return None
    return Decision(apply=False, reason=f"loss {loss:.4g}, gradient norm {gradient_norm:.4g}: not finite")


def _mean_and_deviation(values: Iterable[float], *, degrees_lost: int) -> tuple[float, float]:
    listed = list(values)
    mean = math.fsum(listed) / len(listed)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in listed) / (len(listed) - degrees_lost))


def _require_own(name: str, state: Mapping[str, Any]) -> None:
    if state.get("guard") != name:
        raise ValueError(f"state of guard {state.get('guard')!r} given to guard {name!r}")


def _numbers(state: Mapping[str, Any], key: str) -> list[float]:
    values = state.get(key)
    if not isinstance(values, list) or not all(
        type(value) in (int, float) and math.isfinite(value) for value in values
    ):
        raise ValueError(f"state of guard {state['guard']!r}: {key} must be a list of finite numbers, got {values!r}")
    return [float(value) for value in values]
