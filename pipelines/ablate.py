"""Ablations: merges of a run's stored snapshots over methods, N, V and end points, made, evaluated and compared.

Every cell leaves a record of its loss; the merged weights are taken away again, unless they stood before or are to be kept.
A call that is interrupted goes on where it stopped, and what a record says of the same snapshots is not made again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

from cluster.fan_out import fan_out_processes
from cluster.storage import open_store
from configs.errors import UserError
from configs.load import config_to_dict
from configs.schema import Config
from pipelines.interval_scaling import best_interval, scale_intervals
from pipelines.merge import carry_out, require_workers
from tasks.checkpoints.catalog import Glance
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.manifest import MANIFEST_KEY, read_manifest
from tasks.checkpoints.run_folder import RunFolder
from tasks.checkpoints.tied import open_untied
from tasks.evaluation.ablation import Advice, Cell, Grid, Scored, advise, lay_out, passes, span_view
from tasks.evaluation.held_out import (
    Evaluation,
    EvaluationTask,
    evaluate_checkpoints,
    paired_gain,
    read_evaluation,
    suite_of,
)
from tasks.merging.merge import find_standing
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import Recipe, plan_merges

FOLDER = "ablations"
CELLS = f"{FOLDER}/cells"
BATCH = 32
"""Merges that stand at once, unless a single read makes more."""
WORTH_A_PROCESS = 8
"""Checkpoints for which a further process is started."""
KEYS = ("methods", "counts", "intervals", "alphas", "ends")


def ablate(
    run_url: str,
    settings: tuple[str, ...] = (),
    *,
    beside: Sequence[str] = (),
    keep: bool = False,
    workers: str = "local",
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Make, evaluate and compare the merges of a grid; returns the fields of ``pma ablate --json``.

    ``settings`` are ``counts=[3,6,10]`` and the like, of :data:`KEYS`. With runs ``beside`` it, which have an ablation on record,
    the best V is set against the size of the model. Raises :class:`configs.errors.UserError` for what is
    not possible, before anything is made.
    """
    started = time.perf_counter()
    require_workers(workers)
    for url in beside:
        best_interval(url)
    run = RunFolder(run_url)
    config = run.identity().config
    snapshots = [glance for glance in run.glances() if not glance.ephemeral]
    grid = parse_grid(settings, config, snapshots)
    cells, lacking = lay_out(grid, snapshots)
    scored: list[Scored] = []
    for groups in batched(passes(cells)):
        scored += score_groups(run, config, groups, keep=keep, workers=workers)
        tell(f"{len(scored)} of {len(cells)} merges evaluated")
    for item in scored:
        if not math.isfinite(item.evaluation.loss):
            lacking[item.cell.name] = "its held-out loss is not finite"
    scored = [item for item in scored if item.cell.name not in lacking]
    raw = evaluate_raw(run, config, {cell.end.url: cell.end for cell in cells})
    result = describe(run, grid, scored, raw, lacking)
    key = f"{FOLDER}/{fingerprint([dataclasses.asdict(grid), suite_of(config)])[:16]}.json"
    run.store.put(key, json.dumps(result, indent=1).encode())
    if beside:
        result["scaling"] = scale_intervals([run.url, *beside])
    return {**result, "record": f"{run.url}/{key}", "seconds": round(time.perf_counter() - started, 3)}


def parse_grid(settings: Sequence[str], config: Config, snapshots: Sequence[Glance]) -> Grid:
    """The grid that ``settings`` ask for; what they leave out follows from the run."""
    if not snapshots:
        raise UserError("the run has no committed snapshots yet: nothing to merge")
    interval = config.merge_interval_tokens
    values: dict[str, tuple[Any, ...]] = {
        "methods": ("sma", "wma", "ema"),
        "counts": tuple(config.merge.comparison_counts),
        "intervals": (interval, 2 * interval),
        "alphas": (config.merge.alpha,),
        "ends": (snapshots[-1].step or 0,),
    }
    for setting in settings:
        key, equals, text = setting.partition("=")
        if key not in values or not equals:
            raise UserError(f"{setting!r}: expected KEY=[...], KEY one of {', '.join(KEYS)}")
        values[key] = _parse_list(key, text)
    return Grid(**values)


