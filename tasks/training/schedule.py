"""Warmup-stable-decay learning rate as a pure function of tokens."""

from __future__ import annotations

from typing import Literal

from configs.schema import Config
from configs.training import ScheduleConfig
from tasks.checkpoints.course import AS_CONFIGURED, Course
from tasks.curves import DECAY_CURVES

Phase = Literal["warmup", "stable", "decay"]


def learning_rate_at(schedule: ScheduleConfig, tokens: float, total_tokens: int) -> float:
    """Learning rate when ``tokens`` have been seen, of a run that ends at ``total_tokens``."""
    peak = schedule.peak_learning_rate
    if tokens < schedule.warmup_tokens:
        return peak * tokens / schedule.warmup_tokens
    decay_start = total_tokens - schedule.decay_tokens
    if schedule.decay_tokens == 0 or tokens <= decay_start:
        return peak
    progress = min(1.0, (tokens - decay_start) / schedule.decay_tokens)
    floor = schedule.final_learning_rate_fraction
    return peak * (floor + (1 - floor) * DECAY_CURVES[schedule.decay_shape](progress))


def step_learning_rate(config: Config, step: int, course: Course = AS_CONFIGURED) -> float:
    """Learning rate of the update that completes step ``step`` (from 1), taken at the middle of its tokens.

    ``course`` is what recoveries changed of it.
    """
    middle = (step - 0.5) * config.training.batch_tokens
    return learning_rate_at(config.schedule, middle, config.training.total_tokens) * course.factor_at(middle)


def phase_at(config: Config, tokens: int) -> Phase:
    """Phase of the schedule once ``tokens`` have been seen."""
    if tokens < config.schedule.warmup_tokens:
        return "warmup"
    if config.schedule.decay_tokens and tokens > config.training.total_tokens - config.schedule.decay_tokens:
        return "decay"
    return "stable"
