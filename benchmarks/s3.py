"""Merging from an S3 server against raw ranged reads by the same client: ``python -m benchmarks.s3 [--rounds 3] [--count 10]``.

The server is SeaweedFS on loopback, on the same cores; so both sides share them with it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import statistics
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checkpoints import SHAPE, write_checkpoints
from benchmarks.measure import timed
from cluster.storage import open_store
from pipelines.merge import task_runner
from tasks.checkpoints.reader import open_checkpoint
from tasks.merging.merge import execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import REMOTE_BUFFERS, REMOTE_CHUNK_BYTES, plan_merge
from tests.s3_server import s3_server

MODEL = dataclasses.replace(SHAPE, num_layers=4, vocab_size=16_000)
READS_AT_ONCE = 2 * REMOTE_BUFFERS


def main() -> None:
    """Measure in turns; print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, s3_server(Path(scratch)) as environment:
        os.environ.update(environment)
        inputs = write_checkpoints(Path(scratch), options.count, MODEL)
        urls = [upload(url, f"s3://runs/in{number}") for number, url in enumerate(inputs)]
        seconds: dict[str, list[float]] = {"raw ranged reads": [], "merge to a folder": [], "merge to the server": []}
        for number in range(options.rounds + 1):
            there = uuid.uuid4().hex
            took = [
                timed(lambda: read_all(urls)),
                timed(lambda out=f"{scratch}/{there}": merge(urls, out)),
                timed(lambda out=f"s3://runs/{there}": merge(urls, out)),
            ]
            for kept, value in zip(seconds.values(), took, strict=True):
                if number:
                    kept.append(value)
        size = sum(place.num_bytes for url in urls for place in open_checkpoint(url).model.values())
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    raw = middle["raw ranged reads"]
    print(
        json.dumps(
            {
                "gib_read": round(size / 2**30, 2),
                "median_seconds": {name: round(value, 2) for name, value in middle.items()},
                "throughput_over_raw": {name: round(raw / value, 2) for name, value in middle.items()},
                "all_seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
            },
            indent=1,
        )
    )


def upload(folder: str, url: str) -> str:
    """Copy a checkpoint to the server."""
    source, target = open_store(folder), open_store(url)
    for key in source.keys(""):
        with target.create_stream(key) as out:
            out.write(source.read(key))
    return url


def read_all(urls: Sequence[str]) -> None:
    """Every file in ranges of a merge's size, two tasks' worth of them at once."""
    ranges = [
        (open_store(url).open_reader(key), start, min(start + REMOTE_CHUNK_BYTES, open_store(url).size(key)))
        for url in urls
        for key in open_store(url).keys("")
        if key.endswith(".safetensors")
        for start in range(0, open_store(url).size(key), REMOTE_CHUNK_BYTES)
    ]
    with concurrent.futures.ThreadPoolExecutor(READS_AT_ONCE) as pool:
        for _ in pool.map(lambda item: item[0].read_into(item[1], memoryview(bytearray(item[2] - item[1]))), ranges):
            pass


def merge(urls: Sequence[str], output: str) -> None:
    """The simple average of all inputs."""
    plan = plan_merge([open_checkpoint(url) for url in urls], MethodChoice(method="sma"), output_url=output)
    with task_runner("local", [output, *urls]) as run_tasks:
        execute_merge(plan, lambda function, tasks: run_tasks(function, tasks, lambda: False), lambda: None)


if __name__ == "__main__":
    main()