def batched(groups: Sequence[list[Cell]]) -> Iterator[list[list[Cell]]]:
    """``groups`` in batches whose merges stand at once: evaluating them together saves starting processes for each."""
    batch: list[list[Cell]] = []
    for group in groups:
        if batch and sum(map(len, batch)) + len(group) > BATCH:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def score_groups(
    run: RunFolder, config: Config, groups: Sequence[Sequence[Cell]], *, keep: bool, workers: str
) -> list[Scored]:
    """Make and evaluate cells, a group of one end and V with one read; those on record are not made again."""
    suite = suite_of(config)
    cells = [cell for group in groups for cell in group]
    known = {cell.name: found for cell in cells if (found := _read_cell(run, cell, suite)) is not None}
    todo = [[cell for cell in group if cell.name not in known] for group in groups]
    urls = {name: url for group in todo if group for name, url in make_merges(run, group, workers).items()}
    evaluate_urls(run, config, list(urls.values()), workers)
    for cell in (cell for group in todo for cell in group):
        digest = read_manifest(open_store(urls[cell.name]))[0].digest
        evaluation = read_evaluation(run.store, digest, suite)
        assert evaluation is not None
        known[cell.name] = Scored(cell=cell, digest=digest, evaluation=evaluation)
        _write_cell(run, known[cell.name])
        if not keep and f"/{CELLS}/" in urls[cell.name]:
            take_away(urls[cell.name])
    return [known[cell.name] for cell in cells]


def make_merges(run: RunFolder, cells: Sequence[Cell], workers: str) -> dict[str, str]:
    """URL of the merge of every cell: where it stands among the run's own, else made below :data:`CELLS`."""
    longest = max(cells, key=lambda cell: cell.rule.count)
    inputs = [open_untied(snapshot.url) for snapshot in longest.window]
    merged = run.look().merged()
    urls = {
        cell.name: merged[cell.name].url if _is_same(merged.get(cell.name), cell) else f"{run.url}/{CELLS}/{cell.name}"
        for cell in cells
    }
    recipes = [
        Recipe(
            output_url=urls[cell.name],
            choice=MethodChoice(method=cell.rule.method, alpha=cell.rule.alpha),
            count=cell.rule.count,
        )
        for cell in cells
        if f"/{CELLS}/" in urls[cell.name]
    ]
    standing = [find_standing(plan) for plan in plan_merges(inputs, recipes)] if recipes else []
    todo = [recipe for recipe, found in zip(recipes, standing, strict=True) if found is None]
    if todo:
        carry_out(workers, plan_merges(inputs, todo))
    return urls


