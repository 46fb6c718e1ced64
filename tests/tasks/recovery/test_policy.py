"""Which way back a spike is answered with: windows, escalation, skipped data, budgets."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from configs.load import load_config
from configs.recovery import RecoveryConfig
from configs.schema import Config
from tasks.checkpoints.catalog import Glance
from tasks.checkpoints.course import Course, course_fields, course_of, read_course
from tasks.checkpoints.recoveries import Recovery
from tasks.checkpoints.start_point import StartPoint
from tasks.data.skips import SkipRange, join_skips, skip_to
from tasks.recovery.policy import RecoveryPlan, SpikeUnanswered, Wish, plan_by_hand, plan_recovery, skip_stretch
from tasks.recovery.rule import Alarm
from tasks.training.schedule import step_learning_rate

BATCH = 2048
INTERVAL_STEPS = 50
SEQUENCES = 16


def at(step: int, *, healthy: bool = True, phase: str = "stable") -> Glance:
    """A snapshot as far as the policy looks."""
    return Glance(
        url=f"/run/snapshots/{step}", kind="training", step=step, tokens_seen=step * BATCH, digest=str(step),
        healthy=healthy, phase=phase, bytes=1, created=0.0,
    )  # fmt: skip


def config_with(**recovery: Any) -> Config:
    """The demo's configuration: a snapshot every 50 steps of 16 sequences."""
    return replace(load_config("tiny", ()).config, recovery=RecoveryConfig(**recovery))


def alarm_at(onset: int, alarm: int) -> Alarm:
    """A divergence."""
    return Alarm(
        kind="loss", onset_step=onset, alarm_step=alarm, value=5.0, baseline=1.5, scale=0.1, reason="loss is up"
    )


def placed(*steps: int) -> list[Glance]:
    """Healthy stable snapshots."""
    return [at(step) for step in steps]


def recorded(plan: RecoveryPlan) -> Recovery:
    """The plan as it stands once it was carried out."""
    start = StartPoint(url="u", digest="d", step=plan.start_step, tokens_seen=plan.start_step * BATCH)
    names = ("number", "incident", "attempt", "policy", "onset_step", "alarm_step", "reason", "moments",
             "learning_rate_scale", "rewarm_tokens", "skips", "confirm_step")  # fmt: skip
    return Recovery(start=start, count=len(plan.inputs), **{name: getattr(plan, name) for name in names})


def test_first_try_merges_the_last_three_before_onset_and_margin() -> None:
    plan = plan_recovery(config_with(), alarm_at(410, 460), placed(*range(50, 500, 50)), [])
    assert [s.step for s in plan.inputs] == [250, 300, 350]  # 400 lies within half an interval of the onset.
    assert (plan.number, plan.incident, plan.attempt, plan.moments) == (1, 1, 1, "merge")
    assert plan.learning_rate_scale == 1.0
    assert plan.rewarm_tokens == INTERVAL_STEPS * BATCH // 2
    assert plan.confirm_step == 460 + 2 * INTERVAL_STEPS
    assert plan.skips == (SkipRange(at=350 * SEQUENCES, count=110 * SEQUENCES),)


@pytest.mark.parametrize(("margin", "newest"), [(0, 400), (9 * BATCH, 400), (9 * BATCH + 1, 350)])
def test_margin_is_counted_to_the_last_good_step(margin: int, newest: int) -> None:
    plan = plan_recovery(config_with(margin_tokens=margin), alarm_at(410, 460), placed(*range(50, 500, 50)), [])
    assert plan.start_step == newest


def test_unhealthy_snapshots_and_other_phases_are_left_out() -> None:
    snapshots = [
        at(50, phase="warmup"), at(100, phase="warmup"), at(150), at(200, healthy=False),
        at(250),
    ]  # fmt: skip
    plan = plan_recovery(config_with(count=4), alarm_at(400, 420), snapshots, [])
    assert [s.step for s in plan.inputs] == [150, 250]


