"""Adopt the checkpoints of another trainer into a run, so that merges, evaluations and retention know them."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cluster.errors import ObjectMissing
from cluster.fan_out import fan_out_local
from cluster.storage import open_store
from configs.errors import UserError
from configs.load import load_config, override
from configs.merging import MergeConfig
from configs.schema import Config
from configs.sections import AnnealConfig, EvaluationConfig
from configs.training import ScheduleConfig, SnapshotConfig, TrainingConfig
from configs.typed import parse_record
from tasks.checkpoints.adopt import adopt_checkpoint
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder, snapshot_key
from tasks.checkpoints.safetensors_header import CheckpointError

STEP_MARK = "{step}"
SOURCES = "sources"
"""Folder of the run that remembers where checkpoints come from."""
ADOPTED_NOTE = "adopted: a run of another trainer; model and data are not known here"
NUM_WORKERS = 2
"""Checkpoints hashed at once."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where another trainer leaves its checkpoints, kept in the run, so that a tick finds the ones that come later."""

    pattern: str
    """Folders: ``*`` and ``{step}`` stand for a part."""
    format: Literal["hf", "dcp"]
    """What the folders hold."""
    phase: Literal["warmup", "stable", "decay"] | None = None
    """Phase of the schedule that they are of."""
    marker: str | None = None
    """File that the trainer writes into a folder last; None where the format itself tells what is complete."""

    @property
    def key(self) -> str:
        """Key of its record below the run."""
        return f"{SOURCES}/{fingerprint(asdict(self))[:16]}.json"


@dataclass(kw_only=True)
class Growth:
    """What a look at the sources of a run came to."""

    adopted: list[dict[str, Any]] = field(default_factory=list)
    """Rows of step, url, source, digest and tokens_seen, by step."""
    waiting: dict[str, str] = field(default_factory=dict)
    """Folder to why it is not adopted yet: not complete, or damaged."""


def adopt(
    run_url: str,
    pattern: str,
    *,
    format_: Literal["hf", "dcp"],
    tokens_per_step: int | None = None,
    phase: Literal["warmup", "stable", "decay"] | None = None,
    marker: str | None = None,
    config_name: str | None = None,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Register every checkpoint that ``pattern`` names; what was adopted before is left as it is.

    Returns ``run``, ``adopted`` (rows of step, url, source, digest) and ``known`` (steps that were there). Later checkpoints
    are found by ``pma tick``.
    """
    source = Source(pattern=absolute_pattern(pattern), format=format_, phase=phase, marker=marker)
    folders = match_folders(source.pattern)
    if not folders:
        raise UserError(f"--from {pattern} names no folder; write the part that changes as * or {STEP_MARK}")
    run = RunFolder(run_url)
    begin_run(run, sorted(folders), tokens_per_step, config_name, overrides)
    tokens = run.identity().config.training.batch_tokens
    if tokens_per_step not in (None, tokens):
        raise UserError(f"--tokens-per-step {tokens_per_step}: the run says {tokens} (training.batch_tokens)")
    unmarked = [url for url in folders.values() if not _is_marked(url, marker)]
    if unmarked:
        raise UserError(
            f"{unmarked[0]}: not complete, it lacks {marker}; adopt it when it is there, or leave --marker out"
        )
    rows = list(fan_out_local(_adopt_one(run, source, folders), sorted(folders), num_workers=NUM_WORKERS))
    run.store.put(source.key, json.dumps(asdict(source), indent=1).encode())
    rows.sort(key=lambda row: int(row["step"]))
    return {
        "run": run.url,
        "adopted": [_without_is_new(row) for row in rows if row["is_new"]],
        "known": [row["step"] for row in rows if not row["is_new"]],
    }


def adopt_new(run: RunFolder, known_steps: Collection[int]) -> Growth:
    """Adopt what the run's sources hold beside ``known_steps``, where it is complete; the rest waits for the next look."""
    growth = Growth()
    for key in run.store.keys(SOURCES):
        source = parse_record(Source, json.loads(run.store.read(key)))
        try:
            folders = match_folders(source.pattern)
        except UserError as error:
            growth.waiting[source.pattern] = str(error)
            continue
        adopt_step = _adopt_one(run, source, folders)
        for step in sorted(set(folders) - set(known_steps)):
            if not _is_marked(folders[step], source.marker):
                growth.waiting[folders[step]] = f"it lacks {source.marker}"
                continue
            try:
                row = adopt_step(step)
            except (CheckpointError, UserError, ObjectMissing) as error:
                growth.waiting[folders[step]] = str(error)
            else:
                growth.adopted += [_without_is_new(row)] if row["is_new"] else []
    return growth


def absolute_pattern(pattern: str) -> str:
    """``pattern`` as any working directory can read it."""
    return pattern if "://" in pattern else os.path.abspath(pattern)


def _adopt_one(run: RunFolder, source: Source, folders: Mapping[int, str]) -> Callable[[int], dict[str, Any]]:
    tokens_per_step = run.identity().config.training.batch_tokens

    def adopt_step(step: int) -> dict[str, Any]:
        manifest, is_new = adopt_checkpoint(
            run.store,
            folders[step],
            format_=source.format,
            step=step,
            tokens_seen=step * tokens_per_step,
            phase=source.phase,
        )
        return {
            "step": step,
            "url": f"{run.url}/{snapshot_key(step)}",
            "source": folders[step],
            "digest": manifest.digest,
            "tokens_seen": manifest.tokens_seen,
            "is_new": is_new,
        }

    return adopt_step


def _without_is_new(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "is_new"}


def _is_marked(url: str, marker: str | None) -> bool:
    return marker is None or open_store(url).exists(marker)


def begin_run(
    run: RunFolder,
    steps: list[int],
    tokens_per_step: int | None,
    config_name: str | None,
    overrides: tuple[str, ...] = (),
) -> None:
    """Create the run if there is none: with the named configuration, or one that knows tokens and spacing alone."""
    if run.store.exists(RUN_KEY):
        if overrides:
            raise UserError(
                f"{overrides[0]}: {run.url} is a run already, its configuration stands; give keys of how it is carried "
                "out, such as merge.schedule, to pma tick"
            )
        return
    if config_name is not None:
        run.begin(load_config(config_name, overrides).config)
        return
    if tokens_per_step is None:
        raise UserError(
            f"{run.url} is a new run: give --tokens-per-step N (tokens of one global batch), or --config C that describes it"
        )
    spacing = math.gcd(*(later - earlier for earlier, later in itertools.pairwise(steps))) or steps[0] or 1
    interval = spacing * tokens_per_step
    bare = Config(
        name=re.sub(r"[^A-Za-z0-9._-]", "-", run.url.rsplit("/", 1)[1]) or "adopted",
        notes=ADOPTED_NOTE,
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
        # Without model and data there is nothing to evaluate with.
        merge=MergeConfig(evaluate=False),
    )
    run.begin(override(bare, overrides))


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
