"""Training that loses a node, goes on with fewer ranks and grows again: ``python -m tests.shrink_and_grow RUN [KEY=VALUE]...``.

A head without CPUs and two nodes of one CPU each; one is killed under a rank, another joins later. It needs a process
of its own, because the nodes belong to the process that started them.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.lose_nodes import POLL_SECONDS, lose, trains

PATIENCE_SECONDS = 300


def main(run_url: str, overrides: tuple[str, ...]) -> None:
    from ray.cluster_utils import Cluster

    from cluster.session import ray_session
    from configs.load import load_config
    from pipelines import elastic
    from pipelines.pretrain import pretrain

    elastic.LOOK_SECONDS = 2.0
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
    config = load_config("tiny", (*places, *overrides)).config
    mover = threading.Thread(target=move, args=(cluster, nodes, Path(run_url)), daemon=True)
    try:
        with ray_session(cluster.address, 0):
            mover.start()
            pretrain(run_url, config)
    finally:
        cluster.shutdown()


def add(cluster: Any) -> Any:
    """A node with room for one rank."""
    return cluster.add_node(num_cpus=1, labels={"pool": "train"}, object_store_memory=80 << 20)


def move(cluster: Any, nodes: list[Any], run: Path) -> None:
    """Take a node away under a rank; give one back once the smaller gang has published something."""
    wait_for(lambda: snapshots_of(run) >= 2)
    lose(cluster, nodes, next(node for node in nodes if trains(node)))
    wait_for(lambda: len(list(run.glob("segments/*.json"))) >= 2)
    reached = snapshots_of(run)
    wait_for(lambda: snapshots_of(run) >= reached + 2)
    add(cluster)


def snapshots_of(run: Path) -> int:
    """Committed snapshots."""
    return len(list(run.glob("snapshots/*/manifest.json")))


def wait_for(condition: Any) -> None:
    """Wait, but not for ever."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1], tuple(sys.argv[2:]))
