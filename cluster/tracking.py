"""MLflow, and nothing that could hurt a run: explicit run ids, bounded waiting, one error for all faults."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cluster.storage import scheme_of
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


class Tracker:
    """One MLflow experiment."""

    def __init__(self, uri: str, experiment: str, artifact_location: str | None = None) -> None:
        require_no_credentials(uri, "tracking URI")
        for key, value in BOUNDS.items():
            os.environ.setdefault(key, value)
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

    def register(self, model: str, *, url: str, run_id: str, alias: str, tags: dict[str, str]) -> str:
        """Register the checkpoint at ``url`` by reference as a new version of ``model`` and move ``alias`` to it.

        Weights are never uploaded. A server refuses local paths as a source; then the version points at
        the run's artifacts, and the tag ``url`` names the checkpoint in any case.
        """

        def call() -> str:
            from mlflow.exceptions import MlflowException

            client = self._open()
            if not client.search_registered_models(filter_string=f"name = '{model}'"):
                client.create_registered_model(model)
            source = url
            if urlsplit(self.uri).scheme in ("http", "https") and scheme_of(url) == "file":
                source = f"runs:/{run_id}/checkpoint"
            try:
                version = client.create_model_version(model, source=source, run_id=run_id, tags={**tags, "url": url})
            except MlflowException as error:
                raise TrackingAway(f"MLflow refused {source!r} as a model source: {error}") from error
            client.set_registered_model_alias(model, alias, version.version)
            return str(version.version)

        return self._guard(call)

    def _open(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            found = client.get_experiment_by_name(self._experiment_name)
            self._experiment_id = (
                found.experiment_id
                if found
                else client.create_experiment(self._experiment_name, artifact_location=self._artifact_location)
            )
            self._client = client
        return self._client

    def _guard(self, call: Callable[[], Value]) -> Value:
        try:
            return call()
        except TrackingAway:
            raise
        except Exception as error:  # the edge to MLflow: whatever it raises must not reach the run
            raise TrackingAway(
                f"MLflow at {self.uri}: {type(error).__name__}: {str(error).splitlines()[0][:300]}"
            ) from error
