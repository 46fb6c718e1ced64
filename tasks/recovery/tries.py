"""The tries at a spike: how far back each goes, and what holds where ``recovery`` leaves a number open."""

from __future__ import annotations

from configs.schema import Config
from tasks.checkpoints.retention import SpikeReach

MORE_PER_ATTEMPT = 2
"""Snapshots by which a window grows with every further try."""


def reach_of_try(config: Config, onset_step: int, attempt: int) -> SpikeReach:
    """Which snapshots try number ``attempt``, from 1, at a spike that began at ``onset_step`` asks for.

    Each goes one snapshot interval further back than the one before and, where it merges, asks for two snapshots more.
    """
    rule, more_tries = config.recovery, attempt - 1
    margin = margin_tokens(config) + more_tries * config.snapshots.interval_tokens
    return SpikeReach(
        count=rule.count + MORE_PER_ATTEMPT * more_tries if rule.policy == "pma" else 1,
        limit_tokens=(onset_step - 1) * config.training.batch_tokens - margin,
    )


def margin_tokens(config: Config) -> int:
    """Tokens between the newest snapshot of the first try and the last good step; half an interval unless set."""
    margin = config.recovery.margin_tokens
    return config.snapshots.interval_tokens // 2 if margin is None else margin


def rewarm_tokens(config: Config) -> int:
    """Tokens over which the learning rate rises again after the first try; half an interval unless set."""
    rewarm = config.recovery.rewarm_tokens
    return config.snapshots.interval_tokens // 2 if rewarm is None else rewarm


def confirm_steps(config: Config) -> int:
    """Steps after an alarm that have to pass without another; two intervals unless set."""
    confirm = config.recovery.confirm_tokens
    tokens = 2 * config.snapshots.interval_tokens if confirm is None else confirm
    return -(-tokens // config.training.batch_tokens)
