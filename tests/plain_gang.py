"""Gangs of plain processes on a gloo group of their own: the body that Ray Train would run, without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.lease import Lease
from configs.load import config_to_dict
from configs.schema import Config
from tasks.checkpoints.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
MEMBER = """
import json, sys
from datetime import timedelta
import torch, torch.distributed as dist
from tests.gloo_ranks import leave_together
from tasks.training.segment import train_segment
from tasks.training.worker import SegmentTask
torch.set_num_threads(1)
rank, world, store, task, seconds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]), float(sys.argv[5])
{prelude}
dist.init_process_group(
    "gloo", init_method=f"file://{{store}}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
)
train_segment(SegmentTask(**task))
leave_together(store, rank, world)
"""


def start_members(
    run: RunFolder, config: Config, lease: Lease, world_size: int, scratch: Path, *, prelude: str = "", **task: Any
) -> list[subprocess.Popen[str]]:
    """Start the ranks of a gang that continues ``run``; ``prelude`` is Python that each runs before it joins."""
    values = {
        "run_url": run.url, "config": config_to_dict(config), "lease_token": lease.token,
        "cause": "start", "launched": 0.0, **task,
    }  # fmt: skip
    meeting = str(scratch / f"meeting-{world_size}-{os.urandom(4).hex()}")
    seconds = str(config.training.collective_timeout_seconds)
    code = MEMBER.format(prelude=prelude)
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(world_size), meeting, json.dumps(values), seconds],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def end_members(members: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for every rank; what each wrote to stderr."""
    return [member.communicate()[1] for member in members]


def train_plainly(run: RunFolder, config: Config, lease: Lease, world_size: int, scratch: Path) -> None:
    """Run a gang to its end, which must be a good one."""
    members = start_members(run, config, lease, world_size, scratch)
    errors = end_members(members)
    assert all(member.returncode == 0 for member in members), "\n".join(errors)


def watch_members(members: list[subprocess.Popen[str]], is_time: Callable[[], bool]) -> bool:
    """Wait until ``is_time``, or until a member ended; whether it was time."""
    import time

    while all(member.poll() is None for member in members):
        if is_time():
            return True
        time.sleep(0.001)
    return False
