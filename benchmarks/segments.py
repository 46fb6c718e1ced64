"""How long a segment takes to start, and a run from a spike's alarm to the first recovered step, by phase.

``python -m benchmarks.segments [--rounds 3] [KEY=VALUE...]``

Each round is a run of ``tiny`` on Ray as a user starts it, with weights that become NaN on one rank half-way, trained to its
end. Prints medians over rounds in seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster.journal import read_events, read_journals
from pipelines.timing import stage_seconds
from tasks.checkpoints.run_folder import RunFolder
from tasks.recovery.phases import recovery_phases

SETTINGS = (
    "training.total_tokens=819200", "schedule.warmup_tokens=51200", "anneal.tokens=102400",
    "drill.corruption=nan-weights", "drill.corruption_step=250", "drill.corruption_rank=1", "evaluation.while_training=false",
)  # fmt: skip


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    rounds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(measure(Path(folder) / "run", options.overrides))
            print(json.dumps(rounds[-1]), file=sys.stderr)
    print(json.dumps({key: round(statistics.median(row[key] for row in rounds), 2) for key in rounds[0]}))


def measure(folder: Path, overrides: Sequence[str]) -> dict[str, float]:
    """One run; seconds by phase."""
    command = [sys.executable, "-m", "pipelines", "pretrain", "--config", "tiny", "--run", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *SETTINGS, *overrides], env=env, check=True, stderr=subprocess.DEVNULL)
    run = RunFolder(str(folder))
    segments, journals = run.segments(), read_journals(run.store)
    (phases,) = recovery_phases(segments, read_events(run.store), journals)
    ray = sum(seconds for (stage, _), seconds in stage_seconds(run.store).items() if stage == "Ray start")
    first = journals[1][0].time - segments[0]["started"]
    start = {f"start/{name}": value for name, value in segments[0]["plan"]["startup_phases"].items()}
    spike = {f"recovery/{name}": value for name, value in dataclasses.asdict(phases).items() if name != "recovery"}
    return {"start/ray_seconds": ray, **start, "start/first_step": first, **spike, "recovery/total": phases.total}


if __name__ == "__main__":
    main()