def test_same_spike_goes_further_back_with_more_and_slower() -> None:
    config = config_with()
    snapshots = placed(*range(50, 500, 50))
    first = recorded(plan_recovery(config, alarm_at(410, 460), snapshots, []))
    second = plan_recovery(config, alarm_at(455, 500), placed(*range(50, 400, 50)), [first])
    assert (second.incident, second.attempt, second.number) == (1, 2, 2)
    assert [s.step for s in second.inputs] == [100, 150, 200, 250, 300]  # From the first onset, an interval further.
    assert second.learning_rate_scale == 0.5
    assert second.rewarm_tokens == 2 * first.rewarm_tokens
    third = plan_recovery(config, alarm_at(470, 520), placed(*range(50, 350, 50)), [first, recorded(second)])
    assert (third.attempt, third.learning_rate_scale, third.start_step) == (3, 0.25, 250)


def test_spike_after_confirmation_is_a_new_one_and_keeps_the_learning_rate() -> None:
    config = config_with()
    first = replace(
        recorded(plan_recovery(config, alarm_at(410, 460), placed(*range(50, 500, 50)), [])), learning_rate_scale=0.5
    )
    plan = plan_recovery(config, alarm_at(1900, 1940), placed(*range(50, 1950, 50)), [first])
    assert (plan.incident, plan.attempt, plan.learning_rate_scale) == (2, 1, 0.5)


@pytest.mark.parametrize(("onset", "scale"), [(1460, 0.5), (1461, 1.0)])
def test_spike_soon_after_the_last_lowers_the_learning_rate(onset: int, scale: float) -> None:
    """Ten confirmation windows of 100 steps after the alarm at 460."""
    config = config_with()
    first = recorded(plan_recovery(config, alarm_at(410, 460), placed(*range(50, 500, 50)), []))
    plan = plan_recovery(config, alarm_at(onset, onset + 40), placed(*range(50, 1500, 50)), [first])
    assert (plan.incident, plan.attempt, plan.learning_rate_scale) == (2, 1, scale)


@pytest.mark.parametrize(
    ("policy", "inputs", "skips", "rewarm"),
    [("rollback", [350], False, 0), ("rollback-skip", [350], True, 0), ("pma", [250, 300, 350], True, 51_200)],
)
def test_arms_differ_in_window_data_and_rewarm(policy: Any, inputs: list[int], skips: bool, rewarm: int) -> None:
    plan = plan_recovery(config_with(policy=policy), alarm_at(410, 460), placed(*range(50, 500, 50)), [])
    assert [s.step for s in plan.inputs] == inputs
    assert bool(plan.skips) == skips
    assert plan.rewarm_tokens == rewarm


def test_budget_spent_says_what_was_tried() -> None:
    config = config_with(max_attempts=2)
    first = recorded(plan_recovery(config, alarm_at(410, 460), placed(*range(50, 500, 50)), []))
    second = recorded(plan_recovery(config, alarm_at(411, 461), placed(*range(50, 500, 50)), [first]))
    with pytest.raises(
        SpikeUnanswered, match=r"2 tries .*pma from step 350 \(3 .*pma from step 300 \(5 .*x0\.5.*pma recover"
    ):
        plan_recovery(config, alarm_at(412, 462), placed(*range(50, 500, 50)), [first, second])


def test_run_budget_and_policy_stop_end_too() -> None:
    first = recorded(plan_recovery(config_with(), alarm_at(410, 460), placed(*range(50, 500, 50)), []))
    with pytest.raises(SpikeUnanswered, match=r"1 recoveries of this run"):
        plan_recovery(config_with(max_recoveries=1), alarm_at(900, 950), placed(*range(50, 950, 50)), [first])
    with pytest.raises(SpikeUnanswered, match=r"recovery\.policy=stop"):
        plan_recovery(config_with(policy="stop"), alarm_at(410, 460), placed(400), [])


