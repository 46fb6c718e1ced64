"""The spike detector: against a slow reference, on named curves, and with each part of its rule taken away."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.journal import Measurement
from configs.errors import ConfigError
from tasks.recovery import baseline
from tasks.recovery.curves import generate_curve
from tasks.recovery.detector import SpikeDetector, find_spike
from tasks.recovery.rule import Alarm, Point, SpikeRule, points_of
from tests.tasks.recovery.slow_detector import slow_find_spike

RULE = SpikeRule()
SMALL = SpikeRule(window_points=16, patience_points=6, warmup_steps=20)
LONG = 1600
EVENT = 1000
"""Step of what happens to the curves of this file."""


def curve(
    change: Callable[[np.ndarray], Any] = lambda _: 0.0,
    norm: Callable[[np.ndarray], Any] | None = lambda _: 1.0,
    *,
    sigma: float = 0.03,
    descent: float = 8.0,
    num_steps: int = LONG,
) -> list[Point]:
    """A descent from ``3 + descent`` with noise; both changes are functions of the steps since ``EVENT``."""
    rng, steps = np.random.default_rng(7), np.arange(1, num_steps + 1)
    loss = 3 + descent * (1 + steps / 30) ** -0.8 + sigma * rng.standard_normal(num_steps) + change(steps - EVENT)
    norms = 0.4 * np.exp(0.1 * rng.standard_normal(num_steps)) * (norm(steps - EVENT) if norm else 1)
    return [
        Point(step=int(step), loss=float(loss[i]), gradient_norm=float(norms[i]) if norm else None)
        for i, step in enumerate(steps)
    ]


def jump(size: float, *, steps: float = math.inf) -> Callable[[np.ndarray], np.ndarray]:
    """Up by ``size`` at once, for so many steps."""
    return lambda since: size * ((since >= 0) & (since < steps))


def heal(size: float, within: float) -> Callable[[np.ndarray], np.ndarray]:
    """Up at once, back as an exponential."""
    return lambda since: size * (since >= 0) * np.exp(-np.clip(since, 0, None) / within)


def brief(alarm: Alarm | None) -> tuple[str, int, int] | None:
    return alarm and (alarm.kind, alarm.onset_step, alarm.alarm_step)


def observed(points: Iterable[Point], rule: SpikeRule) -> Alarm | None:
    detector = SpikeDetector(rule)
    alarms = [alarm for point in points if (alarm := detector.observe(point))]
    assert all(alarm is alarms[0] for alarm in alarms)
    return alarms[0] if alarms else None


STRETCHES = st.lists(
    st.tuples(
        st.integers(1, 40),
        st.sampled_from([3.0, 3.0, 3.2, 4.0, 9.0, 12.0, 1.0]),
        st.sampled_from([0.0, 0.0, -0.05, 0.05, 0.3]),
        st.sampled_from([1.0, 1.0, 3.0, 30.0, None]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=120, deadline=None)
@given(stretches=STRETCHES, seed=st.integers(0, 10), bad=st.sampled_from([None, None, math.nan, math.inf]))
def test_find_spike_on_any_curve_equals_the_reference(stretches: list[Any], seed: int, bad: float | None) -> None:
    rng, losses, norms = np.random.default_rng(seed), list(np.linspace(9, 3, 30)), [1.0] * 30
    for length, start, slope, norm in stretches:
        losses += list(start + slope * np.arange(length))
        norms += [norm] * length
    if bad is not None:
        losses[int(rng.integers(len(losses)))] = bad
    points = [
        Point(
            step=3 * i,
            loss=loss + 0.02 * float(rng.standard_normal()),
            gradient_norm=norm and norm * float(np.exp(0.1 * rng.standard_normal())),
        )
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]
    expected = slow_find_spike(points, SMALL)
    assert brief(find_spike(points, SMALL)) == expected
    assert brief(observed(points, SMALL)) == expected


@pytest.mark.parametrize("kind", ["blow-up", "gradient norm first", "oscillating", "slow divergence", "healing bump"])
def test_find_spike_on_generated_curves_equals_the_reference(kind: str) -> None:
    points = list(generate_curve(kind, 3).points())
    expected = slow_find_spike(points, RULE)
    assert brief(find_spike(points, RULE)) == brief(observed(points, RULE)) == expected
    assert (expected is None) == (kind == "healing bump")


HARMLESS = {
    "clean": curve(),
    "three outliers in a row": curve(jump(30, steps=3), lambda since: 1 + jump(80, steps=3)(since)),
    "flat bump of 40 steps": curve(jump(3, steps=40)),
    "bump that heals slowly": curve(heal(4, 80), lambda since: 1 + heal(20, 80)(since)),
    "data switch up": curve(jump(0.4), lambda since: 1 + jump(0.8)(since)),
    "data switch down": curve(jump(-1.0)),
    "slow drift": curve(lambda since: 3e-4 * np.clip(since + 500, 0, None)),
    "noise without progress": curve(descent=0.0, sigma=0.3),
    "larger gradient norms": curve(norm=lambda since: 1 + jump(1.6)(since)),
    "gradient norms that heal slowly": curve(norm=lambda since: 1 + heal(60, 120)(since)),
    "loss falls while gradient norms rise": curve(
        lambda since: -0.004 * np.clip(since, 0, 400), lambda since: 1 + jump(9)(since)
    ),
    "bump in warm-up": curve(lambda since: heal(2.5, 1e9)(since + 850) - heal(2.5, 1e9)(since + 750)),
}
LOST = {
    "plateau": curve(jump(3)),
    "plateau without gradient norms": curve(jump(3), None),
    "plateau after a huge outlier": curve(lambda since: jump(3)(since) + jump(1e6, steps=2)(since + 60)),
    "plateau in warm-up": curve(lambda since: jump(6)(since + 880)),
    "gradient norms alone": curve(norm=lambda since: 1 + jump(9)(since)),
    "slow and noisy": curve(lambda since: 3.5 * np.clip(since, 0, 500) / 500, None, sigma=0.25),
    "half healed": curve(lambda since: jump(2)(since) + heal(3, 40)(since)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_find_spike_on_a_harmless_curve_is_silent(name: str) -> None:
    assert find_spike(HARMLESS[name], RULE) is None


@pytest.mark.parametrize("name", LOST)
def test_find_spike_on_a_lost_curve_alarms_after_its_onset(name: str) -> None:
    alarm = find_spike(LOST[name], RULE)
    begins = {"plateau in warm-up": 120}.get(name, EVENT)
    assert alarm is not None
    assert alarm.kind == ("gradient" if name == "gradient norms alone" else "loss")
    assert begins < alarm.alarm_step <= begins + (400 if name == "slow and noisy" else 4 * RULE.patience_points)
    if name != "slow and noisy":
        assert abs(alarm.onset_step - begins) <= 1
    assert str(alarm.onset_step) in alarm.reason


def by_deviation(values: Sequence[float]) -> baseline.Level:
    return baseline.Level(median=float(np.median(values)), scale=float(np.std(values)))


def by_values(values: Sequence[float]) -> baseline.Level:
    centre = float(np.median(values))
    return baseline.Level(median=centre, scale=1.4826 * float(np.median(np.abs(np.array(values) - centre))))


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("three outliers in a row", {"patience_points": 1}),
        ("flat bump of 40 steps", {"patience_points": 16}),
        ("bump that heals slowly", {"trend": 100.0}),
        ("data switch up", {"lost_progress": 0.0}),
        ("noise without progress", {"threshold": 0.0, "tolerance": 0.0}),
        ("larger gradient norms", {"gradient_ratio": 1.5}),
        ("bump in warm-up", {"warmup_steps": 0}),
        ("bump in warm-up", {"warmup_lost_progress": 0.1}),
    ],
)
def test_find_spike_without_a_part_of_the_rule_raises_a_false_alarm(name: str, without: dict[str, Any]) -> None:
    assert find_spike(HARMLESS[name], replace(RULE, **without)) is not None


def test_find_spike_without_the_gradient_norm_misses_what_the_loss_does_not_show() -> None:
    assert find_spike(LOST["gradient norms alone"], replace(RULE, gradient_ratio=1e9)) is None


@pytest.mark.parametrize(
    ("name", "scale"), [("plateau after a huge outlier", by_deviation), ("plateau in warm-up", by_values)]
)
def test_find_spike_with_a_scale_that_is_not_robust_misses(
    name: str, scale: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "level_of", scale)
    alarm = find_spike(LOST[name][: EVENT + 200], RULE)
    assert alarm is None or (name == "plateau in warm-up" and alarm.alarm_step > RULE.warmup_steps)


def test_find_spike_without_the_climbing_baseline_misses_a_slow_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = SpikeDetector._follow

    def only_start(detector: SpikeDetector, point: Point) -> None:
        lowest(detector, point)
        detector.alarm = detector._lowest = None

    monkeypatch.setattr(SpikeDetector, "_follow", only_start)
    assert find_spike(LOST["slow and noisy"], RULE) is None


def test_find_spike_of_a_run_from_weights_needs_the_start_loss_for_a_data_switch() -> None:
    points = curve(jump(0.3), descent=0.05)
    assert find_spike(points, RULE) is not None
    assert find_spike(points, replace(RULE, start_loss=11.0)) is None
    assert find_spike(curve(jump(3), descent=0.05), replace(RULE, start_loss=11.0)) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [1, 30, EVENT])
@pytest.mark.parametrize("field", ["loss", "gradient_norm"])
def test_find_spike_on_a_value_that_is_not_finite_alarms_at_once(value: float, step: int, field: str) -> None:
    points = curve()
    points[step - 1] = replace(points[step - 1], **{field: value})
    alarm = find_spike(points, RULE)
    assert alarm is not None
    assert (alarm.kind, alarm.onset_step, alarm.alarm_step) == ("nonfinite", step, step)
    assert alarm.value is value or alarm.value == value
    assert (alarm.baseline is None) == (step < RULE.min_window_points)
    assert field.replace("_", " ") in alarm.reason


@pytest.mark.parametrize("name", [*HARMLESS, *LOST])
@pytest.mark.parametrize(("factor", "shift"), [(1 / math.log(2), 0.0), (1000.0, 0.0), (1.0, -50.0), (0.25, 7.0)])
def test_find_spike_does_not_depend_on_the_unit_or_zero_of_the_loss(name: str, factor: float, shift: float) -> None:
    points = {**HARMLESS, **LOST}[name]
    moved = [replace(point, loss=factor * point.loss + shift) for point in points]
    assert brief(find_spike(moved, RULE)) == brief(find_spike(points, RULE))


def test_find_spike_never_alarms_on_a_falling_loss() -> None:
    for rate in (0.001, 0.01, 0.1):
        points = curve(
            lambda since, rate=rate: -rate * np.clip(since + 900, 0, None), lambda since: 1 + jump(50)(since)
        )
        assert find_spike(points, RULE) is None


def test_find_spike_of_a_resumed_run_takes_the_last_word_for_a_step() -> None:
    lost, healthy = LOST["plateau"], HARMLESS["clean"]
    before = EVENT - 100
    assert find_spike([*lost[: EVENT + 20], *healthy[before:]], RULE) is None
    assert brief(find_spike([*healthy, *lost[before:]], RULE)) == brief(find_spike(lost, RULE))


def test_observe_after_going_back_forgets_the_alarm_and_finds_the_next_one() -> None:
    lost, healthy = LOST["plateau"], HARMLESS["clean"]
    detector = SpikeDetector(RULE)
    assert [detector.observe(point) for point in lost][-1] is not None
    assert not any(detector.observe(point) for point in healthy[EVENT - 100 :])
    again = [detector.observe(point) for point in lost[EVENT - 60 :]][-1]
    assert again is not None and again.onset_step == EVENT


def test_observe_of_a_repeated_stretch_stays_silent_at_every_point_of_return() -> None:
    points = HARMLESS["bump that heals slowly"]
    for back in range(EVENT - 30, EVENT + 300, 37):
        assert observed_last([*points[: EVENT + 300], *points[back:]]) is None


def observed_last(points: Iterable[Point]) -> Alarm | None:
    detector = SpikeDetector(RULE)
    return [detector.observe(point) for point in points][-1]


def test_detector_memory_does_not_grow_with_the_run() -> None:
    detector, sizes = SpikeDetector(RULE), []
    for i, point in enumerate(curve(num_steps=6000)):
        detector.observe(point)
        if i % 2000 == 1999:
            sizes.append(len(pickle.dumps(detector)))
    assert max(sizes) < 1.2 * min(sizes)


class Counted(float):
    """A number that counts what is done with it."""

    operations = 0

    def __sub__(self, other: float) -> Counted:
        Counted.operations += 1
        return Counted(float(self) - float(other))

    def __abs__(self) -> Counted:
        return Counted(float.__abs__(self))

    def __lt__(self, other: float) -> bool:
        Counted.operations += 1
        return float(self) < float(other)


def most_operations(window: int, points: Sequence[Point]) -> int:
    detector, most = SpikeDetector(replace(RULE, window_points=window)), 0
    for point in points:
        Counted.operations = 0
        detector.observe(replace(point, loss=Counted(point.loss), gradient_norm=None))
        most = max(most, Counted.operations)
    return most


@pytest.mark.parametrize("name", ["clean", "bump that heals slowly", "three outliers in a row"])
def test_observe_costs_no_more_than_sorting_the_window(name: str) -> None:
    points = HARMLESS[name][600:1300]
    for window in (64, 256):
        size = window + RULE.patience_points
        assert window <= most_operations(window, points[:300])
        assert most_operations(window, points) <= 4 * size * math.log2(size)


def test_points_of_takes_steps_with_a_loss() -> None:
    rows: list[dict[str, float]] = [
        {"train/loss": 2.0, "train/gradient_norm": 0.5},
        {"held_out/loss": 1.0},
        {"train/loss": math.inf},
    ]
    measurements = [Measurement(step=i, tokens=10 * i, time=0.0, metrics=row) for i, row in enumerate(rows)]
    assert list(points_of(measurements)) == [
        Point(step=0, loss=2.0, gradient_norm=0.5),
        Point(step=2, loss=math.inf, gradient_norm=None),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"window_points": 7},
        {"patience_points": 0},
        {"threshold": math.nan},
        {"tolerance": 7.0},
        {"lost_progress": -0.1},
        {"gradient_ratio": 0.5},
        {"warmup_steps": -1},
        {"start_loss": math.inf},
        {"trend": -1.0},
    ],
)
def test_rule_with_an_impossible_number_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"spikes.{next(iter(wrong))}"):
        SpikeRule(**wrong)
