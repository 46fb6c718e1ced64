"""Lose nodes of a Ray cluster while they work: ``python -m tests.lose_nodes SCRATCH INPUTS RUN [KEY=VALUE]...``.

A cluster of a head without CPUs and three nodes; one is killed while it merges and another while it trains. Prints what
was made as one JSON object. It needs a process of its own, because the nodes belong to the process that started them.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
# Ray takes tens of seconds by default to notice that a node is gone.
os.environ |= {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 120
TASK_SECONDS = 1.0
"""How long a merge task lingers before it works, so that a node can be killed under it."""


def main(scratch: Path, inputs: list[str], run_url: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    from ray.cluster_utils import Cluster

    from cluster.session import ray_session

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20},
    )
    nodes = [cluster.add_node(num_cpus=3, labels={"pool": "work"}, object_store_memory=80 << 20) for _ in range(3)]
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        with ray_session(cluster.address, 0):
            merged = merge_while_losing(cluster, nodes, scratch, inputs)
            trained = train_while_losing(cluster, nodes, run_url, overrides)
    finally:
        cluster.shutdown()
    return {"merge": merged, "train": trained}


def merge_while_losing(cluster: Any, nodes: list[Any], scratch: Path, inputs: list[str]) -> dict[str, Any]:
    """A merge of small tasks; the node of the first task that began is killed under it."""
    from cluster.fan_out import fan_out_ray
    from tasks.checkpoints.reader import open_checkpoint
    from tasks.merging.merge import execute_merge
    from tasks.merging.methods import MethodChoice
    from tasks.merging.plan import plan_merge

    begun = scratch / "begun"
    begun.mkdir()
    plan = plan_merge(
        [open_checkpoint(url) for url in inputs],
        MethodChoice(method="ema", alpha=0.2),
        output_url=str(scratch / "merged"),
        shard_bytes=64 << 10,
    )
    killer = threading.Thread(target=kill_first_worker_node, args=(cluster, nodes, begun))
    killer.start()
    report = execute_merge(
        plan,
        lambda function, tasks: fan_out_ray(lingering(function, begun), tasks, num_in_flight=4),
        lambda: None,
    )
    killer.join()
    names = [path.name for path in begun.iterdir()]
    lost = (scratch / "begun.lost").read_text()
    return {
        "digest": report.manifest.digest,
        "shards": [shard.digest for shard in report.manifest.shards],
        "begun": len(names),
        "on_lost_node": sum(name.startswith(lost) for name in names),
        "tasks": len(plan.tasks),
    }


def lingering(function: Callable[[Any], Any], begun: Path) -> Callable[[Any], Any]:
    """``function``, which leaves a mark with its node and process before it works."""

    def linger(task: Any) -> Any:
        import ray

        (begun / f"{ray.get_runtime_context().get_node_id()}-{task.number}-{os.getpid()}").touch()
        time.sleep(TASK_SECONDS)
        return function(task)

    return linger


def kill_first_worker_node(cluster: Any, nodes: list[Any], begun: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (marks := sorted(begun.iterdir())):
        assert time.monotonic() < deadline, "no merge task ever began"
        time.sleep(POLL_SECONDS)
    node_id = marks[0].name.split("-")[0]
    (begun.parent / "begun.lost").write_text(node_id)
    lose(cluster, nodes, next(node for node in nodes if node.node_id == node_id))


def train_while_losing(cluster: Any, nodes: list[Any], run_url: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """A run of pre-training; a node that holds a training worker is killed once some snapshots are committed."""
    from configs.load import load_config
    from pipelines.pretrain import pretrain

    places = (f"cluster.address={cluster.address}", "cluster.train_nodes=pool=work", "cluster.merge_nodes=pool=work")
    config = load_config("tiny", (*places, *overrides)).config
    killer = threading.Thread(target=kill_training_node, args=(cluster, nodes, Path(run_url)))
    killer.start()
    result = pretrain(run_url, config)
    killer.join()
    return {"digest": result["digest"], "causes": [segment["cause"] for segment in result["segments"]]}


def kill_training_node(cluster: Any, nodes: list[Any], run: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(list(run.glob("snapshots/*/manifest.json"))) < 3:
        assert time.monotonic() < deadline, "training never began"
        time.sleep(POLL_SECONDS)
    lose(cluster, nodes, next(node for node in nodes if trains(node)))


def trains(node: Any) -> bool:
    """Whether a training worker runs on ``node``."""
    (raylet,) = node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children(recursive=True)
    return any("RayTrainWorker" in " ".join(child.cmdline()) for child in children)


def lose(cluster: Any, nodes: list[Any], node: Any) -> None:
    """Kill every process of ``node``, as when a machine goes away."""
    nodes.remove(node)
    cluster.remove_node(node, allow_graceful=False)


if __name__ == "__main__":
    answer = main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3], tuple(sys.argv[4:]))
    Path(sys.argv[1], "answer.json").write_text(json.dumps(answer))
