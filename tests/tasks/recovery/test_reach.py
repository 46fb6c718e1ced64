"""What retention keeps for a spike that is yet to come, against the policy that will ask for it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from configs.load import load_config
from configs.merging import RetentionConfig
from configs.recovery import RecoveryConfig
from configs.schema import Config
from tasks.checkpoints.catalog import Glance
from tasks.checkpoints.recoveries import Recovery, living
from tasks.checkpoints.retention import Holdings, plan_retention
from tasks.checkpoints.start_point import StartPoint
from tasks.recovery.policy import RecoveryPlan, plan_recovery
from tasks.recovery.reach import reach_of
from tasks.recovery.rule import Alarm

BATCH, INTERVAL = 2048, 50
"""Tokens of a step, and steps between snapshots, of the demo's configuration."""
HARSH = RetentionConfig(keep_last=1)
"""The rule that takes the most away."""


def config_with(**recovery: Any) -> Config:
    return replace(load_config("tiny", ()).config, recovery=RecoveryConfig(**recovery))


def glance(step: int, recovery: int = 0) -> Glance:
    suffix = f"-r{recovery:02d}" if recovery else ""
    return Glance(
        url=f"/run/snapshots/step-{step:09d}{suffix}", kind="training", step=step, tokens_seen=step * BATCH,
        digest=f"{step}{suffix}", healthy=True, phase="stable", bytes=1, created=0.0, recovery=recovery,
    )  # fmt: skip


def alarm_at(onset: int, step: int) -> Alarm:
    return Alarm(kind="loss", onset_step=onset, alarm_step=step, value=5.0, baseline=1.5, scale=0.1, reason="up")


def kept(config: Config, snapshots: list[Glance], history: list[Recovery]) -> list[Glance]:
    """What a collection now leaves of ``snapshots``."""
    reach = reach_of(config, snapshots[-1].step or 0, history)
    held = Holdings(snapshots=tuple(snapshots), merged={}, needed={}, surplus=(), reach=reach)
    plan = plan_retention(held, HARSH, interval_tokens=INTERVAL * BATCH, now=0.0)
    gone = {row.url for row in plan.doomed}
    return [snapshot for snapshot in snapshots if snapshot.url not in gone]


def record(plan: RecoveryPlan) -> Recovery:
    start = StartPoint(url="u", digest="d", step=plan.start_step, tokens_seen=plan.start_step * BATCH)
    shared = {item.name: getattr(plan, item.name) for item in fields(Recovery) if hasattr(plan, item.name)}
    return Recovery(**shared, start=start, count=len(plan.inputs))


def inputs(plan: RecoveryPlan) -> list[str]:
    return [snapshot.url for snapshot in plan.inputs]


def train_on(config: Config, left: list[Glance], everything: list[Glance], history: list[Recovery], to: int) -> None:
    """Snapshots up to step ``to``, with a collection after each of ``left``."""
    for step in range((everything[-1].step or 0) + INTERVAL, to + 1, INTERVAL):
        snapshot = glance(step, len(history))
        everything.append(snapshot)
        left[:] = kept(config, [*left, snapshot], history)


CASES = [
    {},
    {"policy": "rollback"},
    {"count": 1},
    {"count": 5, "max_attempts": 2},
    {"margin_tokens": 3 * BATCH * INTERVAL},
]


@pytest.mark.parametrize("recovery", CASES)
@pytest.mark.parametrize("newest", [800, 1300])
def test_every_try_finds_the_inputs_that_it_would_find_without_retention(recovery: dict[str, Any], newest: int) -> None:
    config = config_with(**recovery)
    for after in (0, 1, INTERVAL - 1):
        for patience in (0, 1, config.recovery.patience_steps):
            left, everything, history = list[Glance](), [glance(0)], list[Recovery]()
            train_on(config, left, everything, history, newest)
            assert len(left) < len(everything) - 1  # Else the rest of this says nothing.
            for attempt in range(1, config.recovery.max_attempts + 1):
                step = newest + after
                alarm = alarm_at(step - patience, step)
                whole = plan_recovery(config, alarm, everything[1:], history)
                assert whole.attempt == attempt
                assert inputs(plan_recovery(config, alarm, left, history)) == inputs(whole)
                history.append(record(whole))
                left, everything = living(left, history), [glance(0), *living(everything[1:], history)]
                train_on(config, left, everything, history, newest)


def test_without_the_rule_the_first_try_already_lacks_its_inputs() -> None:
    """The control: what the rules of the configuration alone leave is one snapshot."""
    snapshots = [glance(step) for step in range(INTERVAL, 1001, INTERVAL)]
    assert [s.step for s in kept(config_with(policy="ignore"), snapshots, [])] == [1000]
    assert len(kept(config_with(), snapshots, [])) > 7


@pytest.mark.parametrize("policy", ["ignore", "stop"])
def test_a_policy_that_never_goes_back_needs_nothing(policy: str) -> None:
    assert reach_of(config_with(policy=policy), 1000, []) is None


def test_reach_by_hand() -> None:
    """patience 48, margin half an interval, two intervals for two more tries: 1000 - 48 - 1 - 25 - 100 steps."""
    reach = reach_of(config_with(), 1000, [])
    assert reach is not None
    assert (reach.count, reach.limit_tokens) == (7, 826 * BATCH)
    one = reach_of(config_with(policy="rollback-skip", max_attempts=1, margin_tokens=0), 1000, [])
    assert one is not None
    assert (one.count, one.limit_tokens) == (1, 951 * BATCH)


def test_an_unconfirmed_recovery_is_reached_behind_its_onset_and_a_confirmed_one_is_not() -> None:
    config = config_with()
    first = record(plan_recovery(config, alarm_at(500, 520), [glance(s) for s in range(50, 501, 50)], []))
    during, after = reach_of(config, first.confirm_step, [first]), reach_of(config, first.confirm_step + 1, [first])
    assert during is not None and after is not None
    assert during.limit_tokens == (500 - 1 - 125) * BATCH
    assert after.limit_tokens == (first.confirm_step + 1 - 48 - 1 - 125) * BATCH
