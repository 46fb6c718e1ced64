"""What annealing would give, predicted from a run that has not annealed, and how far such predictions were off before.

Three predictors of the held-out loss at the end of an anneal: the merge at equal tokens, as arXiv 2505.12082 (section 4.2)
proposes, plus the mean offset that real anneals of before had from it; a law of loss under the schedule
(:mod:`tasks.evaluation.annealing_law`); and the mean of both, equally weighted, because weights estimated from a handful
of anneals err more than equal ones. Beside them stand the naive ones: the raw and the merged loss as they are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from scipy.stats import t as student

from tasks.evaluation.annealing_law import LawUnknown, LossCurve, fit_law

PREDICTORS = ("raw", "merged", "merged_with_offset", "law", "combined")
"""From the most naive on; all give nats per token."""
LEVEL = 0.95
"""Of prediction intervals."""


@dataclass(frozen=True, kw_only=True)
class Anneal:
    """One anneal, real or thought of, and what the run at constant learning rate has at its end."""

    name: str
    """Branch; empty for one that is thought of."""
    fork_step: int
    """Step at which the learning rate begins to fall."""
    end_step: int
    """Step at which it has fallen."""
    curve: LossCurve
    """Learning rates to the end; losses of a real anneal's own snapshots, none of one that is thought of."""
    raw: float | None
    """Loss of the run's own snapshot at ``end_step``, nats per token; None if there is none."""
    merged: float | None
    """Loss of the run's scheduled merge that ends there; None if there is none."""

    @property
    def annealed(self) -> float:
        """Loss at the end of a real anneal."""
        return self.curve.losses[-1]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What each predictor says."""

    losses: dict[str, float]
    """Nats per token by name in :data:`PREDICTORS`; those that cannot tell are missing."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Why the others cannot."""


@dataclass(frozen=True, kw_only=True)
class BackTest:
    """Errors of one predictor on real anneals, each predicted from the others."""

    errors: dict[str, float]
    """Predicted less real loss by anneal, nats per token."""

    @property
    def mean_absolute(self) -> float:
        """Mean absolute error, nats per token."""
        return statistics.fmean(abs(error) for error in self.errors.values())

    def half_width(self, level: float = LEVEL) -> float | None:
        """Half a prediction interval: Student's t of the root mean square error; None for fewer than two anneals."""
        count = len(self.errors)
        if count < 2:
            return None
        rms = math.sqrt(statistics.fmean(error**2 for error in self.errors.values()))
        return float(student.ppf((1 + level) / 2, count - 1)) * rms


def predict(anneal: Anneal, trunk: LossCurve, others: Sequence[Anneal]) -> Prediction:
    """What the predictors say of ``anneal`` from the run's own curve, up to its end, and from ``others``, real anneals."""
    losses: dict[str, float] = {}
    unknown: dict[str, str] = {}
    for name, loss in (("raw", anneal.raw), ("merged", anneal.merged)):
        if loss is None:
            unknown[name] = (
                f"no evaluated {'snapshot' if name == 'raw' else 'scheduled merge'} at step {anneal.end_step:,}"
            )
        else:
            losses[name] = loss
    offsets = [other.annealed - other.merged for other in others if other.merged is not None]
    if "merged" not in losses:
        unknown["merged_with_offset"] = unknown["merged"]
    elif not offsets:
        unknown["merged_with_offset"] = "no real anneal beside a scheduled merge to take the offset from"
    else:
        losses["merged_with_offset"] = losses["merged"] + statistics.fmean(offsets)
    try:
        if not others:
            # A recovery's re-warm-up is a fall of the learning rate, too, and says nothing of annealing.
            raise LawUnknown("no real anneal to learn from what a falling learning rate gives")
        law = fit_law([_until(trunk, anneal.end_step), *(other.curve for other in others)])
        losses["law"] = law.loss_at(anneal.curve.learning_rates, anneal.curve.warmup_steps, anneal.end_step)
    except LawUnknown as error:
        unknown["law"] = str(error)
    if "law" in losses and "merged_with_offset" in losses:
        losses["combined"] = (losses["law"] + losses["merged_with_offset"]) / 2
    else:
        unknown["combined"] = "it needs both the merge with its offset and the law"
    return Prediction(losses=losses, unknown=unknown)


def back_test(anneals: Sequence[Anneal], trunk: LossCurve, *, only_earlier: bool = False) -> dict[str, BackTest]:
    """Every real anneal predicted from the others, by predictor; with ``only_earlier`` from those that had ended by then."""
    errors: dict[str, dict[str, float]] = {name: {} for name in PREDICTORS}
    for anneal in anneals:
        others = [
            other
            for other in anneals
            if other is not anneal and not (only_earlier and other.end_step > anneal.end_step)
        ]
        for name, loss in predict(anneal, trunk, others).losses.items():
            errors[name][anneal.name] = loss - anneal.annealed
    return {name: BackTest(errors=found) for name, found in errors.items() if found}


def _until(curve: LossCurve, step: int) -> LossCurve:
    """What was known of ``curve`` at ``step``."""
    known = [(s, loss) for s, loss in zip(curve.steps, curve.losses, strict=True) if s <= step]
    return LossCurve(
        learning_rates=curve.learning_rates,
        warmup_steps=curve.warmup_steps,
        steps=tuple(s for s, _ in known),
        losses=tuple(loss for _, loss in known),
    )
