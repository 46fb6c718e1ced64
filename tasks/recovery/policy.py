"""What to do about a spike: which snapshots to go back to, and how to train on; a pure function of what is on record.

The first try at a spike goes back to before its onset. Each further try at the same spike goes one snapshot interval
further back and ``pma`` merges two snapshots more. A spike is the same one until training has passed the recovery's
``confirm_step``. Whether the same or another, a spike that soon after the last lowers the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from configs.errors import UserError
from configs.recovery import RecoveryConfig
from configs.schema import Config
from tasks.checkpoints.catalog import Glance
from tasks.checkpoints.course import AS_CONFIGURED, Course, course_of
from tasks.checkpoints.recoveries import Recovery
from tasks.checkpoints.retention import SpikeReach
from tasks.data.skips import SkipRange, join_skips, skip_to
from tasks.recovery.rule import Alarm, SpikeRule
from tasks.recovery.tries import confirm_steps, margin_tokens, reach_of_try, rewarm_tokens

RELAPSE_WINDOWS = 10
"""Confirmation windows after an alarm within which the next spike is taken for a relapse: the learning rate is lowered."""
BY_HAND = "by hand"
Value = TypeVar("Value")


class SpikeUnanswered(Exception):
    """A spike that the run does not get over by itself; the message says what was tried and what can be done."""


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """A recovery that is decided and not yet made: like :class:`Recovery`, with the inputs of its start."""

    number: int
    """From 1 over the run."""
    incident: int
    """Which spike, from 1."""
    attempt: int
    """Which try at it, from 1."""
    policy: str
    """What is done."""
    inputs: Sequence[Glance]
    """Snapshots to merge, oldest first; a single one is gone back to as it is."""
    onset_step: int
    """First step of the trouble."""
    alarm_step: int
    """Step at which training was stopped."""
    reason: str
    """The finding in a sentence."""
    moments: Literal["merge", "newest", "reset"]
    """What becomes of Adam's moments."""
    learning_rate_scale: float
    """Factor on the schedule's learning rate from the start on."""
    rewarm_tokens: int
    """Tokens over which the learning rate rises from 0."""
    skips: tuple[SkipRange, ...]
    """Stretches of data that are never read, those of earlier recoveries included."""
    confirm_step: int
    """The spike is over once this step is passed without an alarm."""

    @property
    def start_step(self) -> int:
        """Where training goes on."""
        return self.inputs[-1].step or 0


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What somebody who recovers by hand wants otherwise than the configuration has it; None means as configured."""

    count: int | None = None
    """Snapshots to merge; 1 goes back to one as it is."""
    moments: Literal["merge", "newest", "reset"] | None = None
    """What becomes of Adam's moments."""
    learning_rate_scale: float | None = None
    """Factor on the schedule's learning rate."""
    rewarm_tokens: int | None = None
    """Tokens over which the learning rate rises from 0."""
    skip_data: bool = True
    """Whether the data between the start and the alarm is never read again."""


