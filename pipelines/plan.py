"""What a pipeline still has to do, from its configuration and the run folder alone: its graph, bytes and a time estimate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cluster.journal import journal_keys, read_events, read_journal_object
from configs.errors import UserError
from configs.schema import Config
from pipelines.anneal import anneal_steps, branch_config, branch_name, fork_step
from pipelines.compare import compare_step
from pipelines.driven import Driven
from pipelines.pretrain import pretrain_steps
from pipelines.steps import Step, Unit, read_records
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder, require_same_run, snapshot_key
from tasks.checkpoints.start_point import StartPoint

ASSUMED_BYTES_PER_SECOND = 1 << 30
"""Bandwidth of merging before a merge of the run was timed."""
NEWEST_OBJECTS = 3
"""Objects of the journal whose median speed is taken."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step of the plan."""

    step: str
    """Its name; those of a branch begin with the branch's."""
    version: int
    """Of the step."""
    state: Literal["done", "due", "blocked"]
    """Blocked steps wait for one that they need."""
    needs: tuple[str, ...]
    """Names of steps."""
    units_done: int
    """Pieces whose output is committed."""
    units: int
    """All pieces."""
    bytes_read: int
    """What is left to read."""
    bytes_written: int
    """What is left to write."""
    seconds: float | None
    """Estimate of what is left; None where nothing of the kind was timed on this run."""


def plan(pipeline: str, config: Config, run_url: str) -> dict[str, Any]:
    """The fields of ``pma plan --json``; nothing is written, and no worker is started.

    Raises :class:`configs.errors.UserError` if the run was begun, or a step was done, with other values.
    """
    if pipeline not in PIPELINES:
        raise UserError(f"no pipeline {pipeline!r}; there are {', '.join(PIPELINES)}")
    run = RunFolder(run_url)
    if run.store.exists(RUN_KEY):
        require_same_run(run.identity(), config, run.identity().start, run.url)
    speeds = measured_speeds(run)
    rows: list[Row] = []
    for prefix, driven, steps in PIPELINES[pipeline](run, config):
        listed = {row.step for row in rows}
        done = {row.step for row in rows if row.state == "done"}
        rows += [row for row in rows_of(prefix, driven, steps, speeds, done) if row.step not in listed]
    known = [row.seconds for row in rows if row.seconds is not None]
    return {
        "pipeline": pipeline,
        "run": run.url,
        "steps": [asdict(row) for row in rows],
        "bytes_read": sum(row.bytes_read for row in rows),
        "bytes_written": sum(row.bytes_written for row in rows),
        # Merges and evaluations go on beside training; the longest of the steps bounds what can be told.
        "seconds": round(max(known, default=0.0), 1) if len(known) == len(rows) else None,
        "mermaid": draw_mermaid(rows),
    }


def rows_of(
    prefix: str, driven: Driven, steps: Sequence[Step[Driven]], speeds: Mapping[str, float], done: set[str]
) -> list[Row]:
    """Rows of ``steps``, which come after the steps named in ``done``."""
    records = read_records(driven.run.store, steps)
    rows: list[Row] = []
    finished = set(done)
    # A branch waits for the snapshot that it is forked from.
    is_begun = driven.start is None or bool(driven.start.digest)
    for step in steps:
        needs = tuple(prefix + name for name in step.needs)
        units = step.units(driven) if step.units else []
        left = [unit for unit in units if not unit.is_done]
        is_finished = step.name in records and step.is_standing(driven, records[step.name].result)
        if is_finished:
            finished.add(prefix + step.name)
        rows.append(
            Row(
                step=prefix + step.name,
                version=step.version,
                state="done" if is_finished else "due" if is_begun and set(needs) <= finished else "blocked",
                needs=needs,
                units_done=len(units) - len(left),
                units=len(units),
                bytes_read=0 if is_finished else sum(unit.bytes_read for unit in left),
                bytes_written=0 if is_finished else sum(unit.bytes_written for unit in left),
                seconds=0.0 if is_finished else estimate(step.name, driven, left, speeds),
            )
        )
    return rows


