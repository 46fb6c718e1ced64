"""Paired differences with intervals: what two matched measurements differ by, and how surely."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy.special import stdtrit

CONFIDENCE = 0.95
"""Of all intervals."""
Over = Literal["slices", "blocks", "seeds"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of paired differences, or of paired ratios, with an interval that has :data:`CONFIDENCE`."""

    mean: float
    """First less second; or first divided by second, where ``is_ratio``."""
    low: float | None
    """Lower end; None for a single pair, which has no interval."""
    high: float | None
    """Upper end."""
    num: int
    """Pairs."""
    over: Over
    """What was paired."""
    is_ratio: bool = False
    """Whether it is a ratio: the geometric mean, its interval taken over logarithms."""

    @property
    def sign(self) -> int:
        """-1 or 1 if the interval lies below or above what equal arms would give; 0 if it does not say."""
        equal = 1.0 if self.is_ratio else 0.0
        if self.low is None or self.high is None:
            return 0
        return -1 if self.high < equal else 1 if self.low > equal else 0


def paired_difference(first: Sequence[float], second: Sequence[float], over: Over) -> Difference | None:
    """Mean of ``first[i] - second[i]`` with Student's t interval over the pairs; None without a finite pair.

    A pair of which one value is not finite is left out. The interval takes the pairs to be independent and their
    differences to be about normal.
    """
    values = [a - b for a, b in zip(first, second, strict=True) if math.isfinite(a) and math.isfinite(b)]
    return mean_interval(values, over)


def paired_ratio(first: Sequence[float], second: Sequence[float], over: Over) -> Difference | None:
    """Geometric mean of ``first[i] / second[i]``, as :func:`paired_difference` of logarithms; pairs that are not positive are left out."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if min(a, b) > 0]
    logs = paired_difference([math.log(a) for a, _ in pairs], [math.log(b) for _, b in pairs], over)
    return None if logs is None else _exp(logs)


def over_seeds(found: Sequence[Difference]) -> Difference | None:
    """What the differences ``found``, one a seed, come to, with an interval over seeds; their own intervals do not count."""
    if not found:
        return None
    if not found[0].is_ratio:
        return mean_interval([item.mean for item in found], "seeds")
    logs = mean_interval([math.log(item.mean) for item in found], "seeds")
    return None if logs is None else _exp(logs)


def mean_interval(values: Sequence[float], over: Over) -> Difference | None:
    """Mean of ``values`` and Student's t interval of it; None without values, no interval with one."""
    if not values:
        return None
    mean, num = statistics.fmean(values), len(values)
    if num == 1:
        return Difference(mean=mean, low=None, high=None, num=1, over=over)
    half = t_quantile(num - 1) * statistics.stdev(values) / math.sqrt(num)
    return Difference(mean=mean, low=mean - half, high=mean + half, num=num, over=over)


def t_quantile(degrees: int) -> float:
    """How many standard errors Student's t interval of :data:`CONFIDENCE` reaches to either side."""
    return float(stdtrit(degrees, 0.5 + CONFIDENCE / 2))


def _exp(logs: Difference) -> Difference:
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return replace(logs, mean=math.exp(logs.mean), low=low, high=high, is_ratio=True)
