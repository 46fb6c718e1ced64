"""What the workflow layer costs: a step, a tick with nothing due, and how many requests they make.

``python -m benchmarks.workflow [--snapshots 1000] [--s3]`` prints medians; with ``--s3`` a server is started on loopback.
Every tick is a process of its own, as cron starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.fan_out import fan_out_local
from cluster.lease import Lease
from cluster.storage import Store, open_store
from configs.merging import MergeConfig
from pipelines.steps import Step, run_steps
from pipelines.tick import tick
from tasks.checkpoints.manifest import MANIFEST_KEY
from tasks.checkpoints.run_folder import snapshot_key
from tests.retention_run import BATCH, begin_run, commit, small_config
from tests.s3_server import s3_server

REPEATS = 7
NUM_STEPS = 20


def main() -> None:
    """Measure on a path and, if asked for, on S3."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--snapshots", type=int, default=1000)
    arguments.add_argument("--s3", action="store_true")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report("path", f"{scratch}/run", options.snapshots)
        if options.s3:
            with s3_server(Path(scratch)) as environment:
                os.environ.update(environment)
                report("s3", f"s3://runs/{uuid.uuid4().hex}", options.snapshots)


def report(where: str, url: str, num_snapshots: int) -> None:
    """Print one line of JSON for the storage at ``url``."""
    store = make_run(url, num_snapshots)
    first = timed(lambda: tick(url))
    with counted_requests() as requests:
        again = statistics.median(timed(lambda: tick(url)) for _ in range(REPEATS))
    process = statistics.median(timed(lambda: tick_process(url)) for _ in range(REPEATS))
    with counted_requests() as step_requests:
        steps = timed(lambda: run_new_steps(store))
    answer = {
        "storage": where,
        "snapshots": num_snapshots,
        "first_tick_seconds": round(first, 3),
        "tick_seconds": round(again, 3),
        "tick_process_seconds": round(process, 3),
        "requests_a_tick": requests[0] / REPEATS,
        "step_milliseconds": round(1000 * steps / NUM_STEPS, 2),
        "requests_a_step": round(step_requests[0] / NUM_STEPS, 2),
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def make_run(url: str, num_snapshots: int) -> Store:
    """A run with the manifests of ``num_snapshots`` snapshots, of whose merges none is due."""
    store = open_store(url)
    never = num_snapshots * BATCH * 2
    begin_run(store, small_config(steps=num_snapshots, merge=MergeConfig(count=3, every_tokens=never, evaluate=False)))
    commit(store, 1)
    pattern = json.loads(store.read(f"{snapshot_key(1)}/{MANIFEST_KEY}"))

    def write(step: int) -> None:
        values = {**pattern, "step": step, "tokens_seen": step * BATCH}
        store.create(f"{snapshot_key(step)}/{MANIFEST_KEY}", json.dumps(values).encode())

    list(fan_out_local(write, range(2, num_snapshots + 1), num_workers=8))
    return store


def tick_process(url: str) -> None:
    """One tick, as cron starts it."""
    subprocess.run([sys.executable, "-m", "pipelines", "tick", "--run", url, "--json"], check=True, capture_output=True)


def run_new_steps(store: Store) -> None:
    """Steps without work, each recorded for the first time."""
    lease = Lease(store, "run")
    lease.acquire()
    steps: list[Step[None]] = [
        Step(
            name=f"step-{number}",
            config={"number": number},
            needs=(f"step-{number - 1}",) if number else (),
            function=lambda _: {},
            is_standing=lambda _, __: True,
        )
        for number in range(NUM_STEPS)
    ]
    run_steps(store, steps, None, lease)
    lease.release()


@contextmanager
def counted_requests() -> Iterator[list[int]]:
    """Requests that the S3 client sends meanwhile; none for other storage."""
    count = [0]
    if not os.environ.get("AWS_ENDPOINT_URL"):
        yield count
        return
    from cluster.storage_s3_client import client

    def note(**_: object) -> None:
        count[0] += 1

    client().meta.events.register("before-send.s3", note)
    try:
        yield count
    finally:
        client().meta.events.unregister("before-send.s3", note)


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
