"""Kill merges at random times and compare what they end in: ``python -m benchmarks.kills [--kills 50] [--folder DIR]``.

Each attempt starts ``pma merge`` and kills, after a random time, the driver or one of its worker processes with SIGKILL; the
same command then goes on. A merge that is done is compared with the reference and a new one begun, until enough kills were made.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.checkpoints import write_checkpoints

WORKERS = ("local", "2", "ray")
LONGEST_SECONDS = {"local": 2.5, "2": 3.0, "ray": 12.0}
"""A kill falls within this time after the start; about as long as the merge takes."""


@dataclass(kw_only=True)
class Tally:
    """What happened."""

    kills: dict[str, int] = field(default_factory=dict)
    """Victim to number of kills."""
    in_work: int = 0
    """Kills of merges that had begun to write."""
    merges: int = 0
    """Merges that ended in the reference's digest."""
    reused: int = 0
    """Shards that a later attempt kept."""


def main() -> None:
    """Kill, finish, compare; print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="keep inputs here for the next time")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="pma-kills-"))
    urls = write_checkpoints(folder, options.count)
    print(json.dumps(kill_merges(urls, folder, options.kills, random.Random(options.seed)).__dict__, indent=1))
    if options.folder is None:
        shutil.rmtree(folder)


def kill_merges(
    urls: Sequence[str], folder: Path, kills: int, chance: random.Random, workers: Sequence[str] = WORKERS
) -> Tally:
    """Kill merges of ``urls`` ``kills`` times; every merge that is finished must have the reference's digest."""
    reference = finish(urls, folder / "reference", "local")["digest"]
    tally = Tally()
    while sum(tally.kills.values()) < kills:
        output = folder / f"merge-{tally.merges}"
        kind = workers[tally.merges % len(workers)]
        for _ in range(chance.randint(1, 6)):
            if sum(tally.kills.values()) == kills:
                break
            victim = kill_one(urls, output, kind, chance)
            if victim is not None:
                tally.kills[victim] = tally.kills.get(victim, 0) + 1
                tally.in_work += (output / "receipts").exists() and not (output / "manifest.json").exists()
        done = finish(urls, output, kind)
        assert done["digest"] == reference, f"{output} ended in {done['digest']}, the reference in {reference}"
        tally.merges += 1
        tally.reused += int(str(done["tasks_reused"]))
        shutil.rmtree(output)
    shutil.rmtree(folder / "reference")
    return tally


def kill_one(urls: Sequence[str], output: Path, workers: str, chance: random.Random) -> str | None:
    """Start a merge and kill its driver or a worker; who was killed, or None if it had ended by then."""
    driver = subprocess.Popen(command_of(urls, output, workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(chance.uniform(0.2, LONGEST_SECONDS[workers]))
    process = psutil.Process(driver.pid)
    children = process.children(recursive=True) if driver.poll() is None else []
    merging = [child for child in children if is_worker(child)]
    victim = None
    if driver.poll() is None:
        if merging and chance.random() < 0.5:
            chance.choice(merging).kill()
            victim = f"worker ({workers})"
        else:
            os.kill(driver.pid, signal.SIGKILL)
            victim = f"driver ({workers})"
    driver.wait()
    # What a killed driver leaves of Ray ends with it or is ended here; nothing else may be left at all.
    left = psutil.wait_procs(children, timeout=10)[1]
    assert workers == "ray" or not left, f"processes outlived their driver: {left}"
    for child in left:
        child.kill()
    return victim


def is_worker(process: psutil.Process) -> bool:
    """Whether a process carries out merge tasks."""
    try:
        words = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    return "spawn_main" in words or words.startswith("ray::")


def finish(urls: Sequence[str], output: Path, workers: str) -> dict[str, object]:
    """Run the merge to its end."""
    done = subprocess.run(command_of(urls, output, workers), check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def command_of(urls: Sequence[str], output: Path, workers: str) -> list[str]:
    """The command line of one merge."""
    command = [sys.executable, "-m", "pipelines", "merge", "--json", "--method", "wma", "--workers", workers]
    return [*command, "--output", str(output), "--inputs", *urls]


if __name__ == "__main__":
    main()
