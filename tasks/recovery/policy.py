"""What to do about a spike: which snapshots to go back to, and how to train on; a pure function of what is on record.

The first try at a spike goes back to before its onset. Each further try at the same spike goes one snapshot interval
further back and ``pma`` merges two snapshots more. A spike is the same one until training has passed the recovery's
``confirm_step``. Whether the same or another, a spike that soon after the last lowers the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np

from configs.errors import UserError
from configs.recovery import RecoveryConfig
from configs.schema import Config
from tasks.checkpoints.course import AS_CONFIGURED, Course, course_of
from tasks.checkpoints.recoveries import Recovery
from tasks.data.skips import SkipRange, join_skips, skip_to
from tasks.recovery.rule import Alarm, SpikeRule

MORE_PER_ATTEMPT = 2
"""Snapshots by which a window grows with every further try."""
RELAPSE_WINDOWS = 10
"""Confirmation windows after an alarm within which the next spike is taken for a relapse: the learning rate is lowered."""
BY_HAND = "by hand"


class SpikeUnanswered(Exception):
    """A spike that the run does not get over by itself; the message says what was tried and what can be done."""


class Candidate(Protocol):
    """What choosing a way back asks of a snapshot."""

    @property
    def step(self) -> int | None:
        """Completed optimizer steps."""

    @property
    def tokens_seen(self) -> int | None:
        """Tokens seen up to it."""

    @property
    def healthy(self) -> bool:
        """Whether every step since the one before was finite."""

    @property
    def phase(self) -> str | None:
        """Phase of the schedule."""


Found = TypeVar("Found", bound=Candidate)
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan(Generic[Found]):
    """A recovery that is decided and not yet made: like :class:`Recovery`, with the inputs of its start."""

    number: int
    """From 1 over the run."""
    incident: int
    """Which spike, from 1."""
    attempt: int
    """Which try at it, from 1."""
    policy: str
    """What is done."""
    inputs: Sequence[Found]
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
    """The detector's rule for a run: warm-up and first loss follow from its schedule and vocabulary."""
    recovery = config.recovery
    return SpikeRule(
        window_points=recovery.window_steps,
        patience_points=recovery.patience_steps,
        threshold=recovery.threshold,
        lost_progress=recovery.lost_progress,
        warmup_steps=-(-config.schedule.warmup_tokens // config.training.batch_tokens),
        start_loss=math.log(config.model.vocab_size),
    )


def plan_recovery(
    config: Config,
    alarm: Alarm,
    snapshots: Sequence[Found],
    history: Sequence[Recovery],
    inherited: Course = AS_CONFIGURED,
) -> RecoveryPlan[Found]:
    """The next try at the spike that ``alarm`` tells of; ``snapshots`` are the run's living ones by step.

    ``inherited`` is the course that a branch began on.

    Raises :class:`SpikeUnanswered` if nothing is left to try: the budget is spent, no snapshot before the onset is
    healthy, or the policy is to stop.
    """
    rule = config.recovery
    last = history[-1] if history else None
    again = last if last is not None and alarm.alarm_step <= last.confirm_step else None
    attempt = again.attempt + 1 if again else 1
    if again:
        # Where the trouble began the first time: what came after it is not to be trusted, though it looked healthy.
        alarm = replace(alarm, onset_step=min(alarm.onset_step, again.onset_step))
    _require_budget(config, alarm, history, attempt)
    inputs = _inputs(config, snapshots, alarm.onset_step, attempt)
    if not inputs:
        raise SpikeUnanswered(
            f"{alarm.reason}; there is no healthy snapshot {_margin_tokens(config):,} tokens or more before step {alarm.onset_step}"
            f"{_tried(history)}. {_advice(config)}"
        )
    course = course_of(last) if last else inherited
    scale = course.learning_rate_scale
    is_relapse = last is not None and alarm.onset_step - last.alarm_step <= RELAPSE_WINDOWS * _confirm_steps(config)
    return _assemble(
        config,
        alarm,
        inputs,
        len(history) + 1,
        course.skips,
        policy=rule.policy,
        attempt=attempt,
        incident=again.incident if again else (last.incident if last else 0) + 1,
        wish=Wish(
            moments=rule.moments if rule.policy == "pma" else "newest",
            learning_rate_scale=scale * rule.learning_rate_factor if is_relapse else scale,
            rewarm_tokens=_or(rule.rewarm_tokens, config.snapshots.interval_tokens // 2) * attempt
            if rule.policy == "pma"
            else 0,
            skip_data=rule.policy != "rollback",
        ),
    )


def plan_by_hand(
    config: Config,
    alarm: Alarm,
    snapshots: Sequence[Found],
    history: Sequence[Recovery],
    wish: Wish,
    inherited: Course = AS_CONFIGURED,
) -> RecoveryPlan[Found]:
    """A recovery that somebody asks for: no budget, and what ``wish`` says otherwise than the configuration.

    Raises :class:`configs.errors.UserError` if no snapshot before ``alarm.onset_step`` is healthy, or fewer than asked for.
    """
    rule, last = config.recovery, history[-1] if history else None
    count = _or(wish.count, rule.count)
    inputs = _before(snapshots, alarm.onset_step, _margin_tokens(config), count, config)
    if len(inputs) < (wish.count or 1):
        healthy = ", ".join(str(s.step) for s in snapshots if s.healthy) or "none"
        raise UserError(
            f"--onset {alarm.onset_step} leaves {len(inputs)} healthy snapshots of one phase, {_margin_tokens(config):,} "
            f"tokens or more before it; healthy ones: {healthy}. Ask for a smaller --count, a later --onset or "
            "recovery.margin_tokens=0"
        )
    incident = last.incident + (alarm.alarm_step > last.confirm_step) if last else 1
    course = course_of(last) if last else inherited
    scale = _or(wish.learning_rate_scale, course.learning_rate_scale)
    settled = Wish(
        moments=wish.moments or rule.moments,
        learning_rate_scale=scale,
        rewarm_tokens=_or(wish.rewarm_tokens, _or(rule.rewarm_tokens, config.snapshots.interval_tokens // 2)),
        skip_data=wish.skip_data,
    )
    attempt = last.attempt + 1 if last and incident == last.incident else 1
    return _assemble(
        config,
        alarm,
        inputs,
        len(history) + 1,
        course.skips,
        policy=BY_HAND,
        attempt=attempt,
        incident=incident,
        wish=settled,
    )


def _assemble(
    config: Config,
    alarm: Alarm,
    inputs: Sequence[Found],
    number: int,
    skips: tuple[SkipRange, ...],
    *,
    policy: str,
    attempt: int,
    incident: int,
    wish: Wish,
) -> RecoveryPlan[Found]:
    assert wish.moments and wish.learning_rate_scale is not None and wish.rewarm_tokens is not None
    if wish.skip_data:
        skips = skip_stretch(config, skips, inputs[-1].step or 0, alarm.alarm_step)
    return RecoveryPlan(
        number=number,
        incident=incident,
        attempt=attempt,
        policy=policy,
        inputs=inputs,
        onset_step=alarm.onset_step,
        alarm_step=alarm.alarm_step,
        reason=alarm.reason,
        # One snapshot that is gone back to keeps its own state.
        moments=wish.moments if len(inputs) > 1 or wish.moments == "reset" else "newest",
        learning_rate_scale=wish.learning_rate_scale,
        rewarm_tokens=wish.rewarm_tokens,
        skips=skips,
        confirm_step=alarm.alarm_step + _confirm_steps(config),
    )


def skip_stretch(config: Config, skips: Sequence[SkipRange], start_step: int, alarm_step: int) -> tuple[SkipRange, ...]:
    """``skips`` and what training read from ``start_step`` to ``alarm_step`` under them."""
    batch = config.training.batch_sequences
    ends = np.array([start_step * batch, alarm_step * batch], dtype=np.int64)
    first, end = (int(position) for position in skip_to(ends, skips))
    return join_skips([*skips, SkipRange(at=first, count=end - first)] if end > first else skips)


def _inputs(config: Config, snapshots: Sequence[Found], onset_step: int, attempt: int) -> list[Found]:
    rule = config.recovery
    margin = _margin_tokens(config) + (attempt - 1) * config.snapshots.interval_tokens
    count = rule.count + MORE_PER_ATTEMPT * (attempt - 1) if rule.policy == "pma" else 1
    return _before(snapshots, onset_step, margin, count, config)


def _before(snapshots: Sequence[Found], onset_step: int, margin_tokens: int, count: int, config: Config) -> list[Found]:
    """The last ``count`` healthy snapshots of one phase, ``margin_tokens`` or more before the onset."""
    limit = (onset_step - 1) * config.training.batch_tokens - margin_tokens
    healthy = [s for s in snapshots if s.healthy and s.tokens_seen is not None and s.tokens_seen <= limit]
    return [s for s in healthy if s.phase == healthy[-1].phase][-count:]


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


def _confirm_steps(config: Config) -> int:
    tokens = _or(config.recovery.confirm_tokens, 2 * config.snapshots.interval_tokens)
    return -(-tokens // config.training.batch_tokens)


def _margin_tokens(config: Config) -> int:
    return _or(config.recovery.margin_tokens, config.snapshots.interval_tokens // 2)


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value
