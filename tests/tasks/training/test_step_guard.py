"""Step guards: against OLMo-core's and ZClip's arithmetic done with torch, through a resume, and on hostile numbers."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from configs.training import OptimizerConfig
from tasks.training.step_guard import Decision, StepGuard, build_guard

Numbers = list[tuple[float, float]]

SKIP = OptimizerConfig(guard="skip-step", guard_window_steps=32)
ZCLIP = OptimizerConfig(guard="zclip")
GUARDS = [OptimizerConfig(), SKIP, ZCLIP]


def unquiet(seed: int, steps: int = 400, factor: float = 12.0) -> Numbers:
    """Losses and gradient norms that fall noisily, with one step in thirty far off, up or down."""
    rng = np.random.default_rng(seed)
    losses = 2 + 3 * np.exp(-np.arange(steps) / 80) + 0.03 * rng.standard_normal(steps)
    norms = np.exp(0.2 * rng.standard_normal(steps))
    odd = rng.random(steps) < 1 / 30
    losses += odd * rng.normal(0, factor * 0.1, steps)
    norms *= np.where(rng.random(steps) < 1 / 30, factor, 1)
    return list(zip(losses.tolist(), norms.tolist(), strict=True))


def decisions(guard: StepGuard, numbers: Numbers) -> list[Decision]:
    return [guard.observe(loss, norm) for loss, norm in numbers]


def test_skip_step_on_unquiet_runs_skips_what_the_rule_of_olmo_core_skips() -> None:
    numbers = unquiet(3)
    expected = []
    for step, row in enumerate(numbers):
        skip = False
        for column in (0, 1):
            before = torch.tensor([item[column] for item in numbers[max(0, step - 32) : step]], dtype=torch.float64)
            if step + 1 >= max(20, 32 // 2):
                deviation, mean = torch.std_mean(before)
                skip |= bool((row[column] - mean).abs() / deviation > 6)
        expected.append(not skip)
    found = [decision.apply for decision in decisions(build_guard(SKIP), numbers)]
    assert found == expected
    assert 5 < expected.count(False) < 100
    skipped = [numbers[i][0] for i, applied in enumerate(found) if not applied]
    assert min(skipped) < 2 < max(skipped), "the rule counts drops as well as rises"


def test_skip_step_of_a_lasting_change_of_level_gives_in_within_a_window() -> None:
    rng = np.random.default_rng(0)
    level = np.where(np.arange(200) < 100, 2.0, 4.0) + 0.01 * rng.standard_normal(200)
    found = decisions(build_guard(SKIP), [(float(loss), 1.0) for loss in level])
    refused = [step for step, decision in enumerate(found) if not decision.apply]
    assert refused[0] == 100
    assert refused[-1] < 132
    assert "loss 4" in found[100].reason


def test_skip_step_of_a_bad_stretch_gives_in_once_four_of_its_steps_are_in_the_window() -> None:
    # With k equal outliers among n = 128 values the next is sqrt((n - k) (n - 1) / (n k)) deviations off: 6.4 for 3, 5.5 for 4.
    noise = np.random.default_rng(1).standard_normal(200) * 1e-6
    guard = build_guard(OptimizerConfig(guard="skip-step"))
    decisions(guard, [(2.0 + float(value), 1.0) for value in noise])
    assert [guard.observe(9.0, 1.0).apply for _ in range(8)] == [False] * 4 + [True] * 4


def test_skip_step_where_all_was_equal_so_far_applies_what_is_equal_and_no_other() -> None:
    guard = build_guard(SKIP)
    assert all(decision.apply for decision in decisions(guard, [(2.0, 1.0)] * 60))
    assert not guard.observe(2.0, 1.0 + 1e-9).apply


def test_zclip_on_unquiet_runs_clips_to_the_limits_of_its_authors_code() -> None:
    numbers = unquiet(5)
    norms = np.array([norm for _, norm in numbers])
    warmup = norms[:25]
    mean, variance = warmup.mean(), warmup.var()
    expected: list[float | None] = [None] * 25
    for norm in norms[25:]:
        z = (norm - mean) / (variance**0.5 + 1e-6)
        clipped = mean + (2.5 * variance**0.5) / (z / 2.5) if z > 2.5 else norm
        expected.append(clipped if z > 2.5 else None)
        mean = 0.97 * mean + 0.03 * clipped
        variance = 0.97 * variance + 0.03 * (clipped - mean) ** 2
    found = decisions(build_guard(ZCLIP), numbers)
    assert all(decision.apply for decision in found)
    # Sums are taken in another order: a few units in the last place, carried through 400 steps.
    assert [decision.max_norm for decision in found] == [
        value and pytest.approx(value, rel=1e-12) for value in expected
    ]
    limits = [(norm, decision.max_norm) for norm, decision in zip(norms, found, strict=True) if decision.max_norm]
    assert len(limits) > 5
    assert all(limit < norm for norm, limit in limits)


def test_zclip_clips_farther_outliers_to_smaller_norms() -> None:
    calm = [(2.0, 1.0 + 0.1 * math.sin(step)) for step in range(60)]
    limits = []
    for norm in (2.0, 8.0, 1e6):
        guard = build_guard(ZCLIP)
        decisions(guard, calm)
        limits.append(guard.observe(2.0, norm).max_norm)
    assert limits[0] > limits[1] > limits[2] > 0.99  # type: ignore[operator]


@pytest.mark.parametrize("config", GUARDS, ids=lambda config: config.guard)
@pytest.mark.parametrize("bad", [(math.nan, 1.0), (2.0, math.nan), (2.0, math.inf), (-math.inf, math.inf)])
def test_guard_given_a_non_finite_value_refuses_it_and_forgets_it(
    config: OptimizerConfig, bad: tuple[float, float]
) -> None:
    numbers = unquiet(7, steps=120)
    with_bad, without = build_guard(config), build_guard(config)
    for step, row in enumerate(numbers):
        if step in (3, 90):
            before = with_bad.state()
            refused = with_bad.observe(*bad)
            assert (refused.apply, refused.max_norm) == (False, None)
            assert "not finite" in refused.reason
            assert with_bad.state() == before
        assert with_bad.observe(*row) == without.observe(*row)


@pytest.mark.parametrize("config", GUARDS, ids=lambda config: config.guard)
@pytest.mark.parametrize("cut", [0, 1, 10, 24, 25, 26, 200])
def test_guard_restored_through_json_decides_as_the_uninterrupted_one(config: OptimizerConfig, cut: int) -> None:
    numbers = unquiet(11)
    whole = build_guard(config)
    expected = decisions(whole, numbers)
    first, second = build_guard(config), build_guard(config)
    decisions(first, numbers[:cut])
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert decisions(second, numbers[cut:]) == expected[cut:]
    assert second.state() == whole.state()


def test_guards_differ_on_the_same_run() -> None:
    found = [decisions(build_guard(config), unquiet(13)) for config in GUARDS]
    assert [any(not decision.apply for decision in run) for run in found] == [False, True, False]
    assert [any(decision.max_norm for decision in run) for run in found] == [False, False, True]


@pytest.mark.parametrize(
    ("config", "state", "message"),
    [
        (SKIP, ZCLIP, "state of guard 'zclip' given to guard 'skip-step'"),
        (OptimizerConfig(), {}, "state of guard None given to guard 'none'"),
        (SKIP, {"guard": "skip-step", "losses": [1.0], "gradient_norms": []}, "1 losses and 0 gradient norms"),
        (SKIP, {"guard": "skip-step", "losses": ["1"], "gradient_norms": [1.0]}, "losses must be a list of finite"),
        (SKIP, {"guard": "skip-step", "losses": [True], "gradient_norms": [1.0]}, "losses must be a list of finite"),
        (ZCLIP, {"guard": "zclip", "warmup_norms": [math.nan], "mean_and_variance": []}, "warmup_norms must be"),
        (ZCLIP, {"guard": "zclip", "warmup_norms": [], "mean_and_variance": [1.0]}, "expected a mean and a variance"),
        (ZCLIP, {"guard": "zclip", "warmup_norms": [], "mean_and_variance": [1.0, -1.0]}, "expected a mean"),
        (ZCLIP, {"guard": "zclip"}, "warmup_norms must be a list"),
    ],
)
def test_restore_from_a_state_that_is_not_its_own_is_refused(
    config: OptimizerConfig, state: dict[str, Any] | OptimizerConfig, message: str
) -> None:
    values = build_guard(state).state() if isinstance(state, OptimizerConfig) else state
    with pytest.raises(ValueError, match=message):
        build_guard(config).restore(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guard_window_steps", 1),
        ("guard_sigma", 0.0),
        ("guard_sigma", math.nan),
        ("zclip_decay", 1.0),
        ("zclip_threshold", -1.0),
        ("zclip_threshold", math.inf),
        ("zclip_warmup_steps", 1),
    ],
)
def test_impossible_guard_settings_are_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.{key}="):
        OptimizerConfig(**{key: value})  # type: ignore[arg-type]
