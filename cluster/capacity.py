"""Whether a cluster can hold what we are about to start: a clear word in seconds instead of a wait without end."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from typing import Any

from cluster.errors import GangFailed
from cluster.labels import label_selector
from configs.errors import UserError

SETTLE_SECONDS = 10.0
"""Nodes of a cluster that has just started may still be registering."""
RETURN_SECONDS = 300.0
"""A node that was lost may be replaced."""
POLL_SECONDS = 0.5
ANSWER_SECONDS = 20.0
"""A node that is busy still answers; a worker process for it may have to be started."""
LOST = (2, 3)
"""Ray's reasons of a node's death that nobody planned: unexpected termination, preemption (NodeDeathInfo in gcs.proto)."""
logger = logging.getLogger(__name__)


def require_cpus(num_cpus: int, purpose: str, nodes: str | None = None) -> None:
    """Check that the cluster (its nodes of the label ``nodes``) has ``num_cpus`` slots of one CPU each, whoever uses them now.

    With an autoscaler it only warns, because more nodes come once Ray asks for them. Otherwise it waits
    :data:`SETTLE_SECONDS`, or :data:`RETURN_SECONDS` where nodes were lost, and raises
    :class:`UserError` or, for lost nodes, :class:`GangFailed`.
    """
    has, lost = _slots(nodes)
    if has >= num_cpus:
        return
    if has_autoscaler():
        logger.warning("%s: %d CPUs needed, %d there now; waiting for the autoscaler", purpose, num_cpus, has)
        return
    if lost:
        logger.warning(
            "%s: %d CPUs needed, %d left after %d node(s) were lost; waiting %.0f s for others",
            purpose,
            num_cpus,
            has,
            lost,
            RETURN_SECONDS,
        )
    deadline = time.monotonic() + (RETURN_SECONDS if lost else SETTLE_SECONDS)
    while has < num_cpus and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        has, lost = _slots(nodes)
    if has >= num_cpus:
        return
    where = "the cluster has" if nodes is None else f"nodes labelled {nodes} have"
    message = f"{purpose}: needs {num_cpus} CPUs at once, {where} {has}"
    if lost:
        raise GangFailed(
            f"{message} since {lost} node(s) were lost; add nodes and run the same command again to continue"
        )
    raise UserError(f"{message}; add nodes, or ask for less (training.num_workers=..., merge.num_workers=...)")


def free_cpus() -> int:
    """CPUs of the cluster that nobody uses now."""
    import ray

    return int(ray.available_resources().get("CPU", 0.0))


def count_gpus() -> int:
    """GPUs of the cluster, whoever uses them now."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0.0))


def require_gpus(count: int) -> None:
    """Check that the cluster has ``count`` GPUs; waits :data:`RETURN_SECONDS` for nodes that were lost or are yet to come.

    Raises :class:`UserError`, unless an autoscaler may bring more.
    """
    ends_at = time.monotonic() + RETURN_SECONDS
    while (has := count_gpus()) < count and not has_autoscaler():
        if time.monotonic() > ends_at:
            raise UserError(
                f"training.num_workers={count} needs as many GPUs, the cluster has {has}; add nodes, ask for fewer workers "
                "(or allow fewer with training.min_workers), or set training.device=cpu"
            )
        time.sleep(POLL_SECONDS)


def listed_slots(nodes: str | None = None, *, with_gpus: bool = False) -> int:
    """Slots of one CPU (and, with ``with_gpus``, one GPU) on the nodes of the label ``nodes`` that Ray lists as alive."""
    return sum(_slots_of(node, with_gpus=with_gpus) for node in _labelled(nodes) if node["Alive"])


def answering_slots(nodes: str | None = None, *, with_gpus: bool = False) -> int:
    """Slots as :func:`listed_slots`, on those of the nodes alone that answer within :data:`ANSWER_SECONDS`.

    Ray takes tens of seconds to strike off a node that is gone; a task that is sent there says so at once.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.remote(num_cpus=0, max_retries=0)(lambda: None)
    asked = {
        here.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(): node
        for node in _labelled(nodes)
        if node["Alive"] and node["Resources"].get("CPU", 0.0) >= 1
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS) if asked else ([], [])
    for reference in silent:
        ray.cancel(reference, force=True)
    slots = 0
    for reference in answered:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(reference)
            slots += _slots_of(asked[reference], with_gpus=with_gpus)
    return slots


def _labelled(label: str | None) -> list[dict[str, Any]]:
    """Nodes (of ``label``) as Ray lists them, dead ones included."""
    import ray

    wanted = label_selector(label) or {}
    return [node for node in ray.nodes() if wanted.items() <= node["Labels"].items()]


def _slots_of(node: dict[str, Any], *, with_gpus: bool = False) -> int:
    resources: dict[str, float] = node["Resources"]
    cpus = resources.get("CPU", 0.0)
    return math.floor(min(cpus, resources.get("GPU", 0.0)) if with_gpus else cpus)


def _slots(label: str | None) -> tuple[int, int]:
    """CPU slots of the nodes (of ``label``) that are alive, and the number of nodes that were lost.

    A job's driver may hold a fraction of a CPU, which spoils one slot.
    """
    import ray

    nodes = _labelled(label)
    total = sum(_slots_of(node) for node in nodes if node["Alive"])
    held = ray.cluster_resources().get("CPU", 0.0) - ray.available_resources().get("CPU", 0.0)
    is_fraction_held = not math.isclose(held, round(held), abs_tol=1e-3)
    lost = sum(1 for node in nodes if not node["Alive"] and node["DeathReason"] in LOST)
    return total - (1 if is_fraction_held and total else 0), lost


def has_autoscaler() -> bool:
    """Whether more nodes come once Ray asks for them."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2())
