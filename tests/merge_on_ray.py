"""Merge on one Ray with 1, 2 and 4 tasks at once: ``python -m tests.merge_on_ray FOLDER URL...`` prints what each made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cluster.fan_out import fan_out_ray
from cluster.session import ray_session
from tasks.checkpoints.reader import open_checkpoint
from tasks.merging.merge import execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge

WORKERS = (1, 2, 4)


def main(folder: Path, urls: list[str]) -> None:
    """One merge for each number of workers."""
    made = {}
    with ray_session(None, max(WORKERS)):
        for workers in WORKERS:
            inputs = [open_checkpoint(url) for url in urls]
            plan = plan_merge(inputs, MethodChoice(method="ema", alpha=0.2), output_url=str(folder / f"ray{workers}"))
            report = execute_merge(
                plan, lambda function, tasks, n=workers: fan_out_ray(function, tasks, num_in_flight=n), lambda: None
            )
            made[workers] = [report.manifest.digest, *(shard.digest for shard in report.manifest.shards)]
    sys.stdout.write(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
