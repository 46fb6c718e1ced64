"""Registered merges and their MLflow, in a folder of a test: a run whose checkpoints are made in this process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cluster.model_registry import ModelRegistry
from cluster.tracking import open_client
from configs.schema import Config
from pipelines.merge import merge
from pipelines.merge_request import MergeRequest
from pipelines.tracked.registration import ask_registration
from pipelines.tracking import bring_up_to_date
from tasks.checkpoints.manifest import read_manifest
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import Evaluation, suite_of, write_evaluation


def uri_of(folder: Path) -> str:
    """Where a database below ``folder`` is, or would be."""
    return f"sqlite:///{folder}/mlflow.db"


def make_database(folder: Path) -> str:
    """An MLflow database below ``folder``: a copy of an empty one, for making one takes seconds."""
    shutil.copy(_empty_database(), folder / "mlflow.db")
    return uri_of(folder)


@functools.cache
def _empty_database() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pma-mlflow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    open_client(uri_of(folder)).search_experiments()
    return folder / "mlflow.db"


def make_merge(run: RunFolder, name: str, **options: Any) -> str:
    """Merge as ``pma merge`` does, into the run; URL of the result."""
    url = f"{run.url}/merged/{name}"
    merge(MergeRequest(output=url, **options))
    return url


def register(run: RunFolder, config: Config, url: str) -> str:
    """Have the merge at ``url`` registered; its digest."""
    manifest, _ = read_manifest(run.store.child(url.removeprefix(f"{run.url}/")))
    ask_registration(run, url, manifest, config.merge.shard_bytes)
    catch_up(run, config)
    return manifest.digest


def catch_up(run: RunFolder, config: Config) -> dict[str, Any]:
    """What ``pma status`` does about tracking."""
    answer = bring_up_to_date(run, config)
    assert (answer["error"], answer["lag"]) == (None, 0), answer
    return answer


def measure(run: RunFolder, config: Config, digest: str, *slices: float) -> None:
    """Put a held-out loss on record, as if it had been measured."""
    loss = sum(slices) / len(slices)
    evaluation = Evaluation(
        digest=digest,
        suite=suite_of(config),
        loss=loss,
        slices=slices,
        domains={"all": loss},
        bits_per_byte=None,
        tokens=len(slices),
        created=1.0,
    )
    write_evaluation(run.store, evaluation)


def aliases(uri: str, model: str) -> dict[str, str]:
    """Alias to version."""
    found = ModelRegistry(uri).aliases(model)
    assert found is not None
    return found
