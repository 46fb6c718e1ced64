"""What other commands put on record of a run and the report shows: forecast, ablations, arms of stages, scores of tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from cluster.storage import Store
from configs.errors import UserError
from configs.schema import Config
from pipelines.ablate import FOLDER as ABLATIONS
from pipelines.forecast import forecast
from pipelines.tracked.charts import COMPARISONS
from pipelines.tracking import CURSOR_KEY
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.task_scores import TaskScores, all_scores


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What there is beside training, merges and held-out losses."""

    forecast: dict[str, Any] | None
    """Fields of ``pma forecast --json``."""
    no_forecast: str
    """Why there is none; empty if there is."""
    ablation: dict[str, Any] | None
    """The latest record of ``pma ablate``."""
    num_ablations: int
    """Records of it, each of another grid."""
    comparisons: list[dict[str, Any]]
    """Of the arms of a stage, the latest last."""
    scores: list[TaskScores]
    """Of tasks of lm-evaluation-harness."""
    tracking_url: str
    """The run's page in MLflow; empty where tracking is no server that a browser can open."""


def gather_evidence(run: RunFolder, config: Config) -> Evidence:
    """Read it from the run folder."""
    said, reason = try_forecast(run, config)
    ablations = read_records(run.store, ABLATIONS)
    return Evidence(
        forecast=said,
        no_forecast=reason,
        ablation=max(ablations, key=_age, default=None),
        num_ablations=len(ablations),
        comparisons=sorted(read_records(run.store, COMPARISONS), key=lambda record: float(record["time"])),
        scores=all_scores(run.store),
        tracking_url=tracking_url(run.store, config),
    )


def try_forecast(run: RunFolder, config: Config) -> tuple[dict[str, Any] | None, str]:
    """The forecast, or None and why not."""
    if config.schedule.decay_tokens:
        return None, "the run's own schedule anneals at its end"
    try:
        said = forecast(run.url)
    except UserError as error:
        return None, str(error)
    return said, "" if said["forecast_loss"] is not None else "; ".join(said["cannot_know"])


def read_records(store: Store, folder: str) -> list[dict[str, Any]]:
    """The JSON objects right below ``folder``."""
    keys = [key for key in store.keys(folder) if key.count("/") == 1 and key.endswith(".json")]
    return [json.loads(store.read(key)) for key in keys]


def tracking_url(store: Store, config: Config) -> str:
    """Page of the run in MLflow's web interface, if the configured server is one and knows the run."""
    uri = config.tracking.uri
    if uri is None or urlsplit(uri).scheme not in ("http", "https"):
        return ""
    cursors = json.loads(store.read_if_present(CURSOR_KEY) or b"{}")
    run_id = cursors.get(uri, {}).get("runs", {}).get("run")
    return f"{uri.rstrip('/')}/#/runs/{quote(run_id)}" if run_id else ""


def _age(record: dict[str, Any]) -> tuple[float, int, int]:
    """Orders ablations by when they were made; records of before that was noted come first, by where they end and their size."""
    newest = max((end["step"] for end in record["ends"]), default=0)
    return float(record.get("created", 0.0)), newest, len(record["cells"])
