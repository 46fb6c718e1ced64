"""Which of two versions of a model is the better one: the rule by which a champion gives way."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIN_SLICES = 2
"""Fewer have no standard error."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Held-out loss of one version."""

    name: str
    """Of the version."""
    suite: str | None
    """Fingerprint of what it was measured on; None if it was not measured."""
    slices: tuple[float, ...]
    """Loss of each held-out slice, nats per token; empty if it was not measured."""

    @property
    def loss(self) -> float | None:
        """Mean over slices; None if it was not measured or is not finite."""
        loss = statistics.fmean(self.slices) if self.slices else math.nan
        return loss if math.isfinite(loss) else None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the alias moves, and why."""

    is_moved: bool
    """Whether the new version takes the alias."""
    reason: str
    """One sentence with the numbers."""
    gain: float | None = None
    """Mean over slices of how much lower the new version's loss is; None where they cannot be compared."""
    error: float | None = None
    """Its standard error over slices."""


def judge(new: Measured, champion: Measured | None, margin_errors: float) -> Verdict:
    """Whether ``new`` takes the place of ``champion`` (None: nobody holds it).

    It does if its loss is lower on the same held-out slices, by at least ``margin_errors`` standard errors of the paired
    difference. What is equal or not known moves nothing: a champion is never replaced on a guess.
    """
    if new.loss is None:
        return Verdict(is_moved=False, reason=f"the held-out loss of {new.name} is not known or not finite")
    if champion is None:
        return Verdict(is_moved=True, reason=f"no version held it; {new.name} has held-out loss {new.loss:.4f}")
    if champion.loss is None:
        return Verdict(is_moved=False, reason=f"the held-out loss of the champion, {champion.name}, is not known")
    if champion.suite != new.suite or len(champion.slices) != len(new.slices):
        return Verdict(is_moved=False, reason=f"{champion.name} was not measured on the same held-out slices")
    if len(new.slices) < MIN_SLICES:
        return Verdict(
            is_moved=False, reason=f"one held-out slice has no standard error; the rule needs {MIN_SLICES} or more"
        )
    gain, error = _paired(champion.slices, new.slices)
    is_moved = gain > 0 and gain >= margin_errors * error
    told = f"{new.loss:.4f} against {champion.loss:.4f} of {champion.name}: lower by {gain:.4f} ± {error:.4f}"
    return Verdict(
        is_moved=is_moved,
        reason=f"{told}, {'at least' if is_moved else 'less than'} {margin_errors:g} standard error(s)",
        gain=gain,
        error=error,
    )


def _paired(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of ``before[i] - after[i]``."""
    gains = [b - a for b, a in zip(before, after, strict=True)]
    return statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