def estimate(name: str, driven: Driven, left: Sequence[Unit], speeds: Mapping[str, float]) -> float | None:
    """Seconds that the units ``left`` of a step will take at the speeds measured on this run."""
    if name == "train":
        begun = driven.start.tokens_seen if driven.start else 0
        seen = max((s.tokens_seen or 0 for s in driven.run.glances()), default=begun)
        tokens = driven.config.training.total_tokens - seen
        return round(tokens / speeds["tokens"], 1) if "tokens" in speeds else None
    if name in ("merge", "compare"):
        return round(sum(unit.bytes_read for unit in left) / speeds.get("merge", ASSUMED_BYTES_PER_SECOND), 1)
    return round(len(left) * speeds["evaluation"], 1) if "evaluation" in speeds else None


def measured_speeds(run: RunFolder) -> dict[str, float]:
    """What was measured on this run: tokens a second, bytes a second of a ``merge``, seconds an ``evaluation``."""
    speeds: dict[str, float] = {}
    newest = [m for key in journal_keys(run.store)[-NEWEST_OBJECTS:] for m in read_journal_object(run.store, key)]
    if tokens := [rate for m in newest if (rate := m.metrics.get("train/tokens_per_second"))]:
        speeds["tokens"] = statistics.median(tokens)
    events = read_events(run.store)
    if rates := _ratios(events, "merge", "bytes_read", "seconds"):
        speeds["merge"] = statistics.median(rates)
    if rates := _ratios(events, "evaluations", "seconds", "count"):
        speeds["evaluation"] = statistics.median(rates)
    return speeds


def _ratios(events: Sequence[Mapping[str, object]], kind: str, over: str, under: str) -> list[float]:
    pairs = [(float(str(e[over])), float(str(e[under]))) for e in events if e["kind"] == kind]
    return [a / b for a, b in pairs if b > 0]


def draw_mermaid(rows: Sequence[Row]) -> str:
    """The graph as Mermaid text."""
    ids = {row.step: f"s{number}" for number, row in enumerate(rows)}
    lines = ["flowchart LR"]
    for row in rows:
        count = f"<br/>{row.units_done} of {row.units}" if row.units else ""
        lines.append(f'  {ids[row.step]}["{row.step}{count}"]:::{row.state}')
        lines += [f"  {ids[name]} --> {ids[row.step]}" for name in row.needs if name in ids]
    return "\n".join(
        [
            *lines,
            "  classDef done fill:#d7f0dd,stroke:#2a7a3b",
            "  classDef due fill:#fff1c9,stroke:#a67c00",
            "  classDef blocked fill:#eeeeee,stroke:#888888",
        ]
    )


def _pretrain(run: RunFolder, config: Config) -> list[tuple[str, Driven, list[Step[Driven]]]]:
    start = run.identity().start if run.store.exists(RUN_KEY) else None
    return [("", Driven(run=run, config=config, start=start), pretrain_steps(config, start))]


def _stage(run: RunFolder, config: Config) -> list[tuple[str, Driven, list[Step[Driven]]]]:
    """The first arm, and the further ones that are on record."""
    rows = _pretrain(run, config)
    for name in run.branches():
        branch = run.branch(name)
        identity = branch.identity() if branch.store.exists(RUN_KEY) else None
        if identity is not None and identity.start is not None and identity.start.weights_only:
            arm = Driven(run=branch, config=identity.config, start=identity.start)
            rows.append((f"{name}/", arm, pretrain_steps(identity.config, identity.start)))
    return rows


def _demo(run: RunFolder, config: Config) -> list[tuple[str, Driven, list[Step[Driven]]]]:
    fork = fork_step(config)
    branch = run.branch(branch_name(fork))
    fork_tokens = fork * config.training.batch_tokens
    planned = StartPoint(url=f"{run.url}/{snapshot_key(fork)}", digest="", step=fork, tokens_seen=fork_tokens)
    start = (branch.identity().start if branch.store.exists(RUN_KEY) else None) or planned
    decay = branch_config(config, fork_tokens, config.anneal.tokens)
    return [
        *_pretrain(run, config),
        (f"{branch_name(fork)}/", Driven(run=branch, config=decay, start=start), anneal_steps(decay, start)),
        ("", Driven(run=run, config=config), [pretrain_steps(config)[0], compare_step(config)]),
    ]


PIPELINES: dict[str, Callable[[RunFolder, Config], list[tuple[str, Driven, list[Step[Driven]]]]]] = {
    "pretrain": _pretrain,
    "demo": _demo,
    "continue-training": _stage,
    "sft": _stage,
}
