"""Merge engine against the raw read of the same bytes, in turns; medians and ratios.

``python -m benchmarks.merge [--count 10] [--threads 2] [--rounds 5] [--folder DIR]``
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.checkpoints import write_checkpoints
from cluster.fan_out import fan_out_local
from cluster.storage import open_store
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.safetensors_header import DTYPE_BYTES
from tasks.checkpoints.tensor_reader import TensorReader
from tasks.merging.merge import execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import MergePlan, MergeTask, plan_merge


def main() -> None:
    """Generate inputs, time both in turns, print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="keep inputs here for the next time")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="pma-bench-"))
    urls = write_checkpoints(folder, options.count)
    rounds: dict[str, list[float]] = {"read": [], "engine": [], "process": []}
    for _ in range(options.rounds + 1):
        rounds["read"].append(timed(lambda: read_all(urls, options.threads)))
        rounds["engine"].append(timed(lambda: merge_in_process(urls, folder, options.threads)))
        rounds["process"].append(timed(lambda: merge_command(urls, folder, options.threads)))
    # The first round warms the page cache.
    medians = {name: statistics.median(values[1:]) for name, values in rounds.items()}
    size = sum(task.bytes_read for task in plan(urls, folder).tasks)
    print(
        json.dumps(
            {
                "inputs": len(urls),
                "bytes_read": size,
                "threads": options.threads,
                "median_seconds": {name: round(value, 3) for name, value in medians.items()},
                "engine_throughput_over_read": round(medians["read"] / medians["engine"], 3),
                "engine_gib_per_second": round(size / medians["engine"] / 2**30, 2),
                "all_seconds": {name: [round(value, 3) for value in values] for name, values in rounds.items()},
            },
            indent=1,
        )
    )
    if options.folder is None:
        shutil.rmtree(folder)


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def plan(urls: list[str], folder: Path) -> MergePlan:
    """The plan of the simple average of ``urls``."""
    inputs = [open_checkpoint(url) for url in urls]
    return plan_merge(inputs, MethodChoice(method="sma"), output_url=str(folder / "out"))


def read_all(urls: list[str], threads: int) -> None:
    """Read what a merge reads, with the same chunks and threads, and do nothing with it."""
    tasks = list(plan(urls, Path("/nowhere")).tasks)
    for _ in fan_out_local(_read_task, tasks, num_workers=threads):
        pass


def merge_in_process(urls: list[str], folder: Path, threads: int) -> None:
    """One merge by the engine."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    execute_merge(
        plan(urls, folder), lambda function, tasks: fan_out_local(function, tasks, num_workers=threads), lambda: None
    )


def merge_command(urls: list[str], folder: Path, threads: int) -> None:
    """The same through the command line, as a whole process."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, "-m", "pipelines", "merge", "--output", str(folder / "out"), "--workers", str(threads)]
    subprocess.run([*command, "--json", "--inputs", *urls], check=True, capture_output=True)


def _read_task(task: MergeTask) -> int:
    total = 0
    buffer = memoryview(bytearray(1 << 20))
    for url, index in zip(task.input_urls, range(len(task.input_urls)), strict=True):
        with TensorReader(open_store(url)) as reader:
            for tensor in task.tensors:
                place = tensor.sources[index]
                step = len(buffer) // DTYPE_BYTES[place.dtype]
                for start in range(0, place.num_elements, step):
                    end = min(start + step, place.num_elements)
                    size = (end - start) * DTYPE_BYTES[place.dtype]
                    reader.read_into(place, start, end, buffer[:size])
                    total += size
    return total


if __name__ == "__main__":
    main()
