"""A gang: the workers of one segment, started together by Ray Train V2, living and dying together."""

from __future__ import annotations

import concurrent.futures
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from cluster.capacity import require_cpus
from cluster.errors import GangFailed
from cluster.labels import label_selector

COLLECTIVE_TIMEOUT_SECONDS = 120


class WorkerLost(Exception):
    """A worker of the gang died or raised; the message is the root cause."""

    def __init__(self, message: str, cause: BaseException) -> None:
        super().__init__(message)
        self.root = cause


def run_gang(
    body: Callable[[Any], dict[str, Any]], task: Any, *, num_workers: int, name: str, nodes: str | None = None
) -> dict[str, Any]:
    """Run ``body(task)`` on every worker of a gloo process group, on nodes of the label ``nodes``; returns rank 0's result.

    Ray Train gets no checkpoints: where to resume is decided by ``body`` from committed manifests.
    Raises :class:`WorkerLost` if any worker failed; starting again is the caller's decision.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    require_cpus(num_workers, f"training workers of {name}", nodes)
    with tempfile.TemporaryDirectory(prefix="pma-train-", ignore_cleanup_errors=True) as scratch:
        trainer = TorchTrainer(
            _on_worker,
            train_loop_config={"body": body, "task": task},
            scaling_config=ScalingConfig(
                num_workers=num_workers, resources_per_worker={"CPU": 1}, label_selector=label_selector(nodes)
            ),
            run_config=RunConfig(name=name, storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
            torch_config=TorchConfig(backend="gloo", timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
        )
        try:
            result = _interruptible(trainer.fit)
        except TrainingFailedError as error:
            raise WorkerLost(str(error), _root_cause(error)) from error
    value = getattr(result, "return_value", None)
    if not isinstance(value, dict):
        raise GangFailed(f"gang {name} ended without a result")
    return value


def _interruptible(fit: Callable[[], Any]) -> Any:
    """Run ``fit`` beside the main thread, which stays free for signals.

    On the main thread Ray Train replaces the SIGINT handler by one that ends the process with exit
    code 0; here Ctrl-C stays a KeyboardInterrupt and the caller's clean-up runs.
    """
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def body() -> None:
        try:
            outcome.set_result(fit())
        except BaseException as error:  # noqa: BLE001  handed to the caller's thread
            outcome.set_exception(error)

    threading.Thread(target=body, daemon=True, name="gang").start()
    while not outcome.done():
        concurrent.futures.wait([outcome], timeout=0.3)
    return outcome.result()


def _on_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    body: Callable[[Any], dict[str, Any]] = loop_config["body"]
    return body(loop_config["task"])


def _root_cause(error: BaseException) -> BaseException:
    """The first worker's own exception, where Ray Train kept it."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = list(failures.values()) if isinstance(failures, dict) else []
    return causes[0] if causes and isinstance(causes[0], BaseException) else error