def evaluate_urls(run: RunFolder, config: Config, urls: Sequence[str], workers: str) -> None:
    """Evaluate what has no record yet: in this process or, where it is worth their start, in a process per CPU."""
    suite = suite_of(config)
    todo = [url for url in urls if read_evaluation(run.store, read_manifest(open_store(url))[0].digest, suite) is None]
    most = int(workers) if workers.isdigit() else os.cpu_count() or 1
    processes = max(1, min(most, len(todo) // WORTH_A_PROCESS))
    tasks = [
        EvaluationTask(run_url=run.url, config=config_to_dict(config), urls=tuple(todo[start::processes]))
        for start in range(processes)
    ]
    if len(tasks) > 1:
        list(fan_out_processes(evaluate_checkpoints, tasks, num_workers=len(tasks)))
    elif todo:
        evaluate_checkpoints(tasks[0])


def evaluate_raw(run: RunFolder, config: Config, ends: dict[str, Glance]) -> dict[int, Evaluation]:
    """The raw snapshots that windows end with, by step."""
    evaluate_urls(run, config, list(ends), "local")
    found = {glance.step or 0: read_evaluation(run.store, glance.digest, suite_of(config)) for glance in ends.values()}
    return {step: evaluation for step, evaluation in found.items() if evaluation is not None}


def describe(
    run: RunFolder, grid: Grid, scored: Sequence[Scored], raw: dict[int, Evaluation], lacking: dict[str, str]
) -> dict[str, Any]:
    """The record: every cell, and by end point what is best and what to choose."""
    ends = []
    for step in grid.ends:
        mine = [item for item in scored if item.cell.end.step == step]
        if mine:
            ends.append(_describe_end(step, mine, raw.get(step), advise(mine)))
    return {
        "run": run.url,
        "grid": dataclasses.asdict(grid),
        "cells": [_describe_cell(item, raw.get(item.cell.end.step or 0)) for item in scored],
        "ends": ends,
        "lacking": [{"name": name, "reason": reason} for name, reason in lacking.items()],
        "created": time.time(),
    }


def take_away(url: str) -> None:
    """Remove a merge of the grid: its manifest first, so that it is never half there."""
    store = open_store(url)
    store.delete(MANIFEST_KEY)
    for key in store.keys(""):
        store.delete(key)


def _describe_end(step: int, scored: Sequence[Scored], raw: Evaluation | None, advice: Advice) -> dict[str, Any]:
    return {
        "step": step,
        "raw_loss": raw.loss if raw else None,
        "best": advice.best.cell.name,
        "chosen": advice.chosen.cell.name,
        "recommended": {"method": advice.chosen.cell.rule.method, "count": advice.chosen.cell.rule.count,
                        "interval_tokens": advice.chosen.cell.rule.interval_tokens},
        "not_told_apart": [item.cell.name for item in advice.alike],
        "spans": [{"span_tokens": span, "loss": loss, "cells": count} for span, loss, count in span_view(scored)],
    }  # fmt: skip


def _describe_cell(item: Scored, raw: Evaluation | None) -> dict[str, Any]:
    gain, error = paired_gain(raw, item.evaluation) if raw else (None, None)
    rule = item.cell.rule
    return {
        "name": item.cell.name,
        "method": rule.method,
        "alpha": rule.alpha,
        "count": rule.count,
        "interval_tokens": rule.interval_tokens,
        "span_tokens": item.cell.span_tokens,
        "end_step": item.cell.end.step,
        "digest": item.digest,
        "loss": item.evaluation.loss,
        "gain": gain,
        "gain_error": error,
    }


def _parse_list(key: str, text: str) -> tuple[Any, ...]:
    kind = {"methods": str, "alphas": float}.get(key, int)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    items = value if isinstance(value, list) else [value]
    wrong = [
        item
        for item in items
        if isinstance(item, bool) or not isinstance(item, (int, float) if kind is float else kind)
    ]
    if not items or wrong or len(set(items)) < len(items):
        raise UserError(f"{key}={text}: expected a list of {kind.__name__}, each once, such as {_EXAMPLES[key]}")
    if kind is int and min(items) < (2 if key == "counts" else 1):
        raise UserError(f"{key}={text}: numbers from {2 if key == 'counts' else 1} on")
    return tuple(float(item) if kind is float else item for item in items)


_EXAMPLES = {
    "methods": "methods=[sma,wma]",
    "counts": "counts=[3,6,10]",
    "intervals": "intervals=[102400,204800]",
    "alphas": "alphas=[0.1,0.2]",
    "ends": "ends=[2000,4000]",
}


def _is_same(glance: Glance | None, cell: Cell) -> bool:
    """Whether a merge of the run is this cell: its name may be older than a window of other snapshots."""
    return glance is not None and list(glance.inputs) == [snapshot.url for snapshot in cell.window]


def _cell_key(cell: Cell, suite: str) -> str:
    return f"{FOLDER}/records/{cell.name}-{suite}.json"


def _read_cell(run: RunFolder, cell: Cell, suite: str) -> Scored | None:
    """What is on record of the cell, if it was made of these very snapshots and is evaluated."""
    data = run.store.read_if_present(_cell_key(cell, suite))
    record = json.loads(data) if data is not None else None
    if record is None or record["inputs"] != [snapshot.digest for snapshot in cell.window]:
        return None
    evaluation = read_evaluation(run.store, record["digest"], suite)
    return None if evaluation is None else Scored(cell=cell, digest=record["digest"], evaluation=evaluation)


def _write_cell(run: RunFolder, item: Scored) -> None:
    record = {"inputs": [snapshot.digest for snapshot in item.cell.window], "digest": item.digest}
    run.store.put(_cell_key(item.cell, item.evaluation.suite), json.dumps(record).encode())
