"""The detector's rule once more, from whole histories by NumPy: an oracle that shares no code with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tasks.recovery.rule import Point, SpikeRule


def slow_find_spike(  # noqa: PLR0912, PLR0915 - the whole rule on a page, sharing nothing with the real one
    points: Sequence[Point], rule: SpikeRule
) -> tuple[str, int, int] | None:
    """Kind, onset and step of the first alarm, from whole histories by NumPy: what the fast one has to say."""
    half, base, held = (rule.patience_points + 1) // 2, list[Point](), list[Point]()
    start = -math.inf if rule.start_loss is None else rule.start_loss
    lowest: tuple[float, float, int] | None = None
    onset, settled = None, 0

    def level(values: list[float]) -> tuple[float, float]:
        return float(np.median(values)), 1.4826 / math.sqrt(2) * float(np.median(np.abs(np.diff(values))))

    def norms(of: list[Point]) -> list[float]:
        return [point.gradient_norm for point in of if point.gradient_norm is not None]

    def norm_is_high(norm: float, step: int) -> bool:
        window = base[-rule.window_points :]
        if math.isnan(norm) or 2 * len(norms(window)) < len(window) or step <= rule.warmup_steps:
            return False
        centre, scale = level(norms(window))
        return norm - centre > rule.threshold * scale and norm >= rule.gradient_ratio * centre

    def is_odd(point: Point) -> bool:
        if len(base) < rule.window_points // 4:
            return False
        centre, scale = level([p.loss for p in base[-rule.window_points :]])
        norm = math.nan if point.gradient_norm is None else point.gradient_norm
        return point.loss - centre > rule.threshold * scale or norm_is_high(norm, point.step)

    for point in points:
        step = point.step
        share = rule.warmup_lost_progress if step <= rule.warmup_steps else rule.lost_progress
        if not math.isfinite(point.loss) or not all(map(math.isfinite, norms([point]))):
            return "nonfinite", step, step
        if not held and not is_odd(point):
            base.append(point)
            if len(base) < rule.window_points // 4:
                continue
            losses = [p.loss for p in base[-rule.window_points :]]
            centre, scale = level(losses)
            start = max(start, centre)
            lowest = (centre, scale, step) if lowest is None or centre <= lowest[0] else lowest
            far = centre - lowest[0] > rule.threshold * lowest[1]
            far = far and centre - lowest[0] >= share * max(start - lowest[0], 0)
            if far and np.median(losses[len(losses) // 2 :]) >= np.median(losses[: len(losses) // 2]):
                return "loss", lowest[2], step
            continue
        held.append(point)
        if len(held) < half:
            continue
        centre, scale = level([p.loss for p in base[-rule.window_points :]])
        newer, older = held[-half:], held[-2 * half : -half]
        excess = float(np.median([p.loss for p in newer])) - centre
        new_norm = float(np.median(norms(newer))) if norms(newer) else math.nan
        old_norm = float(np.median(norms(older))) if norms(older) else math.nan
        norm_high = norm_is_high(new_norm, step)
        if excess <= rule.tolerance * scale and not norm_high:
            base, held, onset, settled = base + newer, [], None, 0
            continue
        if len(held) < 2 * half:
            continue
        if onset is None:
            odd = [is_odd(p) for p in held[-2 * half :]]
            scores = [2 * sum(odd[:i]) - i for i in range(2 * half + 1)]
            best = max(i for i in range(2 * half + 1) if scores[i] == min(scores))
            onset = held[-2 * half :][min(best, 2 * half - 1)].step
        change = excess + centre - float(np.median([p.loss for p in older]))
        noticeable = max(rule.trend * abs(excess), scale)
        lost = excess > rule.threshold * scale and excess >= share * max(start - centre, 0)
        is_over = excess < -rule.tolerance * scale
        if not is_over and change < -noticeable:
            settled = 0
        elif not is_over:
            norm_falls = norm_high and new_norm < old_norm - rule.trend * (
                new_norm - level(norms(base[-rule.window_points :]))[0]
            )
            settled = settled + 1 if (not norm_falls if norm_high else change <= noticeable) else 0
            if is_odd(point) and (lost or (norm_high and settled >= half)):
                return "loss" if lost else "gradient", onset, step
            is_over = settled >= half and not lost and not norm_high
        if is_over:
            base, held, lowest, onset, settled = held[-2 * half :], [], None, None, 0
    return None