def test_no_healthy_snapshot_before_the_onset_is_named() -> None:
    with pytest.raises(SpikeUnanswered, match=r"no healthy snapshot .* before step 1"):
        plan_recovery(config_with(), alarm_at(1, 1), [], [])


def test_skips_of_two_recoveries_jump_over_all_that_was_trodden() -> None:
    """Against a walk: the stream position of every step, with what was read before an alarm struck out."""
    config = config_with()
    skips: tuple[SkipRange, ...] = ()
    for start, alarm in ((10, 14), (12, 20), (8, 25), (25, 26)):
        read = skip_to(np.arange(start * SEQUENCES, alarm * SEQUENCES), skips)
        after = skip_stretch(config, skips, start, alarm)
        later = skip_to(np.arange(start * SEQUENCES, (start + 60) * SEQUENCES), after)
        assert not set(read.tolist()) & set(later.tolist())
        struck = {n for skip in after for n in range(skip.at, skip.at + skip.count)}
        everything = [n for n in range(200 * SEQUENCES) if n not in struck]
        assert skip_to(np.arange(90 * SEQUENCES), after).tolist() == everything[: 90 * SEQUENCES]
        skips = after


def test_join_skips_is_the_union() -> None:
    ranges = [SkipRange(at=5, count=3), SkipRange(at=0, count=2), SkipRange(at=8, count=1), SkipRange(at=6, count=1)]
    assert join_skips(ranges) == (SkipRange(at=0, count=2), SkipRange(at=5, count=4))


def test_learning_rate_after_a_recovery_rises_again_and_is_scaled() -> None:
    config = config_with()
    recovery = replace(
        recorded(plan_recovery(config, alarm_at(410, 460), placed(*range(50, 500, 50)), [])),
        learning_rate_scale=0.5,
        rewarm_tokens=10 * BATCH,
    )
    course = course_of(recovery)
    peak = config.schedule.peak_learning_rate
    assert step_learning_rate(config, 351, course) == pytest.approx(0.5 * peak * 0.05)
    assert step_learning_rate(config, 360, course) == pytest.approx(0.5 * peak * 0.95)
    assert step_learning_rate(config, 361, course) == pytest.approx(0.5 * peak)
    assert step_learning_rate(config, 361) == pytest.approx(peak)


def test_by_hand_takes_wishes_and_needs_no_budget() -> None:
    config = config_with(max_attempts=1)
    first = recorded(plan_recovery(config, alarm_at(410, 460), placed(*range(50, 500, 50)), []))
    wish = Wish(count=2, moments="reset", learning_rate_scale=0.3, rewarm_tokens=0, skip_data=False)
    plan = plan_by_hand(config, alarm_at(410, 470), placed(*range(50, 500, 50)), [first], wish)
    assert [s.step for s in plan.inputs] == [300, 350]
    assert (plan.moments, plan.learning_rate_scale, plan.rewarm_tokens) == ("reset", 0.3, 0)
    assert (plan.policy, plan.attempt, plan.skips) == ("by hand", 2, first.skips)
    with pytest.raises(UserError, match=r"leaves 1 healthy snapshots .* healthy ones: 50, 100"):
        plan_by_hand(config, alarm_at(90, 120), placed(50, 100), [], Wish(count=3))


def test_branch_of_a_recovered_run_recovers_on_top_of_its_course() -> None:
    inherited = Course(learning_rate_scale=0.5, skips=(SkipRange(at=800, count=160),))
    assert read_course(json.loads(json.dumps(course_fields(inherited)))) == inherited
    assert course_fields(Course()) == {} and read_course({}) == Course()
    plan = plan_recovery(config_with(), alarm_at(410, 460), placed(*range(250, 500, 50)), [], inherited)
    assert plan.learning_rate_scale == 0.5
    # Steps 350 to 460 lie 160 sequences further along the stream.
    assert plan.skips == (SkipRange(at=800, count=160), SkipRange(at=350 * SEQUENCES + 160, count=110 * SEQUENCES))
