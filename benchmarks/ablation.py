"""An ablation grid of 60 merges from 15 snapshots, with their evaluation: how long it takes, and what of it is what.

``python -m benchmarks.ablation --run URL``

``URL`` is a run of ``tiny`` with at least 15 snapshots. They are copied, so that no merge and no loss is on record.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from pipelines.ablate import ablate
from tasks.checkpoints.run_folder import RUN_KEY, RunFolder

NUM_SNAPSHOTS = 15
GRID = (
    "methods=[sma,wma,ema,'wsm:1-sqrt']",
    "alphas=[0.1,0.2]",
    f"counts=[{','.join(str(count) for count in range(4, NUM_SNAPSHOTS + 1))}]",
)
"""Twelve N, five methods."""


def main() -> None:
    """Copy, ablate, print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a run with its snapshots")
    source = RunFolder(parser.parse_args().run)
    snapshots = [snapshot for snapshot in source.snapshots() if not snapshot.ephemeral][-NUM_SNAPSHOTS:]
    interval = source.identity().config.merge_interval_tokens
    with tempfile.TemporaryDirectory(prefix="ablation-") as folder:
        place = Path(folder) / "run"
        (place / "snapshots").mkdir(parents=True)
        shutil.copy(Path(source.url) / RUN_KEY, place)
        for snapshot in snapshots:
            shutil.copytree(snapshot.url, place / "snapshots" / Path(snapshot.url).name)
        started = time.perf_counter()
        answer = ablate(str(place), (*GRID, f"intervals=[{interval}]", f"ends=[{snapshots[-1].step}]"))
        seconds = time.perf_counter() - started
    merges = len(answer["cells"])
    print(json.dumps({"snapshots": len(snapshots), "merges": merges, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
