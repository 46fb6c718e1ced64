"""The scalar training state that goes with weights and moments: what of a run is neither."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from configs.schema import Config
from tasks.checkpoints.course import Course, course_fields
from tasks.checkpoints.recoveries import Recovery
from tasks.training.schedule import phase_at, step_learning_rate


def build_scalars(
    config: Config,
    *,
    step: int,
    corpus_digest: str,
    optimizer_steps: int,
    parameter_steps: Mapping[str, int],
    guard: Mapping[str, Any],
    recovery: Recovery | None,
    course: Course,
) -> dict[str, Any]:
    """Content of ``state.json``; holds no wall-clock value, so that equal states are equal bytes.

    ``parameter_steps`` are AdamW's counters by parameter: those that are behind ``optimizer_steps``, since a loss left them
    without gradient, are named.
    """
    training = config.training
    tokens_seen = step * training.batch_tokens
    values: dict[str, Any] = {
        "format_version": 1,
        "step": step,
        "tokens_seen": tokens_seen,
        "schedule": {
            "phase": phase_at(config, tokens_seen),
            "learning_rate": step_learning_rate(config, step, course),
            "total_tokens": training.total_tokens,
        },
        "data_position": {
            "sequences_seen": step * training.batch_sequences,
            "order_seed": config.seed,
            "corpus_digest": corpus_digest,
        },
        "rng": {"rule": "seeded per step from (seed, step, rank)", "seed": config.seed, "step": step},
        "optimizer": {"name": "adamw", "steps": optimizer_steps},
    }
    if behind := {name: steps for name, steps in parameter_steps.items() if steps != optimizer_steps}:
        values["optimizer"]["parameter_steps"] = behind
    if recovery is not None:
        values["recovery"] = recovery.number
    values |= course_fields(course)
    if guard.get("guard") != "none":
        values["guard"] = dict(guard)
    return values


def read_parameter_steps(scalars: Mapping[str, Any], names: Iterable[str]) -> dict[str, int]:
    """AdamW's counter of each of ``names`` in the state with these scalars."""
    optimizer = scalars.get("optimizer", {})
    behind = optimizer.get("parameter_steps", {})
    return {name: int(behind.get(name, optimizer.get("steps", 0))) for name in names}
