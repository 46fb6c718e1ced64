"""Held-out loss of any checkpoints, and tasks where they are asked for; what is on record is not measured again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.fan_out import fan_out_processes, fan_out_ray
from cluster.lease import hold_lease
from cluster.session import ray_session
from cluster.storage import is_shared_with_workers, open_store
from configs.errors import UserError
from configs.json_numbers import finite_or_none
from configs.load import config_to_dict
from configs.schema import Config
from pipelines.evaluate_tasks import Harness
from pipelines.merge import require_workers
from pipelines.scheduled import EVALUATION_BATCH
from pipelines.tick import EVALUATE_LEASE
from tasks.checkpoints.dooms import without_doomed
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder
from tasks.evaluation.held_out import (
    Evaluation,
    EvaluationTask,
    Outcome,
    evaluation_key,
    read_evaluation,
    suite_of,
    try_checkpoints,
)
from tasks.evaluation.load_ahead import FAILURES
from tasks.merging.selection import on_grid
from tasks.workload import require_language_model


@dataclass(frozen=True, kw_only=True)
class Item:
    """One checkpoint to evaluate."""

    url: str
    """As the user named it, or as the run lists it."""
    digest: str | None
    """By its manifest; None for a plain folder, whose records nobody can look up."""
    error: Exception | None = None
    """Why it cannot be opened."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Checkpoints to measure on one run's held-out text."""

    run: RunFolder
    """The run whose text it is, and where records go."""
    config: Config
    """Its configuration."""
    items: tuple[Item, ...] = ()
    """Checkpoints, in the order of the answer."""

    def on_record(self, item: Item) -> Evaluation | None:
        """What was measured of ``item`` before."""
        return read_evaluation(self.run.store, item.digest, suite_of(self.config)) if item.digest else None


def evaluate(
    urls: Sequence[str],
    run_url: str | None,
    *,
    missing: bool = False,
    workers: str = "local",
    harness: Harness | None = None,
) -> dict[str, Any]:
    """Evaluate ``urls`` or, with ``missing``, all of the run at ``run_url`` and its branches that has no record yet.

    ``run_url`` is needed for checkpoints that are not inside a run folder. A checkpoint that fails (damaged, other shapes)
    is marked by ``error`` and keeps no other from being evaluated; ``ok`` says whether there was none. Raises
    :class:`configs.errors.UserError` before any work for a URL without a checkpoint or a run, and
    :class:`cluster.errors.LeaseHeld` if somebody else fills in what is missing. Returns the fields of
    ``pma evaluate --json``.
    """
    require_workers(workers)
    if missing and (urls or run_url is None):
        raise UserError("--missing finds the checkpoints itself: give --run URL beside it, and no other URL")
    if not missing and not urls:
        raise UserError("name checkpoints to evaluate, or give --run URL --missing for all that have no record yet")
    works = _works_of_tree(str(run_url), harness) if missing else _works_of(urls, run_url)
    for work in works if harness is not None else ():
        require_language_model(work.config, "--tasks")
    rows: list[dict[str, Any]] = []
    with _session(workers, works):
        for work in works:
            rows += _fill_in(work, workers, harness) if missing else carry_out(work, workers, harness)
    if not missing:
        rows = [next(row for row in rows if row["url"] == url) for url in dict.fromkeys(urls)]
    return {"ok": not any("error" in row for row in rows), "results": rows}


def carry_out(work: Work, workers: str, harness: Harness | None) -> list[dict[str, Any]]:
    """A row for each checkpoint of ``work``; what has no record yet is measured and recorded."""
    rows = {item.url: _row_of_record(work, item) for item in work.items}
    todo = [url for url, row in rows.items() if row is None]
    rows |= {outcome.url: _row_of(outcome) for outcome in _measure(work, todo, workers)}
    found = [row for row in rows.values() if row is not None]
    if harness is None:
        return found
    return [
        row if "error" in row else row | harness.score(work.run, work.config, row["url"], row["digest"])
        for row in found
    ]


def run_of(url: str) -> str:
    """Run that a snapshot, merged checkpoint or branch snapshot lies in."""
    for marker in ("/snapshots/", "/merged/"):
        if marker in url:
            return url.rpartition(marker)[0]
    raise UserError(f"{url} is not inside a run folder; name the run whose held-out text to use with --run")


