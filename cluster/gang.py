"""A gang: the workers of one segment, started together by Ray Train V2, living and dying together."""

from __future__ import annotations

import concurrent.futures
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.capacity import require_cpus
from cluster.errors import GangFailed
from cluster.labels import label_selector
from cluster.preemption import preemptible

COLLECTIVE_TIMEOUT_SECONDS = 120
GRACE_SECONDS = 8.0
"""For a gang that was asked to stop to publish a last snapshot; Kubernetes gives 30 s in all by default."""


class WorkerLost(Exception):
    """A worker of the gang died or raised; the message is the root cause."""

    def __init__(self, message: str, cause: BaseException) -> None:
        super().__init__(message)
        self.root = cause


@dataclass(frozen=True, kw_only=True)
class GangSize:
    """What a gang takes of the cluster."""

    num_workers: int
    """Ranks, each with a CPU."""
    with_gpus: bool = False
    """Whether each has a GPU, too: collectives of GPU tensors then go over NCCL."""
    nodes: str | None = None
    """Label of the nodes that they run on; None means any."""
    collective_timeout_seconds: float = COLLECTIVE_TIMEOUT_SECONDS
    """How long a rank waits for the others."""


def run_gang(
    body: Callable[[Any], dict[str, Any]],
    task: Any,
    size: GangSize,
    *,
    name: str,
    on_wait: Callable[[], object] = lambda: None,
    on_interrupt: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run ``body(task)`` on every rank of a process group of ``size``; returns rank 0's result.

    Ray Train gets no checkpoints: where to resume is decided by ``body`` from committed manifests. ``on_wait`` is called
    now and then while the gang is at work. Ctrl-C or SIGTERM calls ``on_interrupt`` once and leaves the gang
    :data:`GRACE_SECONDS` to end by itself before it is taken down; a second one does not wait. Raises
    :class:`WorkerLost` if any worker failed; starting again is the caller's decision.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    require_cpus(size.num_workers, f"training workers of {name}", size.nodes)
    with tempfile.TemporaryDirectory(prefix="pma-train-", ignore_cleanup_errors=True) as scratch:
        trainer = TorchTrainer(
            _on_worker,
            train_loop_config={"body": body, "task": task},
            scaling_config=ScalingConfig(
                num_workers=size.num_workers,
                use_gpu=size.with_gpus,
                resources_per_worker={"CPU": 1, **({"GPU": 1} if size.with_gpus else {})},
                label_selector=label_selector(size.nodes),
            ),
            run_config=RunConfig(name=name, storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
            torch_config=preemptible(
                backend="cpu:gloo,cuda:nccl" if size.with_gpus else "gloo",
                timeout_s=int(size.collective_timeout_seconds),
            ),
        )
        try:
            result = _interruptible(trainer.fit, on_wait, on_interrupt)
        except TrainingFailedError as error:
            raise WorkerLost(str(error), _root_cause(error)) from error
    value = getattr(result, "return_value", None)
    if not isinstance(value, dict):
        raise GangFailed(f"gang {name} ended without a result")
    return value


def _interruptible(
    fit: Callable[[], Any], on_wait: Callable[[], object], on_interrupt: Callable[[], None] | None
) -> Any:
    """Run ``fit`` beside the main thread, which stays free for signals and for ``on_wait``.

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
    try:
        while not outcome.done():
            concurrent.futures.wait([outcome], timeout=0.3)
            on_wait()
    except KeyboardInterrupt:
        if on_interrupt is not None:
            on_interrupt()
            concurrent.futures.wait([outcome], timeout=GRACE_SECONDS)
        raise
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
