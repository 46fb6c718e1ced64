"""An annealing branch: fork from a stable snapshot with its full state and decay the learning rate."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

from configs.errors import UserError
from configs.schema import Config
from pipelines.beside import Beside
from pipelines.driven import Driven
from pipelines.pretrain import pretrain_steps, require_workable, start_point, summarise, working_session
from pipelines.run_lease import hold_run
from pipelines.steps import Step, pending_steps, run_steps
from pipelines.tracking import TrackingThread
from pipelines.units import evaluation_units
from tasks.checkpoints.pins import hold_pins
from tasks.checkpoints.run_folder import RunFolder
from tasks.checkpoints.start_point import StartPoint


def anneal(run_url: str, from_step: int, *, tokens: int | None = None) -> dict[str, Any]:
    """Train a decay branch of the run from ``from_step`` over ``tokens`` (default ``anneal.tokens``).

    The branch is a run of its own below ``<run>/branches``: it continues weights, moments and data
    position; only the learning rate differs from the trunk. The same call again continues it.
    """
    started = time.perf_counter()
    trunk = RunFolder(run_url)
    trunk_config = trunk.identity().config
    start = start_point(trunk, from_step)
    config = branch_config(trunk_config, start.tokens_seen, trunk_config.anneal.tokens if tokens is None else tokens)
    branch = trunk.branch(branch_name(from_step))
    require_workable(branch, config)
    # Until the branch is on record, which keeps its start from then on, a pin does.
    with hold_pins([start]):
        branch.begin(config, start)
    driven = Driven(run=branch, config=config, start=start)
    steps = anneal_steps(config, start)
    with hold_run(branch) as lease, TrackingThread(trunk, trunk_config) as tracking:
        if pending_steps(branch.store, steps, driven):
            with working_session(branch, config), Beside(branch, config, merges=False) as beside:
                run_steps(branch.store, steps, replace(driven, lease=lease, beside=beside), lease)
        tracking.finish()
    return {**summarise(branch, seconds=time.perf_counter() - started), "from": start.url}


def anneal_steps(config: Config, start: StartPoint) -> list[Step[Driven]]:
    """The steps of an annealing branch: those of pre-training without merges."""
    train, _, evaluate = pretrain_steps(config, start)
    return [train, replace(evaluate, needs=("train",), units=partial(evaluation_units, merges=False))]


def branch_name(from_step: int) -> str:
    """Folder of the branch below ``<run>/branches``."""
    return f"anneal-from-step-{from_step:09d}"


def branch_config(trunk: Config, fork_tokens: int, tokens: int) -> Config:
    """The trunk's configuration with its end at the budget and the whole budget as decay."""
    if tokens < 1:
        raise UserError(
            f"an annealing branch of {tokens:,} tokens from its start at {fork_tokens:,} has no step to train; give --tokens "
            f"(or anneal.tokens) of at least one step, {trunk.training.batch_tokens:,}"
        )
    if fork_tokens < trunk.schedule.warmup_tokens:
        raise UserError(
            f"step at {fork_tokens} tokens is in warmup (schedule.warmup_tokens={trunk.schedule.warmup_tokens})"
        )
    if trunk.schedule.decay_tokens and fork_tokens > trunk.training.total_tokens - trunk.schedule.decay_tokens:
        raise UserError(f"step at {fork_tokens} tokens is in the decay phase already; fork from the stable phase")
    return replace(
        trunk,
        training=replace(trunk.training, total_tokens=fork_tokens + tokens),
        schedule=replace(
            trunk.schedule,
            decay_tokens=tokens,
            decay_shape=trunk.anneal.shape,
            final_learning_rate_fraction=trunk.anneal.final_learning_rate_fraction,
        ),
    )


def fork_step(config: Config) -> int:
    """Snapshot from which the branch ends exactly where the trunk ends."""
    fork_tokens = config.training.total_tokens - config.anneal.tokens
    if fork_tokens % config.snapshots.interval_tokens or fork_tokens < config.schedule.warmup_tokens:
        raise UserError(
            f"the demo forks its annealing branch at training.total_tokens - anneal.tokens = {fork_tokens} tokens: that must "
            f"be a snapshot (a multiple of snapshots.interval_tokens={config.snapshots.interval_tokens}) after warmup"
        )
    if config.schedule.decay_tokens:
        raise UserError("the demo compares annealing with a constant learning rate: set schedule.decay_tokens=0")
    return fork_tokens // config.training.batch_tokens
