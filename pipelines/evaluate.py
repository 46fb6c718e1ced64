"""Held-out loss of any checkpoints of a run, as Ray tasks or in this process."""

from __future__ import annotations

from typing import Any

from configs.errors import UserError
from configs.json_numbers import finite_or_none
from configs.load import config_to_dict
from configs.schema import Config
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import Evaluation, EvaluationTask, evaluate_checkpoints, read_evaluation, suite_of


def evaluate(urls: tuple[str, ...], run_url: str | None) -> dict[str, Any]:
    """Evaluate checkpoints on their run's held-out slices; what was evaluated before is not evaluated again.

    ``run_url`` is needed for checkpoints that are not inside a run folder. Returns the fields of
    ``pma evaluate --json``.
    """
    results = []
    for url in urls:
        run = RunFolder(run_url or run_of(url))
        evaluation = evaluate_one(run, run.identity().config, url)
        results.append(
            {
                "url": url,
                "digest": evaluation.digest,
                "loss": finite_or_none(evaluation.loss),
                "domains": finite_or_none(evaluation.domains),
                "slices": finite_or_none(evaluation.slices),
                "bits_per_byte": finite_or_none(evaluation.bits_per_byte),
                "tokens": evaluation.tokens,
            }
        )
    return {"results": results}


def evaluate_one(run: RunFolder, config: Config, url: str) -> Evaluation:
    """The record of one checkpoint, made in this process if there is none."""
    manifest = open_checkpoint(url).manifest
    earlier = read_evaluation(run.store, manifest.digest, suite_of(config)) if manifest else None
    if earlier is not None:
        return earlier
    return evaluate_checkpoints(EvaluationTask(run_url=run.url, config=config_to_dict(config), urls=(url,)))[0]


def run_of(url: str) -> str:
    """Run that a snapshot, merged checkpoint or branch snapshot lies in."""
    for marker in ("/snapshots/", "/merged/"):
        if marker in url:
            return url.rpartition(marker)[0]
    raise UserError(f"{url} is not inside a run folder; name the run whose held-out text to use with --run")
