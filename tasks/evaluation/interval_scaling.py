"""How the best V grows with the size of the model: a power law over runs, beside the values that the paper chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
"""Of intervals."""
PAPER_MOE = ((0.7e9, 4e9), (1.3e9, 8e9), (10e9, 80e9))
"""Active parameters and V in tokens (arXiv 2505.12082, section 4.4)."""
PAPER_DENSE = ((411e6, 2e9), (2e9, 5e9), (8e9, 15e9), (70e9, 40e9))
"""Parameters and V in tokens (the same)."""


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """``V = coefficient * size ** exponent``."""

    coefficient: float
    """Tokens at one parameter."""
    exponent: float
    """Of the number of active parameters."""
    exponent_interval: tuple[float, float] | None
    """Of :data:`LEVEL`, by Student's t; None for two points, which fit exactly."""
    points: int
    """That it was fitted to."""

    def at(self, size: float) -> float:
        """V in tokens for ``size`` active parameters."""
        return float(self.coefficient * size**self.exponent)


def fit_power_law(points: Sequence[tuple[float, float]]) -> PowerLaw | None:
    """Least squares of log V on log size over ``(size, V)``; None unless there are two sizes."""
    if len({size for size, _ in points}) < 2:
        return None
    x, y = np.log([size for size, _ in points]), np.log([v for _, v in points])
    slope, intercept = np.polyfit(x, y, 1)
    interval = None
    if len(points) > 2:
        residual = float(np.sum((y - slope * x - intercept) ** 2)) / (len(points) - 2)
        error = math.sqrt(residual / float(np.sum((x - x.mean()) ** 2)))
        half = float(student.ppf(0.5 + LEVEL / 2, len(points) - 2)) * error
        interval = (float(slope) - half, float(slope) + half)
    return PowerLaw(
        coefficient=math.exp(float(intercept)), exponent=float(slope), exponent_interval=interval, points=len(points)
    )
