"""Gangs of gloo ranks in plain processes: started, joined, and ended without taking one another down."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 60


def start_ranks(program: Sequence[str], world_size: int, scratch: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start ``python PROGRAM RANK WORLD_SIZE MEETING ARGUMENT...`` for every rank, which is to join by :func:`gloo_rank`.

    They meet by files in ``scratch``.
    """
    meeting = str(scratch / f"meeting-{os.urandom(4).hex()}")
    return [
        subprocess.Popen(
            [sys.executable, *program, str(rank), str(world_size), meeting, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def end_ranks(ranks: Sequence[subprocess.Popen[str]], timeout_seconds: float | None = None) -> list[str]:
    """Wait for every rank; what each printed. All must end well, or the test fails with what they wrote to stderr."""
    said = [rank.communicate(timeout=timeout_seconds) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(error for _, error in said)
    return [out for out, _ in said]


@contextmanager
def gloo_rank(timeout_seconds: float | None = None) -> Iterator[tuple[int, int]]:
    """Be the rank that :func:`start_ranks` made this process, on one thread; its number and the gang's size.

    The process ends with the block. ``timeout_seconds`` is for collectives.
    """
    import torch
    import torch.distributed as dist

    rank, world_size, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=None if timeout_seconds is None else timedelta(seconds=timeout_seconds),
    )
    yield rank, world_size
    leave_together(meeting, rank, world_size)


def leave_together(meeting: str, rank: int, world_size: int) -> None:
    """End this process well, once every rank has come here; ``meeting`` begins the names of the files they meet by.

    Torn down in the ordinary way, a rank that ends while another still listens to it makes gloo abort the other
    ("terminate called without an active exception", once in some hundred runs on a busy machine).
    """
    Path(f"{meeting}-done-{rank}").touch()
    ends_at = time.monotonic() + PATIENCE_SECONDS
    while missing := [other for other in range(world_size) if not Path(f"{meeting}-done-{other}").exists()]:
        if time.monotonic() > ends_at:
            sys.exit(f"rank {rank} waited {PATIENCE_SECONDS} s for ranks {missing} to end")
        time.sleep(0.05)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
