"""Finds a divergence in logged losses and gradient norms; pure, in memory bounded by the window.

Points that look ordinary make the baseline. One that stands out opens a suspicion: the baseline is frozen, and
further points are held until they say how it ends. The loss comes back: nothing happened. It settles a little
higher: a level shift, which becomes the new baseline. It stays far up without falling, or gradient norms do:
an alarm. Falling and small rising losses are waited for. Each is a change of at least ``trend`` of the rise (and
of one scale) within half the patience, so waiting ends.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

from tasks.recovery.baseline import Baseline, Level
from tasks.recovery.rule import Alarm, Point, SpikeRule


def find_spike(points: Iterable[Point], rule: SpikeRule) -> Alarm | None:
    """The first alarm over ``points`` in the order they were measured, or None.

    A step that comes again (a run resumed from a snapshot) replaces what was measured from that step on.
    """
    kept: list[Point] = []
    for point in points:
        while kept and kept[-1].step >= point.step:
            kept.pop()
        kept.append(point)
    detector = SpikeDetector(rule)
    return next((alarm for point in kept if (alarm := detector.observe(point))), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rise:
    """How the held points compare with the baseline."""

    excess: float
    """Median loss of the newer half less the baseline."""
    change: float
    """Median loss of the newer half less that of the older half."""
    gradient: float
    """Median gradient norm of the newer half; NaN without any."""
    has_gradient_risen: bool
    """Whether that stands out."""
    is_gradient_falling: bool
    """Whether it does, but less so than in the older half."""


class SpikeDetector:
    """Gives the answer of :func:`find_spike` point by point."""

    def __init__(self, rule: SpikeRule) -> None:
        self.rule = rule
        self.alarm: Alarm | None = None
        self._baseline = Baseline(rule.window_points)
        self._held: deque[Point] = deque(maxlen=2 * rule.half_patience_points)
        self._onset_step: int | None = None
        self._num_steady = 0
        self._start = -math.inf if rule.start_loss is None else rule.start_loss
        self._lowest: tuple[Level, int] | None = None
        self._last_step = -1

    def observe(self, point: Point) -> Alarm | None:
        """Take the next measured step; the alarm from the point that raises it on.

        A step not above the last one means that the run went back to a snapshot: what was seen from there on is
        forgotten, an alarm included. The baseline then refills, as points before its window are gone; for exactly
        what :func:`find_spike` says, begin anew with the run's journal.
        """
        if point.step <= self._last_step:
            self._rewind(point.step)
        self._last_step = point.step
        if self.alarm is None:
            if not point.is_finite:
                self.alarm = self._nonfinite(point)
            elif self._held or self._stands_out(point):
                self._held.append(point)
                self._judge(point)
            else:
                self._baseline.add([point])
                self._follow(point)
        return self.alarm

    def _stands_out(self, point: Point) -> bool:
        if len(self._baseline) < self.rule.min_window_points:
            return False
        level = self._baseline.loss
        is_high = point.loss - level.median > self.rule.threshold * level.scale
        return is_high or self._is_gradient_high(point.gradient_norm, point.step)

    def _is_gradient_high(self, norm: float | None, step: int) -> bool:
        level = self._baseline.gradient
        if norm is None or level is None or step <= self.rule.warmup_steps:
            return False
        is_far = norm - level.median > self.rule.threshold * level.scale
        return is_far and norm >= self.rule.gradient_ratio * level.median

    def _judge(self, point: Point) -> None:
        """Decide what the held points are, as soon as they can tell."""
        half, level = self.rule.half_patience_points, self._baseline.loss
        if len(self._held) < half:
            return
        rise = self._rise(point.step)
        if rise.excess <= self.rule.tolerance * level.scale and not rise.has_gradient_risen:
            self._baseline.add(list(self._held)[-half:])
            self._end_suspicion()
        elif len(self._held) == 2 * half:
            if self._onset_step is None:
                self._onset_step = self._first_of_trouble()
            self._decide(point, rise)

    def _decide(self, point: Point, rise: _Rise) -> None:
        level = self._baseline.loss
        noticeable = max(self.rule.trend * abs(rise.excess), level.scale)
        if rise.excess < -self.rule.tolerance * level.scale:
            self._accept_shift()  # The loss fell: whatever gradient norms do, this is no spike.
            return
        if rise.change < -noticeable:
            self._num_steady = 0
            return
        is_diverged = rise.excess > self.rule.threshold * level.scale and self._is_progress_lost(
            rise.excess, level.median, point.step
        )
        is_steady = not rise.is_gradient_falling if rise.has_gradient_risen else rise.change <= noticeable
        self._num_steady = self._num_steady + 1 if is_steady else 0
        is_long_steady = self._num_steady >= self.rule.half_patience_points
        if is_diverged and self._stands_out(point):
            self.alarm = self._loss_alarm(point, rise)
        elif rise.has_gradient_risen and is_long_steady and self._stands_out(point):
            self.alarm = self._gradient_alarm(point, rise)
        elif is_long_steady and not (is_diverged or rise.has_gradient_risen):
            self._accept_shift()

    def _accept_shift(self) -> None:
        self._baseline.restart(self._held)
        self._lowest = None
        self._end_suspicion()

    def _end_suspicion(self) -> None:
        self._held.clear()
        self._onset_step = None
        self._num_steady = 0

    def _rise(self, step: int) -> _Rise:
        held, half = list(self._held), self.rule.half_patience_points
        newer, older = held[-half:], held[:-half]
        value = median(point.loss for point in newer)
        norm, older_norm = _median_norm(newer), _median_norm(older)
        has_risen, level = self._is_gradient_high(norm, step), self._baseline.gradient
        fall = self.rule.trend * (norm - level.median) if level else math.nan
        return _Rise(
            excess=value - self._baseline.loss.median,
            change=value - median(point.loss for point in older) if older else 0.0,
            gradient=norm,
            has_gradient_risen=has_risen,
            is_gradient_falling=has_risen and norm < older_norm - fall,
        )

    def _is_progress_lost(self, excess: float, reference: float, step: int) -> bool:
        return excess >= self.rule.lost_progress_at(step) * max(self._start - reference, 0.0)

    def _follow(self, point: Point) -> None:
        """Move the start and the lowest level with the baseline; a baseline that climbs far is a divergence too."""
        if len(self._baseline) < self.rule.min_window_points:
            return
        level = self._baseline.loss
        self._start = max(self._start, level.median)
        if self._lowest is None or level.median <= self._lowest[0].median:
            self._lowest = level, point.step
        lowest, lowest_step = self._lowest
        excess = level.median - lowest.median
        if excess > self.rule.threshold * lowest.scale and self._is_progress_lost(excess, lowest.median, point.step):
            losses = [kept.loss for kept in self._baseline.points]
            half = len(losses) // 2
            if median(losses[half:]) >= median(losses[:half]):
                self.alarm = self._alarm_on_loss(point.step, lowest_step, level.median, lowest)

    def _first_of_trouble(self) -> int:
        """The held step from which most stand out: where the running sum of +1 (does) and -1 (does not) is lowest."""
        sums = list(accumulate((1 if self._stands_out(point) else -1 for point in self._held), initial=0))
        lowest = len(sums) - 1 - sums[::-1].index(min(sums))
        return self._held[min(lowest, len(self._held) - 1)].step

    def _rewind(self, step: int) -> None:
        self._baseline.drop_from(step)
        while self._held and self._held[-1].step >= step:
            self._held.pop()
        if len(self._held) < 2 * self.rule.half_patience_points:
            self._onset_step = None
            self._num_steady = 0
        if self._lowest is not None and self._lowest[1] >= step:
            self._lowest = None
        if self.alarm is not None and self.alarm.alarm_step >= step:
            self.alarm = None

    def _nonfinite(self, point: Point) -> Alarm:
        is_loss = not math.isfinite(point.loss)
        value = point.loss if is_loss or point.gradient_norm is None else point.gradient_norm
        level = None
        if len(self._baseline) >= self.rule.min_window_points:
            level = self._baseline.loss if is_loss else self._baseline.gradient
        return Alarm(
            kind="nonfinite",
            onset_step=point.step,
            alarm_step=point.step,
            value=value,
            baseline=level.median if level else None,
            scale=level.scale if level else None,
            reason=f"{'loss' if is_loss else 'gradient norm'} is {value} at step {point.step}",
        )

    def _loss_alarm(self, point: Point, rise: _Rise) -> Alarm:
        level = self._baseline.loss
        return self._alarm_on_loss(point.step, self._onset(), level.median + rise.excess, level)

    def _alarm_on_loss(self, step: int, onset_step: int, value: float, level: Level) -> Alarm:
        return Alarm(
            kind="loss",
            onset_step=onset_step,
            alarm_step=step,
            value=value,
            baseline=level.median,
            scale=level.scale,
            reason=(
                f"loss {value:.4g} stays above the {level.median:.4g} from before step {onset_step} (scale "
                f"{level.scale:.2g}) and does not fall; the run began at {self._start:.4g}"
            ),
        )

    def _gradient_alarm(self, point: Point, rise: _Rise) -> Alarm:
        level = self._baseline.gradient
        assert level is not None
        return Alarm(
            kind="gradient",
            onset_step=self._onset(),
            alarm_step=point.step,
            value=rise.gradient,
            baseline=level.median,
            scale=level.scale,
            reason=(
                f"gradient norm {rise.gradient:.4g} stays above the {level.median:.4g} from before step "
                f"{self._onset()} (scale {level.scale:.2g}), and the loss does not fall"
            ),
        )

    def _onset(self) -> int:
        assert self._onset_step is not None
        return self._onset_step


def _median_norm(points: Sequence[Point]) -> float:
    norms = [point.gradient_norm for point in points if point.gradient_norm is not None]
    return median(norms) if norms else math.nan
