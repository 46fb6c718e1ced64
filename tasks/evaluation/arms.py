"""Two arms that differ in the weights they began with alone: their figures, and what they differ by.

Differences are the arm that is asked about less its control, on matched measurements: held-out slices of the same
text, and training steps on the same batches. Steps follow one another closely, so they are compared in blocks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tasks.evaluation.held_out import Evaluation
from tasks.evaluation.paired import Difference, over_seeds, paired_difference, paired_ratio
from tasks.recovery.baseline import Baseline
from tasks.recovery.detector import SpikeDetector
from tasks.recovery.rule import Point, SpikeRule

NUM_BLOCKS = 20
"""Blocks of consecutive steps that a run is cut into, unless they would be shorter than :data:`LEAST_STEPS`."""
LEAST_STEPS = 8
"""Of a block: its variance is to mean something."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What was measured of one arm."""

    initial: Evaluation | None
    """Of the weights that it began with."""
    held_out: Mapping[int, Evaluation]
    """Of its snapshots, by tokens seen."""
    points: Sequence[Point]
    """Loss and gradient norm of its steps, by step, on the run's way."""
    num_recoveries: int = 0
    """Spikes that the run recovered from; their steps are not among ``points`` any more."""

    @property
    def final(self) -> Evaluation | None:
        """Of its last snapshot that was evaluated."""
        return self.held_out[max(self.held_out)] if self.held_out else None


@dataclass(frozen=True, kw_only=True)
class ArmFigures:
    """One arm in figures; None where nothing was measured."""

    initial_loss: float | None
    """Held-out loss of the weights that it began with, nats per token."""
    held_out: tuple[tuple[int, float], ...]
    """Tokens seen and held-out loss of its snapshots."""
    final_loss: float | None
    """Held-out loss at the end."""
    final_domains: dict[str, float]
    """The same by domain."""
    final_bits_per_byte: float | None
    """The same in bits per byte of text."""
    training_loss: float | None
    """Mean over the last block of steps."""
    gradient_norm: float | None
    """Mean before clipping, over all steps."""
    gradient_variance: float | None
    """Mean over blocks of the variance within them: of the noise, not of a slow drift."""
    num_spikes: int
    """Divergences: those that the detector finds, and those that were recovered from."""
    num_excursions: int
    """Steps whose loss or gradient norm stands out of the steps before, whether or not it comes back."""


@dataclass(frozen=True, kw_only=True)
class ArmComparison:
    """Both arms of one seed, and what they differ by."""

    seed: int
    """Of both."""
    init: ArmFigures
    """The arm that is asked about."""
    control: ArmFigures
    """The arm that it is held against."""
    differences: dict[str, Difference]
    """By quantity; those that could not be measured are left out."""
    curve: dict[int, Difference]
    """Difference of the held-out loss by tokens seen, 0 for the weights at the start."""


def compare_arms(seed: int, init: Arm, control: Arm, rule: SpikeRule) -> ArmComparison:
    """What ``init`` and ``control``, trained with the same ``seed``, differ by; ``rule`` says what is a spike."""
    curve, first, second = _curve(init, control), figures_of(init, rule), figures_of(control, rule)
    found: dict[str, Difference | None] = {
        "initial_loss": curve.get(0),
        "final_loss": curve[max(curve)] if curve and max(curve) else None,
        "held_out_loss": _whole_curve(init, control),
        **_by_blocks(init, control),
        **_once_a_seed(first, second),
    }
    return ArmComparison(
        seed=seed,
        init=first,
        control=second,
        differences={name: item for name, item in found.items() if item is not None},
        curve=curve,
    )


def compare_seeds(comparisons: Sequence[ArmComparison]) -> dict[str, Difference]:
    """Differences by quantity over seeds: each seed is one pair, so that their intervals hold for further seeds."""
    names = dict.fromkeys(name for comparison in comparisons for name in comparison.differences)
    found = {name: over_seeds([c.differences[name] for c in comparisons if name in c.differences]) for name in names}
    return {name: item for name, item in found.items() if item is not None}


def figures_of(arm: Arm, rule: SpikeRule) -> ArmFigures:
    """The arm in figures."""
    blocks, final = cut_blocks(arm.points), arm.final
    norms = [_norms(block) for block in blocks]
    every = [norm for block in norms for norm in block]
    return ArmFigures(
        initial_loss=arm.initial.loss if arm.initial else None,
        held_out=tuple((tokens, arm.held_out[tokens].loss) for tokens in sorted(arm.held_out)),
        final_loss=final.loss if final else None,
        final_domains=dict(final.domains) if final else {},
        final_bits_per_byte=final.bits_per_byte if final else None,
        training_loss=_mean([point.loss for point in blocks[-1]]) if blocks else None,
        gradient_norm=_mean(every),
        gradient_variance=_mean([statistics.variance(block) for block in norms if len(block) > 1]),
        num_spikes=count_spikes(arm.points, rule) + arm.num_recoveries,
        num_excursions=count_excursions(arm.points, rule),
    )


