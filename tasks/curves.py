"""Decay curves, shared by the learning-rate schedule and by merge weights that imitate it."""

from __future__ import annotations

import math
from collections.abc import Callable

DECAY_CURVES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""Share of the peak that is left at a progress in [0, 1]: 1 at 0, 0 at 1."""