def rule_of(config: Config) -> SpikeRule:
    """The detector's rule for a run: warm-up and first loss follow from its schedule and, of language models, vocabulary."""
    recovery = config.recovery
    return SpikeRule(
        window_points=recovery.window_steps,
        patience_points=recovery.patience_steps,
        threshold=recovery.threshold,
        lost_progress=recovery.lost_progress,
        warmup_steps=-(-config.schedule.warmup_tokens // config.training.batch_tokens),
        start_loss=math.log(config.model.vocab_size) if config.workload.is_language_model else None,
    )


def plan_recovery(
    config: Config,
    alarm: Alarm,
    snapshots: Sequence[Glance],
    history: Sequence[Recovery],
    inherited: Course = AS_CONFIGURED,
) -> RecoveryPlan:
    """The next try at the spike that ``alarm`` tells of; ``snapshots`` are the run's living ones by step.

    ``inherited`` is the course that a branch began on.

    Raises :class:`SpikeUnanswered` if nothing is left to try: the budget is spent, no snapshot before the onset is
    healthy, or the policy is to stop.
    """
    rule, before = config.recovery, _try_before(alarm, history)
    attempt = before.attempt + 1 if before else 1
    if before:
        # Where the trouble began the first time: what came after it is not to be trusted, though it looked healthy.
        alarm = replace(alarm, onset_step=min(alarm.onset_step, before.onset_step))
    _require_budget(config, alarm, history, attempt)
    inputs = _window(snapshots, reach_of_try(config, alarm.onset_step, attempt))
    if not inputs:
        raise SpikeUnanswered(
            f"{alarm.reason}; there is no healthy snapshot {margin_tokens(config):,} tokens or more before step {alarm.onset_step}"
            f"{_tried(history)}. {_advice(config)}"
        )
    wish = Wish(
        moments=rule.moments if rule.policy == "pma" else "newest",
        learning_rate_scale=_lowered_scale(config, alarm, history),
        rewarm_tokens=rewarm_tokens(config) * attempt if rule.policy == "pma" else 0,
        skip_data=rule.policy != "rollback",
    )
    return _assemble(config, alarm, inputs, history, inherited, wish, policy=rule.policy)


def plan_by_hand(
    config: Config,
    alarm: Alarm,
    snapshots: Sequence[Glance],
    history: Sequence[Recovery],
    wish: Wish,
    inherited: Course = AS_CONFIGURED,
) -> RecoveryPlan:
    """A recovery that somebody asks for: no budget, and what ``wish`` says otherwise than the configuration.

    Raises :class:`configs.errors.UserError` if no snapshot before ``alarm.onset_step`` is healthy, or fewer than asked for.
    """
    count = config.recovery.count if wish.count is None else wish.count
    inputs = _window(snapshots, replace(reach_of_try(config, alarm.onset_step, 1), count=count))
    if len(inputs) < (wish.count or 1):
        healthy = ", ".join(str(s.step) for s in snapshots if s.healthy) or "none"
        raise UserError(
            f"--onset {alarm.onset_step} leaves {len(inputs)} healthy snapshots of one phase, {margin_tokens(config):,} "
            f"tokens or more before it; healthy ones: {healthy}. Ask for a smaller --count, a later --onset or "
            "recovery.margin_tokens=0"
        )
    return _assemble(config, alarm, inputs, history, inherited, wish, policy=BY_HAND)


def _assemble(
    config: Config,
    alarm: Alarm,
    inputs: Sequence[Glance],
    history: Sequence[Recovery],
    inherited: Course,
    wish: Wish,
    *,
    policy: str,
) -> RecoveryPlan:
    """The plan to go back to ``inputs``; what ``wish`` leaves open is as configured, the learning rate as it was."""
    last, before = history[-1] if history else None, _try_before(alarm, history)
    course = course_of(last) if last else inherited
    moments = wish.moments or config.recovery.moments
    start_step = inputs[-1].step or 0
    return RecoveryPlan(
        number=len(history) + 1,
        incident=before.incident if before else (last.incident if last else 0) + 1,
        attempt=before.attempt + 1 if before else 1,
        policy=policy,
        inputs=inputs,
        onset_step=alarm.onset_step,
        alarm_step=alarm.alarm_step,
        reason=alarm.reason,
        # One snapshot that is gone back to keeps its own state.
        moments=moments if len(inputs) > 1 or moments == "reset" else "newest",
        learning_rate_scale=_or(wish.learning_rate_scale, course.learning_rate_scale),
        rewarm_tokens=_or(wish.rewarm_tokens, rewarm_tokens(config)),
        skips=skip_stretch(config, course.skips, start_step, alarm.alarm_step) if wish.skip_data else course.skips,
        confirm_step=alarm.alarm_step + confirm_steps(config),
    )


def skip_stretch(config: Config, skips: Sequence[SkipRange], start_step: int, alarm_step: int) -> tuple[SkipRange, ...]:
    """``skips`` and what training read from ``start_step`` to ``alarm_step`` under them."""
    batch = config.training.batch_sequences
    ends = np.array([start_step * batch, alarm_step * batch], dtype=np.int64)
    first, end = (int(position) for position in skip_to(ends, skips))
    return join_skips([*skips, SkipRange(at=first, count=end - first)] if end > first else skips)


def _try_before(alarm: Alarm, history: Sequence[Recovery]) -> Recovery | None:
    """The newest recovery, if ``alarm`` tells of the spike that it was a try at."""
    return history[-1] if history and alarm.alarm_step <= history[-1].confirm_step else None


def _window(snapshots: Sequence[Glance], reach: SpikeReach) -> list[Glance]:
    """The last healthy snapshots of one phase that ``reach`` allows."""
    healthy = [s for s in snapshots if s.healthy and s.tokens_seen is not None and s.tokens_seen <= reach.limit_tokens]
    return [s for s in healthy if s.phase == healthy[-1].phase][-reach.count :]


def _lowered_scale(config: Config, alarm: Alarm, history: Sequence[Recovery]) -> float | None:
    """Factor on the learning rate after a relapse; None for a spike that is none."""
    if not history or alarm.onset_step - history[-1].alarm_step > RELAPSE_WINDOWS * confirm_steps(config):
        return None
    return history[-1].learning_rate_scale * config.recovery.learning_rate_factor


def _require_budget(config: Config, alarm: Alarm, history: Sequence[Recovery], attempt: int) -> None:
    rule: RecoveryConfig = config.recovery
    why = None
    if rule.policy == "stop":
        why = "recovery.policy=stop asks to end here"
    elif attempt > rule.max_attempts:
        why = f"{rule.max_attempts} tries at this spike are spent (recovery.max_attempts)"
    elif len(history) >= rule.max_recoveries:
        why = f"{rule.max_recoveries} recoveries of this run are spent (recovery.max_recoveries)"
    if why:
        raise SpikeUnanswered(f"{alarm.reason}; {why}{_tried(history)}. {_advice(config)}")


def _tried(history: Sequence[Recovery]) -> str:
    if not history:
        return ""
    mine = [r for r in history if r.incident == history[-1].incident]
    rows = [
        f"{r.policy} from step {r.start.step} ({r.count} snapshot{'s' if r.count > 1 else ''}, moments {r.moments}, "
        f"learning rate x{r.learning_rate_scale:g}, {sum(s.count for s in r.skips)} sequences skipped)"
        for r in mine
    ]
    return "; tried: " + "; ".join(rows)


def _advice(config: Config) -> str:
    return (
        "What was committed is intact. Choose a way back by hand (pma recover --run URL --onset STEP), allow more "
        f"(recovery.max_attempts={config.recovery.max_attempts + 2}) and run the same command again, or look for the cause: "
        "learning rate, data, a faulty machine"
    )


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value
