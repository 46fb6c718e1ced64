"""Gangs and merges without a cluster: a gang of one rank in this process, merge tasks one after the other.

For short runs, of which a gang on Ray would spend most of its time starting.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from cluster.fan_out import fan_out_local
from cluster.lease import Lease
from configs.schema import Config
from pipelines.gangs import Means, train_to_end
from pipelines.run_lease import hold_run
from tasks.checkpoints.run_folder import RunFolder
from tasks.training.segment import train_segment


def local_means() -> Means:
    """What :func:`pipelines.gangs.train_to_end` needs, in this process."""
    return Means(start_gang=start_gang, run_tasks=run_tasks, answers_spikes=False)


def start_gang(task: Any, config: Config, name: str, on_wait: Callable[[], object]) -> dict[str, Any]:
    """Train a segment with a world of one rank; all but ``task`` is a cluster's business."""
    del config, name, on_wait
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            return train_segment(task)
        finally:
            dist.destroy_process_group()


def run_tasks(function: Callable[[Any], Any], tasks: Sequence[Any], is_lost: Callable[[], bool]) -> Iterable[Any]:
    """Merge tasks one after the other."""
    return fan_out_local(function, tasks, num_workers=1, should_cancel=is_lost)


def train(run: RunFolder, config: Config) -> None:
    """The training step of a run, with all its recoveries."""
    with hold_run(run) as lease:
        assert isinstance(lease, Lease)
        train_to_end(run, config, lease, local_means())
