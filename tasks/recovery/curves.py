"""Labelled curves for judging the spike detector: what a seeded generator says runs look like (docs/spikes.md).

Every curve is a power-law descent from about ln(vocabulary) with noise, 2,000 to 6,000 measured steps long, to
which a kind adds one thing. Sizes are in nats. The label is the first step of a divergence, or None.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.recovery.rule import Point

Values = npt.NDArray[np.float64]
WARMUP_STEPS = 500
"""Longest warm-up of a generated run, and the default rule's."""
EARLIEST_EVENT = 700
MISSING_NORMS = 0.2
"""Part of the curves that log no gradient norm, where the kind does not need one."""


@dataclass(frozen=True, kw_only=True)
class LabelledCurve:
    """One run's loss and gradient norm, and what is wrong with it."""

    kind: str
    """Key of ``BENIGN``, ``DIVERGING`` or ``AMBIGUOUS``."""
    seed: int
    """What it was drawn with; kind and seed determine it."""
    loss: Values
    """By step, from step 1."""
    gradient_norm: Values | None
    """By step; null where the run logs none."""
    onset_step: int | None
    """First step of the divergence; null where there is none."""
    start_loss: float
    """Loss of the untrained model."""

    def points(self) -> Iterator[Point]:
        """The curve as a detector sees it."""
        for i, loss in enumerate(self.loss):
            norm = None if self.gradient_norm is None else float(self.gradient_norm[i])
            yield Point(step=i + 1, loss=float(loss), gradient_norm=norm)


