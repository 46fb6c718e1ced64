"""Adopt the checkpoints of another trainer into a run, so that merges, evaluations and retention know them."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any, Literal

from cluster.fan_out import fan_out_local
from cluster.storage import open_store
from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from configs.sections import AnnealConfig, EvaluationConfig, ScheduleConfig, SnapshotConfig, TrainingConfig
from tasks.checkpoints.adopt import adopt_checkpoint
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder

STEP_MARK = "{step}"
NUM_WORKERS = 2
"""Checkpoints hashed at once."""


def adopt(
    run_url: str,
    pattern: str,
    *,
    format_: Literal["hf", "dcp"],
    tokens_per_step: int | None,
    phase: Literal["warmup", "stable", "decay"] | None,
    config_name: str | None,
) -> dict[str, Any]:
    """Register every checkpoint that ``pattern`` names; what was adopted before is left as it is.

    Returns ``run``, ``adopted`` (rows of step, url, source, digest) and ``known`` (steps that were there).
    """
    folders = match_folders(pattern)
    if not folders:
        raise UserError(f"--from {pattern} names no folder; write the part that changes as * or {STEP_MARK}")
    run = RunFolder(run_url)
    begin_run(run, sorted(folders), tokens_per_step, config_name)
    tokens = run.identity().config.training.batch_tokens
    if tokens_per_step not in (None, tokens):
        raise UserError(f"--tokens-per-step {tokens_per_step}: the run says {tokens} (training.batch_tokens)")

    def adopt_step(step: int) -> tuple[int, Any, bool]:
        manifest, is_new = adopt_checkpoint(
            run.store, folders[step], format_=format_, step=step, tokens_seen=step * tokens, phase=phase
        )
        return step, manifest, is_new

    rows = sorted(fan_out_local(adopt_step, sorted(folders), num_workers=NUM_WORKERS), key=lambda row: row[0])
    return {
        "run": run.url,
        "adopted": [
            {
                "step": step,
                "url": f"{run.url}/snapshots/step-{step:09d}",
                "source": folders[step],
                "digest": manifest.digest,
                "tokens_seen": manifest.tokens_seen,
            }
            for step, manifest, is_new in rows
            if is_new
        ],
        "known": [step for step, _, is_new in rows if not is_new],
    }


def begin_run(run: RunFolder, steps: list[int], tokens_per_step: int | None, config_name: str | None) -> None:
    """Create the run if there is none: with the named configuration, or one that knows tokens and spacing alone."""
    if run.store.exists(RUN_KEY):
        return
    if config_name is not None:
        run.begin(load_config(config_name).config)
        return
    if tokens_per_step is None:
        raise UserError(
            f"{run.url} is a new run: give --tokens-per-step N (tokens of one global batch), or --config C that describes it"
        )
    spacing = math.gcd(*(later - earlier for earlier, later in itertools.pairwise(steps))) or steps[0] or 1
    interval = spacing * tokens_per_step
    run.begin(
        Config(
            name=re.sub(r"[^A-Za-z0-9._-]", "-", run.url.rsplit("/", 1)[1]) or "adopted",
            notes="adopted: a run of another trainer; model and data are not known here",
            training=TrainingConfig(
                total_tokens=max(1, steps[-1]) * tokens_per_step,
                num_workers=1,
                sequence_length=tokens_per_step,
                batch_tokens=tokens_per_step,
            ),
            schedule=ScheduleConfig(warmup_tokens=0, decay_tokens=0),
            evaluation=EvaluationConfig(slice_tokens=tokens_per_step),
            snapshots=SnapshotConfig(interval_tokens=interval),
            anneal=AnnealConfig(tokens=interval),
        )
    )


def match_folders(pattern: str) -> dict[int, str]:
    """Step to URL of the folders that ``pattern`` names: ``*`` and ``{step}`` stand for part of one folder's name.

    Without ``{step}`` the last number in the folder's name is the step.
    """
    parts = pattern.rstrip("/").split("/")
    first = next((i for i, part in enumerate(parts) if "*" in part or STEP_MARK in part), len(parts))
    found = ["/".join(parts[:first])]
    for part in parts[first:]:
        expression = re.compile(re.escape(part).replace(r"\*", ".*").replace(re.escape(STEP_MARK), r"(\d+)"))
        found = [f"{url}/{name}" for url in found for name in open_store(url).folders("") if expression.fullmatch(name)]
    steps: dict[int, str] = {}
    for url in found:
        step = _step_of(pattern.rstrip("/"), url)
        if step is None:
            raise UserError(f"{url}: no step number in the folder's name; mark it in --from as {STEP_MARK}")
        if step in steps:
            raise UserError(f"step {step} is named twice: {steps[step]} and {url}")
        steps[step] = url
    return steps


def _step_of(pattern: str, url: str) -> int | None:
    if STEP_MARK in pattern:
        expression = re.escape(pattern).replace(r"\*", ".*").replace(re.escape(STEP_MARK), r"(\d+)")
        match = re.fullmatch(expression, url)
        return int(match[1]) if match else None
    numbers = re.findall(r"\d+", url.rsplit("/", 1)[1])
    return int(numbers[-1]) if numbers else None
