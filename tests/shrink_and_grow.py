"""Training that loses a node, goes on with fewer ranks and grows again: ``python -m tests.shrink_and_grow RUN [KEY=VALUE]...``.

A head without CPUs and two nodes of one CPU each; one is killed under a rank, another joins later. It needs a process
of its own, because the nodes belong to the process that started them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.lose_nodes import POLL_SECONDS, lose, trains

PATIENCE_SECONDS = 300


TRAIN = """
import sys
from pipelines import elastic
elastic.LOOK_SECONDS = 2.0
from pipelines.__main__ import main
main()
"""


def main(run_url: str, overrides: tuple[str, ...]) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20},
    )
    nodes = [add(cluster) for _ in range(2)]
    # Merges need room beside two ranks.
    cluster.add_node(num_cpus=1, labels={"pool": "merge"}, object_store_memory=80 << 20)
    places = (
        f"cluster.address={cluster.address}", "cluster.train_nodes=pool=train", "cluster.merge_nodes=pool=merge",
        "training.min_workers=1",
    )  # fmt: skip
    command = [sys.executable, "-c", TRAIN, "pretrain", "--config", "tiny", "--run", run_url, *places, *overrides]
    driver = subprocess.Popen(command)
    try:
        move(cluster, nodes, Path(run_url), driver)
        code = driver.wait()
    finally:
        driver.kill()
        cluster.shutdown()
    sys.exit(code)


def add(cluster: Any) -> Any:
    """A node with room for one rank."""
    return cluster.add_node(num_cpus=1, labels={"pool": "train"}, object_store_memory=80 << 20)


def move(cluster: Any, nodes: list[Any], run: Path, driver: subprocess.Popen[bytes]) -> None:
    """Take a node away under a rank; give one back once the smaller gang has published something."""
    wait_for(lambda: snapshots_of(run) >= 2, driver)
    lose(cluster, nodes, next(node for node in nodes if trains(node)))
    wait_for(lambda: len(list(run.glob("segments/*.json"))) >= 2, driver)
    add(cluster)


def snapshots_of(run: Path) -> int:
    """Committed snapshots."""
    return len(list(run.glob("snapshots/*/manifest.json")))


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    """Wait, but not for ever, nor for a driver that has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert driver.poll() is None, "training ended before the moment came"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1], tuple(sys.argv[2:]))