def cut_blocks(points: Sequence[Point]) -> list[Sequence[Point]]:
    """``points`` in :data:`NUM_BLOCKS` runs of neighbours, as equal as can be; fewer where they would be too short."""
    count = min(NUM_BLOCKS, len(points) // LEAST_STEPS) or min(len(points), 1)
    borders = [len(points) * number // count for number in range(count + 1)] if count else []
    return [points[first:last] for first, last in pairwise(borders)]


def count_spikes(points: Sequence[Point], rule: SpikeRule) -> int:
    """Divergences in ``points``: alarms of the detector, which begins anew after each."""
    found, detector = 0, SpikeDetector(rule)
    for point in points:
        if detector.observe(point) is not None:
            found, detector = found + 1, SpikeDetector(rule)
    return found


def count_excursions(points: Sequence[Point], rule: SpikeRule) -> int:
    """Steps whose loss or gradient norm lies ``rule.threshold`` scales above the median of the window before, or is not finite.

    A gradient norm counts from ``rule.gradient_ratio`` times its median on, and once warm-up is over.
    """
    found, baseline = 0, Baseline(rule.window_points)
    for point in points:
        if not point.is_finite:
            found += 1
            continue
        if len(baseline) >= rule.min_window_points and _stands_out(point, baseline, rule):
            found += 1
        baseline.add([point])
    return found


def _stands_out(point: Point, baseline: Baseline, rule: SpikeRule) -> bool:
    if point.loss - baseline.loss.median > rule.threshold * baseline.loss.scale:
        return True
    norm, level = point.gradient_norm, baseline.gradient
    if norm is None or level is None or point.step <= rule.warmup_steps:
        return False
    return norm - level.median > rule.threshold * level.scale and norm >= rule.gradient_ratio * level.median


def _curve(init: Arm, control: Arm) -> dict[int, Difference]:
    """Difference of held-out losses wherever both arms were measured on the same slices."""
    pairs = {0: (init.initial, control.initial)} if init.initial and control.initial else {}
    pairs |= {tokens: (init.held_out[tokens], control.held_out[tokens]) for tokens in _common(init, control)}
    found = [(tokens, paired_difference(a.slices, b.slices, "slices")) for tokens, (a, b) in pairs.items()]
    return {tokens: item for tokens, item in found if item is not None}


def _whole_curve(init: Arm, control: Arm) -> Difference | None:
    """Difference of held-out losses, of each slice its mean over all snapshots."""
    common = _common(init, control)
    if not common:
        return None
    first, second = (
        [statistics.fmean(losses) for losses in zip(*(arm.held_out[tokens].slices for tokens in common), strict=True)]
        for arm in (init, control)
    )
    return paired_difference(first, second, "slices")


def _common(init: Arm, control: Arm) -> list[int]:
    return sorted(init.held_out.keys() & control.held_out.keys())


def _by_blocks(init: Arm, control: Arm) -> dict[str, Difference | None]:
    """Differences of what was measured at every step, over blocks of the steps that both arms made."""
    steps = {point.step for point in init.points if point.is_finite} & {p.step for p in control.points if p.is_finite}
    first, second = (cut_blocks([point for point in arm.points if point.step in steps]) for arm in (init, control))

    def each(figure: Callable[[Sequence[Point]], float]) -> tuple[list[float], list[float]]:
        return [figure(block) for block in first], [figure(block) for block in second]

    return {
        "training_loss": paired_difference(*each(lambda block: statistics.fmean(p.loss for p in block)), "blocks"),
        "gradient_norm": paired_ratio(*each(lambda block: _mean(_norms(block)) or math.nan), "blocks"),
        "gradient_variance": paired_ratio(*each(_variance), "blocks"),
    }


def _once_a_seed(init: ArmFigures, control: ArmFigures) -> dict[str, Difference | None]:
    """Differences of what a seed has one value of: only further seeds give them an interval."""
    pairs: dict[str, tuple[float, float]] = {
        "num_spikes": (init.num_spikes, control.num_spikes),
        "num_excursions": (init.num_excursions, control.num_excursions),
    }
    if len(init.final_domains) > 1:
        common = [name for name in init.final_domains if name in control.final_domains]
        pairs |= {f"final_loss/{name}": (init.final_domains[name], control.final_domains[name]) for name in common}
    return {name: paired_difference([a], [b], "seeds") for name, (a, b) in pairs.items()}


def _variance(block: Sequence[Point]) -> float:
    norms = _norms(block)
    return statistics.variance(norms) if len(norms) > 1 else math.nan


def _norms(points: Sequence[Point]) -> list[float]:
    return [p.gradient_norm for p in points if p.gradient_norm is not None and math.isfinite(p.gradient_norm)]


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None