def _works_of(urls: Sequence[str], run_url: str | None) -> list[Work]:
    """``urls`` by the runs they are measured on."""
    works: dict[str, Work] = {}
    for url in dict.fromkeys(urls):
        place = open_store(run_url or run_of(url)).url
        if place not in works:
            run = RunFolder(place)
            works[place] = Work(run=run, config=run.identity().config)
        works[place] = replace(works[place], items=(*works[place].items, _item_at(url)))
    return list(works.values())


def _works_of_tree(run_url: str, harness: Harness | None) -> list[Work]:
    """What lacks a record in the run and in its branches, which are runs of their own."""
    run = RunFolder(run_url)
    work = _lacking(Work(run=run, config=run.identity().config), harness)
    branches = [run.branch(name) for name in run.branches()]
    below = [_works_of_tree(branch.url, harness) for branch in branches if branch.store.exists(RUN_KEY)]
    return ([work] if work.items else []) + [item for works in below for item in works]


def _lacking(work: Work, harness: Harness | None) -> Work:
    """``work`` with all snapshots and merges of the run that lack a record, as the run is now."""
    suite, done = suite_of(work.config), set(work.run.store.keys("evaluations"))
    look = work.run.look()
    waiting = [
        glance
        for glance in (*on_grid(look.snapshots()), *look.merged().values())
        if evaluation_key(glance.digest, suite) not in done
        or (harness and harness.lacks(glance.digest, done, work.config))
    ]
    kept = without_doomed(work.run.store, waiting)
    return replace(work, items=tuple(Item(url=glance.url, digest=glance.digest) for glance in kept))


def _fill_in(work: Work, workers: str, harness: Harness | None) -> list[dict[str, Any]]:
    with hold_lease(work.run.store, EVALUATE_LEASE):
        # Again, now that nobody else evaluates: the one before may have, and retention may have taken some away.
        return carry_out(_lacking(work, harness), workers, harness)


def _item_at(url: str) -> Item:
    try:
        manifest = open_checkpoint(url).manifest
    except UserError:
        raise  # there is no checkpoint: nothing is begun
    except FAILURES as error:
        return Item(url=url, digest=None, error=error)
    return Item(url=url, digest=manifest.digest if manifest else None)


def _measure(work: Work, urls: Sequence[str], workers: str) -> Iterable[Outcome]:
    """Outcomes as they come; the weights are read by the workers."""
    task = EvaluationTask(run_url=work.run.url, config=config_to_dict(work.config), urls=tuple(urls))
    if not urls:
        return
    if workers == "local":
        yield from try_checkpoints(task)
        return
    tasks = [replace(task, urls=tuple(urls[i : i + EVALUATION_BATCH])) for i in range(0, len(urls), EVALUATION_BATCH)]
    if workers == "ray":
        nodes = work.config.cluster.merge_nodes
        found = fan_out_ray(try_checkpoints, tasks, num_in_flight=4 * (os.cpu_count() or 1), nodes=nodes)
    else:
        found = fan_out_processes(try_checkpoints, tasks, num_workers=int(workers))
    for outcomes in found:
        yield from outcomes


def _session(workers: str, works: Sequence[Work]) -> contextlib.AbstractContextManager[None]:
    """Ray, if it was asked for and there is something to measure."""
    todo = [(work, item) for work in works for item in work.items if not item.error and work.on_record(item) is None]
    if workers == "local" or not todo:
        return contextlib.nullcontext()
    for work, item in todo:
        if not all(is_shared_with_workers(store) for store in (work.run.store, open_store(item.url))):
            raise UserError(f"--workers {workers} cannot see memory:// storage; use --workers local")
    return ray_session(None, os.cpu_count() or 1) if workers == "ray" else contextlib.nullcontext()


def _row_of_record(work: Work, item: Item) -> dict[str, Any] | None:
    if item.error is not None:
        return _row_of(Outcome(url=item.url, evaluation=None, error=item.error))
    found = work.on_record(item)
    return None if found is None else _row_of(Outcome(url=item.url, evaluation=found)) | {"reused": True}


def _row_of(outcome: Outcome) -> dict[str, Any]:
    """A row of the answer; numbers that are not finite are null."""
    if outcome.evaluation is None:
        return {"url": outcome.url, "ok": False, "error": str(outcome.error), "loss": None, "domains": {}}
    names = ("digest", "loss", "domains", "slices", "bits_per_byte", "domain_bits_per_byte", "tokens")
    values = {name: finite_or_none(getattr(outcome.evaluation, name)) for name in names}
    return {"url": outcome.url, "ok": True, **values, "reused": False}
