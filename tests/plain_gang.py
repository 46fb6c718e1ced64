"""Gangs of plain processes on a gloo group of their own: the body that Ray Train would run, without Ray."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.lease import Lease
from configs.load import config_to_dict
from configs.schema import Config
from tasks.checkpoints.run_folder import RunFolder
from tests.gloo_ranks import end_ranks, start_ranks

MEMBER = """
import json, sys
from tests.gloo_ranks import gloo_rank
from tasks.training.segment import train_segment
from tasks.training.worker import SegmentTask
rank, task, seconds = int(sys.argv[1]), json.loads(sys.argv[4]), float(sys.argv[5])
{prelude}
with gloo_rank(timeout_seconds=seconds):
    print(json.dumps(train_segment(SegmentTask(**task))))
"""


def start_members(
    run: RunFolder, config: Config, lease: Lease, world_size: int, scratch: Path, *, prelude: str = "", **task: Any
) -> list[subprocess.Popen[str]]:
    """Start the ranks of a gang that continues ``run``; ``prelude`` is Python that each runs before it joins.

    What :func:`tasks.training.segment.train_segment` returns is each rank's last line, as JSON.
    """
    values = {
        "run_url": run.url, "config": config_to_dict(config), "lease_token": lease.token,
        "cause": "start", "launched": 0.0, **task,
    }  # fmt: skip
    seconds = str(config.training.collective_timeout_seconds)
    return start_ranks(["-c", MEMBER.format(prelude=prelude)], world_size, scratch, json.dumps(values), seconds)


def end_members(members: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for every rank, however it ends; what each wrote to stderr."""
    return [member.communicate()[1] for member in members]


def train_plainly(run: RunFolder, config: Config, lease: Lease, world_size: int, scratch: Path) -> None:
    """Run a gang to its end, which must be a good one."""
    end_ranks(start_members(run, config, lease, world_size, scratch))


def watch_members(members: list[subprocess.Popen[str]], is_time: Callable[[], bool]) -> bool:
    """Wait until ``is_time``, or until a member ended; whether it was time."""
    import time

    while all(member.poll() is None for member in members):
        if is_time():
            return True
        time.sleep(0.001)
    return False
