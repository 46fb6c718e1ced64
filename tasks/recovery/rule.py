"""What the spike detector is told, sees and says: rule, point and alarm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.journal import Measurement
from configs.fields import require

LOSS_METRIC = "train/loss"
GRADIENT_METRIC = "train/gradient_norm"


@dataclass(frozen=True, kw_only=True)
class SpikeRule:
    """When a loss curve counts as diverged; every number is scale-free, so that loss may be in nats, bits or a sum."""

    window_points: int = 128
    """Measured steps that make the baseline: their median, and as scale the robust noise from one to the next."""
    threshold: float = 6.0
    """Scales above the median at which a loss or a gradient norm stands out."""
    tolerance: float = 3.0
    """Scales above the median within which a loss counts as recovered."""
    patience_points: int = 48
    """Measured steps that trouble has to last; it is over once half as many in a row are mostly as before."""
    lost_progress: float = 0.1
    """Part of the progress since the start (start level less baseline) that a rise must take back to be a divergence.

    A smaller rise that settles is a level shift, such as a change of data makes.
    """
    gradient_ratio: float = 4.0
    """How many times its median a gradient norm must be to stand out."""
    trend: float = 0.1
    """Change within half the patience, as a part of the rise, from which a loss is falling or rising and is waited for."""
    warmup_steps: int = 500
    """Until this step gradient norms are ignored and ``warmup_lost_progress`` is the level."""
    warmup_lost_progress: float = 0.5
    """Stands for ``lost_progress`` until ``warmup_steps``."""
    start_loss: float | None = None
    """Loss of an untrained model, ln(vocabulary), for runs that start from weights; null: the highest baseline seen."""

    def __post_init__(self) -> None:
        for key in ("threshold", "tolerance", "lost_progress", "trend", "warmup_lost_progress"):
            value = getattr(self, key)
            require(0 <= value < math.inf, f"spikes.{key}", value, "a number, 0 or more")
        require(self.window_points >= 8, "spikes.window_points", self.window_points, "at least 8 measured steps")
        require(self.patience_points >= 1, "spikes.patience_points", self.patience_points, "at least 1 measured step")
        require(
            self.tolerance <= self.threshold, "spikes.tolerance", self.tolerance, f"at most threshold={self.threshold}"
        )
        require(self.gradient_ratio >= 1, "spikes.gradient_ratio", self.gradient_ratio, "1 or more")
        require(self.warmup_steps >= 0, "spikes.warmup_steps", self.warmup_steps, "a step, 0 or more")
        allowed = "a finite loss, or null"
        require(
            self.start_loss is None or math.isfinite(self.start_loss), "spikes.start_loss", self.start_loss, allowed
        )

    @property
    def min_window_points(self) -> int:
        """Measured steps before which there is no baseline, and so no alarm but for non-finite values."""
        return self.window_points // 4

    @property
    def half_patience_points(self) -> int:
        """Measured steps of which the medians are compared."""
        return (self.patience_points + 1) // 2

    def lost_progress_at(self, step: int) -> float:
        """The part of the progress whose loss is a divergence at ``step``."""
        return self.warmup_lost_progress if step <= self.warmup_steps else self.lost_progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Loss and gradient norm of one measured step."""

    step: int
    """Completed optimizer steps."""
    loss: float
    """Training loss; may be non-finite."""
    gradient_norm: float | None = None
    """Norm before clipping; null where none was logged."""

    @property
    def is_finite(self) -> bool:
        """Whether all that was logged is a finite number."""
        return math.isfinite(self.loss) and (self.gradient_norm is None or math.isfinite(self.gradient_norm))


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A spike that does not go away."""

    kind: Literal["nonfinite", "loss", "gradient"]
    """What gave the alarm: a value that is no finite number, the loss, or the gradient norm before the loss."""
    onset_step: int
    """First step of the trouble as far as the measurements tell; snapshots from here on are not healthy."""
    alarm_step: int
    """The step whose measurement decided it."""
    value: float
    """What was found: the offending value, or the median of the newest measured steps."""
    baseline: float | None
    """Median before the trouble; null where there was no baseline yet."""
    scale: float | None
    """Robust noise before the trouble (``baseline.Level``); null where there was no baseline yet."""
    reason: str
    """The finding in a sentence."""


def points_of(measurements: Iterable[Measurement]) -> Iterator[Point]:
    """The points of those ``measurements`` that hold a training loss."""
    for measurement in measurements:
        if LOSS_METRIC in measurement.metrics:
            norm = measurement.metrics.get(GRADIENT_METRIC)
            yield Point(step=measurement.step, loss=measurement.metrics[LOSS_METRIC], gradient_norm=norm)
