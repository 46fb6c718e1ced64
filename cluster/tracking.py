"""MLflow, and nothing that could hurt a run: explicit run ids, bounded waiting, one error for all faults."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from configs.urls import require_no_credentials

# Read by MLflow when it is imported. One synchronous call to a dead server blocks minutes by default.
BOUNDS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
BATCH = 1000
"""Metrics of one call; MLflow splits above this."""
LARGEST_PARAM = 6000
LARGEST_DATASET_DIGEST = 36
"""Characters; MLflow refuses more."""
LARGEST_DATASET_SOURCE = 65_000
Value = TypeVar("Value")


class TrackingAway(Exception):
    """MLflow did not answer or refused; what was meant for it stays in the run folder."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of a metric."""

    metric: str
    """``area/quantity_unit``."""
    value: float
    """Finite or nan."""
    step: int
    """Tokens seen."""
    time: float
    """Unix seconds."""


@dataclass(frozen=True, kw_only=True)
class TrackedDataset:
    """Data that a run was trained or measured on, by name: never its bytes."""

    name: str
    """Short name."""
    digest: str
    """What changes when the data does; at most :data:`LARGEST_DATASET_DIGEST` characters."""
    source: str
    """JSON of where it lies."""
    context: Literal["training", "evaluation"]
    """What it served for."""
    profile: str
    """JSON of how much it is."""


class Tracker:
    """One MLflow experiment."""

    def __init__(self, uri: str, experiment: str, artifact_location: str | None = None) -> None:
        require_no_credentials(uri, "tracking URI")
        self.uri = uri
        self._experiment_name = experiment
        self._artifact_location = artifact_location
        self._client: Any = None
        self._experiment_id = ""

    def start_run(self, name: str, *, parent_id: str | None, tags: dict[str, str], params: dict[str, object]) -> str:
        """Create a run and return its id."""

        def call() -> str:
            from mlflow.entities import Param

            parent = {"mlflow.parentRunId": parent_id} if parent_id else {}
            run_tags = {**tags, **parent, "mlflow.runName": name}
            run = self._open().create_run(self._experiment_id, run_name=name, tags=run_tags)
            if params:
                rows = [Param(key, str(value)[:LARGEST_PARAM]) for key, value in params.items()]
                self._client.log_batch(run.info.run_id, params=rows)
            return str(run.info.run_id)

        return self._guard(call)

    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Send metric values in batches."""

        def call() -> None:
            from mlflow.entities import Metric

            client = self._open()
            for start in range(0, len(points), BATCH):
                rows = [Metric(p.metric, p.value, int(p.time * 1000), p.step) for p in points[start : start + BATCH]]
                client.log_batch(run_id, metrics=rows)

        self._guard(call)

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """Store a small text artifact."""
        self._guard(lambda: self._open().log_text(run_id, text, path))

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Set tags of a run."""

        def call() -> None:
            from mlflow.entities import RunTag

            self._open().log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

        self._guard(call)

    def end_run(self, run_id: str, status: str) -> None:
        """Mark a run ``FINISHED``, ``FAILED``, ``KILLED`` or ``RUNNING``."""
        self._guard(lambda: self._open().update_run(run_id, status=status))

    def log_datasets(self, run_id: str, datasets: Sequence[TrackedDataset]) -> None:
        """Note what data a run used; the same data again changes nothing."""
        if not datasets:
            return

        def call() -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            inputs = [
                DatasetInput(
                    Dataset(
                        name=item.name,
                        digest=item.digest[:LARGEST_DATASET_DIGEST],
                        source_type="pmaflow",
                        source=item.source[:LARGEST_DATASET_SOURCE],
                        profile=item.profile,
                    ),
                    tags=[InputTag("mlflow.data.context", item.context)],
                )
                for item in datasets
            ]
            self._open().log_inputs(run_id, datasets=inputs)

        self._guard(call)

    def _open(self) -> Any:
        if self._client is None:
            client = open_client(self.uri)
            found = client.get_experiment_by_name(self._experiment_name)
            self._experiment_id = (
                found.experiment_id
                if found
                else client.create_experiment(self._experiment_name, artifact_location=self._artifact_location)
            )
            self._client = client
        return self._client

    def _guard(self, call: Callable[[], Value]) -> Value:
        return guarded(self.uri, call)


def open_client(uri: str) -> Any:
    """MLflow's client of the server at ``uri``, whose calls end within seconds when nobody answers."""
    require_no_credentials(uri, "tracking URI")
    for key, value in BOUNDS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def guarded(uri: str, call: Callable[[], Value]) -> Value:
    """What ``call`` returns; whatever MLflow raises becomes :class:`TrackingAway`."""
    try:
        return call()
    except TrackingAway:
        raise
    except Exception as error:  # the edge to MLflow: whatever it raises must not reach the run
        text = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise TrackingAway(f"MLflow at {uri}: {type(error).__name__}: {text}") from error


def is_missing(error: Exception) -> bool:
    """Whether MLflow says that what was asked for does not exist."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
