"""Time a command as a whole: wall, CPU seconds and peak memory of its process tree."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a command cost."""

    seconds: float
    """Wall time."""
    cpu_seconds: float
    """User and system time of the process tree."""
    peak_rss_mib: float
    """Largest sum of resident sizes, mapped files included."""
    peak_private_mib: float
    """Largest sum of proportional sizes less file pages: memory that nothing else could use."""


def run_measured(command: Sequence[str], cwd: Path | None = None) -> Cost:
    """Run ``command`` to its end; raises :class:`subprocess.CalledProcessError` if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks = {"rss": 0.0, "private": 0.0}
    sampler = threading.Thread(target=_sample, args=(psutil.Process(process.pid), peaks), daemon=True)
    sampler.start()
    before = _children_times()
    _, errors = process.communicate()
    seconds = time.perf_counter() - started
    sampler.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
    return Cost(
        seconds=seconds,
        cpu_seconds=_children_times() - before,
        peak_rss_mib=peaks["rss"] / 2**20,
        peak_private_mib=peaks["private"] / 2**20,
    )


def medians(costs: Sequence[Cost]) -> dict[str, float]:
    """Median of every figure."""
    rows = [asdict(cost) for cost in costs]
    return {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _sample(root: psutil.Process, peaks: dict[str, float]) -> None:
    while True:
        rss = private = 0.0
        try:
            for process in [root, *root.children(recursive=True)]:
                info = process.memory_info()
                rss += info.rss
                private += info.rss - info.shared
        except psutil.Error:
            pass
        if not root.is_running() or root.status() == psutil.STATUS_ZOMBIE:
            return
        peaks["rss"], peaks["private"] = max(peaks["rss"], rss), max(peaks["private"], private)
        time.sleep(SAMPLE_SECONDS)


def _children_times() -> float:
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)
