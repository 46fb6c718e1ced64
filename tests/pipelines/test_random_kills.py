"""Drivers, controllers and workers on Ray killed at random moments: the same command ends in the same bytes."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.checkpoints.run_folder import RunFolder
from tasks.merging.verify import verify_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
ROUNDS = -(-int(os.environ.get("PMA_KILLS", "32")) // 16)
VICTIMS = ("driver", "TrainController", "everything", "RayTrainWorker") * ROUNDS
"""Eight of the forty kills; the others are in tests/tasks/training/test_kills.py."""
LONGEST_SECONDS = 2.0
PATIENCE_SECONDS = 120


def test_kills_on_ray_end_in_the_same_bytes(
    demo_run: tuple[Path, dict[str, Any]],
    start_pma: Callable[..., subprocess.Popen[str]],
    small: tuple[str, ...],
    tmp_path: Path,
) -> None:
    run, log, draws = RunFolder(str(tmp_path / "run")), tmp_path / "log", random.Random(11)
    command = ("pretrain", "--config", "tiny", "--run", run.url, *small, "training.max_restarts=20")
    process = None
    for victim in VICTIMS:
        if process is None or process.poll() is not None:
            process = start_pma(*command, log=log)
        _wait_for_one_more(run, process)
        time.sleep(draws.uniform(0, LONGEST_SECONDS))
        _kill(process, victim)
        if victim in ("driver", "everything"):
            process.wait()
        for snapshot in run.snapshots()[-2:]:
            verification = verify_checkpoint(snapshot.url)
            assert not verification.problems, (snapshot.url, verification.problems)
    if process is None or process.poll() is not None:
        process = start_pma(*command, log=log)
    assert process.wait(timeout=2 * PATIENCE_SECONDS) == 0, log.read_text()[-4000:]

    # A worker that Ray asks to stop, when its driver or controller is gone, may still commit a snapshot off the grid.
    on_grid = [s for s in run.snapshots() if not s.manifest.ephemeral]
    whole = RunFolder(str(demo_run[0]))
    expected = {s.step: (s.digest, s.manifest.state_digest) for s in whole.snapshots()}
    assert {s.step: (s.digest, s.manifest.state_digest) for s in on_grid} == expected
    assert len(run.segments()) > len(VICTIMS) // 2


def _snapshots(run: RunFolder) -> int:
    return len(list(Path(run.url).glob("snapshots/*/manifest.json")))


def _kill(process: subprocess.Popen[str], victim: str) -> None:
    """Kill the driver, all of its processes, or the first whose command line names ``victim``."""
    if process.poll() is not None:
        return
    driver = psutil.Process(process.pid)
    family = driver.children(recursive=True)
    chosen = {"driver": [driver], "everything": [driver, *family]}.get(victim)
    for member in chosen or [m for m in family if victim in _name(m)][:1]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def _name(member: psutil.Process) -> str:
    try:
        return " ".join(member.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _wait_for_one_more(run: RunFolder, process: subprocess.Popen[str]) -> None:
    """Until another snapshot is committed, or the process ended."""
    reached, deadline = _snapshots(run), time.monotonic() + PATIENCE_SECONDS
    while _snapshots(run) == reached and process.poll() is None:
        assert time.monotonic() < deadline, "the moment to kill it never came"
        time.sleep(0.02)
