"""Does a finding hold here: rules that are stated before the figures are seen.

A finding is one claim or several; a claim is a number per seed, and what it is to be. ``reproduced`` means that the 95 %
interval over seeds says so, ``partly`` that the mean does and the interval does not, ``not reproduced`` that not even the
mean does. A finding of several claims is reproduced if all are, not reproduced if none is even partly, and else partly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.evaluation.paired import Difference, mean_interval

Verdict = Literal["reproduced", "partly", "not reproduced", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One measurable part of a finding."""

    text: str
    """What the number is."""
    values: tuple[float, ...]
    """One a seed."""
    low: float = -math.inf
    """The number is to be above this."""
    high: float = math.inf
    """And below this."""
    unit: str = "nats"
    """Of the number."""

    @property
    def interval(self) -> Difference | None:
        """Mean over seeds, with its interval."""
        return mean_interval([value for value in self.values if math.isfinite(value)], "seeds")

    @property
    def verdict(self) -> Verdict:
        """By the rule above."""
        if any(math.isinf(value) for value in self.values):
            return "not reproduced"  # a run that ended in no finite loss
        found = self.interval
        if found is None:
            return "not measured"
        if not self.low < found.mean < self.high:
            return "not reproduced"
        surely = found.low is not None and found.high is not None and self.low < found.low and found.high < self.high
        return "reproduced" if surely else "partly"

    @property
    def rule(self) -> str:
        """What it is to be, in signs."""
        if math.isinf(self.high):
            return f"> {self.low:.3g}"
        if math.isinf(self.low):
            return f"< {self.high:.3g}"
        return f"{self.low:.3g} to {self.high:.3g}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is said to hold, and what was measured of it."""

    name: str
    """Short."""
    source: str
    """Where it is said."""
    text: str
    """What is said."""
    claims: tuple[Claim, ...]
    """Its parts."""
    remark: str = ""
    """What our measurement differs in from theirs."""

    @property
    def verdict(self) -> Verdict:
        """Of all claims together."""
        return join_verdicts([claim.verdict for claim in self.claims])


def join_verdicts(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several claims: ``reproduced`` or ``not reproduced`` if all are, ``partly`` between; what was not measured does not count."""
    measured = {verdict for verdict in verdicts if verdict != "not measured"}
    if not measured:
        return "not measured"
    return measured.pop() if len(measured) == 1 else "partly"


def above_zero(text: str, values: Sequence[float], unit: str = "nats") -> Claim:
    """A number that is to be positive."""
    return Claim(text=text, values=tuple(values), low=0.0, unit=unit)


def below_zero(text: str, values: Sequence[float], unit: str = "nats") -> Claim:
    """A number that is to be negative."""
    return Claim(text=text, values=tuple(values), high=0.0, unit=unit)


def within(text: str, values: Sequence[float], margin: float, unit: str = "nats") -> Claim:
    """A number that is to be zero for practical purposes."""
    return Claim(text=text, values=tuple(values), low=-margin, high=margin, unit=unit)
