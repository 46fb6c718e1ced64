"""Ray workers, one against two: the tasks of one merge on a Ray that is up, in turns; medians.

``python -m benchmarks.ray_workers --folder DIR [--rounds 3]``, with the folder of ``benchmarks.merge``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from benchmarks.checkpoints import write_checkpoints
from benchmarks.measure import timed
from benchmarks.merge import plan
from cluster.fan_out import fan_out_ray
from cluster.session import ray_session
from tasks.merging.merge import execute_merge


def main() -> None:
    """Time the same merge with one and with two tasks in flight."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    urls = write_checkpoints(options.folder, 10)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with ray_session(None, 2):
        for number in range(options.rounds + 1):
            for workers, kept in seconds.items():
                shutil.rmtree(options.folder / "out", ignore_errors=True)
                merge_plan = plan(urls, options.folder)
                took = timed(
                    lambda workers=workers, merge_plan=merge_plan: execute_merge(
                        merge_plan,
                        lambda function, tasks: fan_out_ray(function, tasks, num_in_flight=workers),
                        lambda: None,
                    )
                )
                if number:
                    kept.append(took)
    middle = {workers: statistics.median(values) for workers, values in seconds.items()}
    print(
        json.dumps(
            {"median_seconds": middle, "two_over_one": round(middle[1] / middle[2], 2), "all": seconds}, indent=1
        )
    )


if __name__ == "__main__":
    main()