@dataclass(kw_only=True)
class _Draft:
    """A run in the making."""

    rng: np.random.Generator
    loss: Values
    norm: Values
    at: int
    """Index at which the event of the kind begins."""
    sigma: float
    """Of the loss noise."""
    descent: float
    """Loss at the start less loss at the end."""

    def since(self) -> Values:
        """Steps since the event, 0 before it."""
        return np.clip(np.arange(len(self.loss)) - self.at, 0, None).astype(float)

    def after(self) -> Values:
        """1 from the event on, else 0."""
        return (np.arange(len(self.loss)) >= self.at).astype(float)

    def draw(self, low: float, high: float) -> float:
        """A number between ``low`` and ``high``, evenly on a logarithmic scale."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))


def generate_curve(kind: str, seed: int) -> LabelledCurve:
    """The curve of ``kind`` drawn with ``seed``."""
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    draft, start = _healthy_run(rng, is_continued=kind.startswith("continued"))
    has_norms = rng.uniform() >= MISSING_NORMS or kind in NEEDS_NORMS
    {**BENIGN, **DIVERGING, **AMBIGUOUS}[kind](draft)
    return LabelledCurve(
        kind=kind,
        seed=seed,
        loss=draft.loss,
        gradient_norm=draft.norm if has_norms else None,
        onset_step=draft.at + 1 if kind in DIVERGING or kind in STUCK else None,
        start_loss=start,
    )


def _healthy_run(rng: np.random.Generator, *, is_continued: bool) -> tuple[_Draft, float]:
    num_steps = int(rng.integers(2000, 6001))
    steps = np.arange(num_steps, dtype=float)
    start, end = rng.uniform(9.5, 11.5), rng.uniform(1.8, 3.2)
    sigma = float(np.exp(rng.uniform(np.log(0.01), np.log(0.12))))
    first = end + rng.uniform(0.1, 0.4) if is_continued else start
    ramp = rng.uniform(50, WARMUP_STEPS)
    effective = np.where(steps < ramp, steps**2 / (2 * ramp), steps - ramp / 2)
    loss = end + (first - end) * (1 + effective / rng.uniform(20, 150)) ** -rng.uniform(0.4, 0.9)
    norm = rng.uniform(0.1, 1.0) * (1 + rng.uniform(2, 10) * np.exp(-steps / (ramp / 2)))
    draft = _Draft(
        rng=rng,
        loss=loss + sigma * rng.standard_normal(num_steps),
        norm=norm * np.exp(rng.uniform(0.05, 0.25) * rng.standard_normal(num_steps)),
        at=int(rng.integers(EARLIEST_EVENT, num_steps - 400)),
        sigma=sigma,
        descent=float(first - loss[-1]),
    )
    return draft, float(start)


# Healthy runs.


def _clean(draft: _Draft) -> None:
    """As it is."""


def _heavy_tails(draft: _Draft) -> None:
    draft.loss += draft.sigma * draft.rng.standard_t(2.5, len(draft.loss))
    draft.norm *= np.exp(0.2 * np.abs(draft.rng.standard_t(2.5, len(draft.norm))).clip(max=8))


def _outliers(draft: _Draft) -> None:
    """Single steps far off, some of them two or three in a row."""
    for at in draft.rng.integers(10, len(draft.loss) - 5, int(draft.rng.integers(3, 40))):
        for i in range(at, at + int(draft.rng.integers(1, 4))):
            draft.loss[i] += draft.draw(0.5, 30)
            draft.norm[i] *= draft.draw(2, 100)


def _periodic(draft: _Draft) -> None:
    phase = 2 * np.pi * np.arange(len(draft.loss)) / draft.draw(15, 1500)
    draft.loss += draft.draw(0.03, 0.3) * np.sin(phase)
    draft.norm *= np.exp(0.2 * np.sin(phase))


def _switch_up(draft: _Draft) -> None:
    """Harder data, to which the model adapts in part."""
    adapted = 1 - draft.rng.uniform(0, 0.6) * (1 - np.exp(-draft.since() / draft.draw(50, 1000)))
    draft.loss += draft.draw(0.05, 0.4) * draft.after() * adapted
    draft.norm *= 1 + draft.after() * (
        draft.rng.uniform(-0.3, 0.8) + draft.rng.uniform(0, 3) * np.exp(-draft.since() / 20)
    )


def _switch_down(draft: _Draft) -> None:
    draft.loss -= draft.draw(0.05, 1.0) * draft.after()


def _ramped_switch(draft: _Draft) -> None:
    """A mix of data that changes over many steps."""
    draft.loss += draft.draw(0.05, 0.4) * np.clip(draft.since() / draft.draw(20, 800), 0, 1)


def _several_switches(draft: _Draft) -> None:
    for _ in range(4):
        draft.at = int(draft.rng.integers(EARLIEST_EVENT, len(draft.loss)))
        draft.loss += draft.rng.uniform(-0.25, 0.25) * draft.after()


def _slow_drift(draft: _Draft) -> None:
    draft.loss += draft.draw(0.02, 0.35) * np.arange(len(draft.loss)) / len(draft.loss)
    draft.norm *= np.exp(draft.rng.uniform(-0.5, 1.0) * np.arange(len(draft.loss)) / len(draft.loss))


def _bump(draft: _Draft) -> None:
    """One to three spikes that heal by themselves: up at once, back within tens to hundreds of steps."""
    for _ in range(int(draft.rng.integers(1, 4))):
        draft.at = int(draft.rng.integers(EARLIEST_EVENT, len(draft.loss)))
        healing = draft.after() * np.exp(-draft.since() / draft.draw(3, 80))
        draft.loss += draft.draw(0.3, 5) * healing
        draft.norm *= 1 + draft.draw(1, 50) * healing


def _flat_bump(draft: _Draft) -> None:
    """A spike that stays up for up to 40 steps and is gone at once."""
    is_up = draft.after() * (draft.since() < draft.draw(3, 40))
    draft.loss += draft.draw(0.3, 5) * is_up
    draft.norm *= 1 + draft.draw(1, 30) * is_up


def _warmup_bump(draft: _Draft) -> None:
    """The hill that many runs climb and leave while the learning rate rises; at most a third of the descent so far."""
    draft.at = int(draft.rng.integers(60, 250))
    shape = draft.after() * (draft.since() / 60) * np.exp(1 - draft.since() / 60)
    draft.loss += draft.rng.uniform(0.1, 0.33) * max(draft.loss[0] - draft.loss[draft.at], 0) * shape
    draft.norm *= 1 + draft.draw(1, 20) * shape


def _annealed(draft: _Draft) -> None:
    """The learning rate decays at the end: the loss falls quickly, gradient norms rise."""
    share = np.clip(draft.since() / (len(draft.loss) - draft.at), 0, 1)
    draft.loss -= draft.draw(0.05, 0.4) * share
    draft.norm *= 1 + 1.5 * share


def _large_norms(draft: _Draft) -> None:
    """Gradient norms that go up to three times what they were, with a loss that does not care."""
    draft.norm *= 1 + draft.rng.uniform(0.2, 2.0) * draft.after()


# Divergences.


def _blow_up(draft: _Draft) -> None:
    growth = 0.02 * (np.exp(np.minimum(draft.since() / draft.draw(5, 60), 30)) - 1)
    draft.loss += np.minimum(growth, draft.draw(2, 100))
    draft.norm *= np.minimum(1 + 10 * growth, 1000)


def _plateau(draft: _Draft) -> None:
    """Up within a few steps and never back; gradient norms are high at first, and then anything."""
    rise = 1 - np.exp(-draft.since() / draft.draw(1, 30))
    draft.loss += draft.rng.uniform(1.5, 6) * rise
    draft.norm *= 1 + draft.after() * (draft.draw(2, 50) * np.exp(-draft.since() / 30) + draft.rng.uniform(-0.7, 3))


def _half_healed(draft: _Draft) -> None:
    """Up at once, and back only a part of the way."""
    rise, left = draft.rng.uniform(3, 7), draft.rng.uniform(0.4, 0.8)
    draft.loss += rise * draft.after() * (left + (1 - left) * np.exp(-draft.since() / draft.draw(10, 150)))
    draft.norm *= 1 + draft.after() * draft.draw(1, 10)


def _norm_first(draft: _Draft) -> None:
    """Gradient norms explode, and a long time later the loss does."""
    since = draft.since()
    draft.norm *= 1 + draft.draw(6, 100) * (1 - np.exp(-since / 20))
    draft.loss += np.clip((since - draft.draw(60, 400)) / 100, 0, None).clip(max=6)


def _not_a_number(draft: _Draft) -> None:
    draft.loss[draft.at :] = draft.norm[draft.at :] = np.nan


def _infinite_norm(draft: _Draft) -> None:
    draft.norm[draft.at] = np.inf


def _oscillating(draft: _Draft) -> None:
    """Swings that grow; their lower turns come near the old level."""
    since = draft.since()
    size = draft.rng.uniform(2, 8) * (1 - np.exp(-since / draft.draw(20, 200)))
    draft.loss += size * (0.55 - 0.5 * np.cos(2 * np.pi * since / draft.draw(6, 120))) * draft.after()
    draft.norm *= 1 + size


def _slow_divergence(draft: _Draft) -> None:
    """Up by a third to all of the descent in hundreds of steps, with nothing sudden about it."""
    draft.at = min(draft.at, len(draft.loss) - 1200)
    draft.loss += draft.descent * draft.rng.uniform(0.33, 1.0) * np.clip(draft.since() / draft.draw(200, 900), 0, 1)


def _warmup_divergence(draft: _Draft) -> None:
    """A learning rate that is too high: during warm-up the loss returns to where it began, or above."""
    draft.at = int(draft.rng.integers(150, 400))
    target = draft.loss[:20].mean() + draft.rng.uniform(-0.5, 4)
    back = draft.after() * (1 - np.exp(-draft.since() / draft.draw(5, 40)))
    draft.loss += (target - draft.loss.copy()) * back + draft.sigma * draft.rng.standard_normal(len(back)) * back
    draft.norm *= 1 + 5 * back


# Neither side is certain: reported beside the figures, not in them.


def _large_switch(draft: _Draft) -> None:
    draft.loss += draft.draw(0.5, 2.0) * draft.after()


def _small_plateau(draft: _Draft) -> None:
    draft.loss += draft.draw(0.2, 0.9) * draft.after() * (1 - np.exp(-draft.since() / 10))


def _long_bump(draft: _Draft) -> None:
    """Healthy again after 60 to 500 steps without a sign of it before."""
    is_up = draft.after() * (draft.since() < draft.draw(60, 500))
    draft.loss += draft.rng.uniform(1, 5) * is_up


Kind = Callable[[_Draft], Any]
BENIGN: dict[str, Kind] = {
    "clean": _clean,
    "heavy tails": _heavy_tails,
    "one-step outliers": _outliers,
    "periodic": _periodic,
    "data switch up": _switch_up,
    "data switch down": _switch_down,
    "ramped data switch": _ramped_switch,
    "several data switches": _several_switches,
    "slow drift": _slow_drift,
    "healing bump": _bump,
    "flat bump": _flat_bump,
    "warm-up bump": _warmup_bump,
    "annealed": _annealed,
    "larger gradient norms": _large_norms,
    "continued run": _clean,
    "continued run, outliers": _outliers,
}
"""Runs that need nothing."""
DIVERGING: dict[str, Kind] = {
    "blow-up": _blow_up,
    "jump and plateau": _plateau,
    "half healed": _half_healed,
    "gradient norm first": _norm_first,
    "not a number": _not_a_number,
    "infinite gradient norm": _infinite_norm,
    "oscillating": _oscillating,
    "slow divergence": _slow_divergence,
    "divergence in warm-up": _warmup_divergence,
    "continued run, plateau": _plateau,
}
"""Runs that are lost from the onset on."""
AMBIGUOUS: dict[str, Kind] = {
    "large data switch": _large_switch,
    "small plateau": _small_plateau,
    "long bump": _long_bump,
    "continued run, data switch up": _switch_up,
}
"""Runs that losses and gradient norms alone cannot tell apart."""
STUCK = {"small plateau"}
"""Those of ``AMBIGUOUS`` that are divergences."""
NEEDS_NORMS = {"gradient norm first", "infinite gradient norm", "larger gradient norms"}
