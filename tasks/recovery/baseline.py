"""The window that a spike is measured against: median and scale of recent losses and gradient norms."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tasks.recovery.rule import Point

STEP_TO_SIGMA = 1.4826 / 2**0.5
"""Makes the median absolute difference of neighbours the standard deviation of normal noise (MAD's 1 / 0.6745)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """Where a quantity lies, and how far it strays."""

    median: float
    """Its middle value."""
    scale: float
    """1.0484 times the median absolute difference of neighbours; 0 for a constant."""


def level_of(values: Sequence[float]) -> Level:
    """Median and scale of two or more ``values`` in the order they were measured.

    The scale is the median absolute deviation of differences, not of the values: a loss that falls steeply, as in
    warm-up, or climbs strays from its own median without being noisy.
    """
    steps = sorted([abs(after - before) for before, after in pairwise(values)])
    return Level(median=_middle(sorted(values)), scale=STEP_TO_SIGMA * _middle(steps))


class Baseline:
    """The newest points up to a number, and the levels of their losses and gradient norms."""

    def __init__(self, num_points: int) -> None:
        self.points: deque[Point] = deque(maxlen=num_points)
        self._levels: tuple[Level, Level | None] | None = None

    def __len__(self) -> int:
        return len(self.points)

    @property
    def loss(self) -> Level:
        """Level of the losses."""
        return self._measured()[0]

    @property
    def gradient(self) -> Level | None:
        """Level of the gradient norms; null where fewer than half of the points have one."""
        return self._measured()[1]

    def add(self, points: Iterable[Point]) -> None:
        """Take in finite ``points``; the oldest ones leave a full window."""
        self.points.extend(points)
        self._levels = None

    def restart(self, points: Iterable[Point]) -> None:
        """Forget all and begin with ``points``."""
        self.points.clear()
        self.add(points)

    def drop_from(self, step: int) -> None:
        """Forget points from ``step`` on."""
        while self.points and self.points[-1].step >= step:
            self.points.pop()
        self._levels = None

    def _measured(self) -> tuple[Level, Level | None]:
        if self._levels is None:
            norms = [point.gradient_norm for point in self.points if point.gradient_norm is not None]
            is_known = 2 * len(norms) >= max(len(self.points), 4)
            self._levels = level_of([point.loss for point in self.points]), level_of(norms) if is_known else None
        return self._levels


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
