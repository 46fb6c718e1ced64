"""The detector on real, short training runs with faults made on purpose, against the same runs without them."""

from __future__ import annotations

import functools

import pytest

from benchmarks.provoke import Trained, configure, train
from pipelines.study.faults import SETTINGS, SMALL, Setting
from tasks.recovery.detector import find_spike
from tasks.recovery.policy import rule_of

FAULT = 48
BRIEF = (
    *SMALL,
    "training.sequence_length=32",
    "training.batch_tokens=256",
    "schedule.warmup_tokens=2048",
    "recovery.window_steps=32",
    "recovery.patience_steps=12",
)
"""Steps of 256 tokens, so that a run is a second: 8 sequences a step, a warmup of 8 steps, 12 steps of patience."""


@functools.cache
def trained(*faults: str) -> Trained:
    return train(
        configure(Setting(about="", overrides=BRIEF, num_steps=2 * FAULT), seed=1, overrides=faults), 2 * FAULT
    )


@pytest.mark.parametrize(
    ("faults", "kind"),
    [
        (("drill.corruption=scale-moments", "drill.corruption_scale=1000", "drill.corruption_fraction=1"), "loss"),
        (("drill.corruption=nan-weights", "drill.corruption_fraction=1e-9"), "nonfinite"),
        (
            ("drill.poison=random-tokens", f"drill.poison_start_sequence={8 * FAULT}", "drill.poison_sequences=384"),
            "loss",
        ),
    ],
    ids=["moments", "nan", "poison"],
)
def test_run_with_a_fault_alarms_after_it_and_is_as_without_before(faults: tuple[str, ...], kind: str) -> None:
    if faults[0].startswith("drill.corruption"):
        faults = (*faults, f"drill.corruption_step={FAULT}")
    points, clean = trained(*faults).points, trained().points
    assert points[:FAULT] == clean[:FAULT]
    # Damaged moments show from the update after the fault on, so in the loss of the step after that.
    assert points[FAULT + 1] != clean[FAULT + 1]
    rule = rule_of(configure(Setting(about="", overrides=BRIEF, num_steps=0), seed=1))
    assert find_spike(clean, rule) is None
    alarm = find_spike(points, rule)
    assert alarm is not None
    assert alarm.kind == kind
    assert FAULT < alarm.onset_step <= FAULT + 3
    assert alarm.alarm_step <= FAULT + 24


def test_run_whose_weights_hold_a_nan_refuses_every_update_from_there_on() -> None:
    faults = ("drill.corruption=nan-weights", "drill.corruption_fraction=1e-9", f"drill.corruption_step={FAULT}")
    assert trained(*faults).num_refused == FAULT
    assert trained().num_refused == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_named_settings_are_configurations_and_hold_at_most_one_fault(name: str) -> None:
    setting = SETTINGS[name]
    config = configure(setting, seed=7)
    faults = (config.drill.poison != "none") + (config.drill.corruption != "none")
    assert faults == (setting.fault_step is not None)
    assert config.training.total_steps >= setting.num_steps
    if config.drill.poison != "none":
        assert config.drill.poison_start_sequence == config.training.batch_sequences * (setting.fault_step or 0)
