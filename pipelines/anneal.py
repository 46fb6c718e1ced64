"""An annealing branch: fork from a stable snapshot with its full state and decay the learning rate."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from configs.errors import UserError
from configs.schema import Config
from pipelines.beside import Beside
from pipelines.pretrain import (
    hold_run,
    is_trained,
    require_workable,
    start_point,
    summarise,
    train_to_end,
    working_session,
)
from pipelines.scheduled import unevaluated
from pipelines.timing import timed
from pipelines.tracking import TrackingThread
from tasks.checkpoints.run_folder import RunFolder


def anneal(run_url: str, from_step: int, *, tokens: int | None = None) -> dict[str, Any]:
    """Train a decay branch of the run from ``from_step`` over ``tokens`` (default ``anneal.tokens``).

    The branch is a run of its own below ``<run>/branches``: it continues weights, moments and data
    position; only the learning rate differs from the trunk. The same call again continues it.
    """
    started = time.perf_counter()
    trunk = RunFolder(run_url)
    trunk_config = trunk.identity().config
    start = start_point(trunk, from_step)
    config = branch_config(trunk_config, start.tokens_seen, tokens or trunk_config.anneal.tokens)
    branch = trunk.branch(branch_name(from_step))
    require_workable(branch, config)
    branch.begin(config, start)
    with hold_run(branch) as lease, TrackingThread(trunk, trunk_config) as tracking:
        if not is_trained(branch, config) or unevaluated(branch, config):
            with working_session(branch, config), Beside(branch, config, merges=False) as beside:
                train_to_end(branch, config, lease, beside, label=f"annealing from step {from_step:,}")
                with timed(branch.store, "evaluations after annealing", "evidence"):
                    beside.finish()
        tracking.finish()
    return {**summarise(branch, seconds=time.perf_counter() - started), "from": start.url}


def branch_name(from_step: int) -> str:
    """Folder of the branch below ``<run>/branches``."""
    return f"anneal-from-step-{from_step:09d}"


def branch_config(trunk: Config, fork_tokens: int, tokens: int) -> Config:
    """The trunk's configuration with its end at the budget and the whole budget as decay."""
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
