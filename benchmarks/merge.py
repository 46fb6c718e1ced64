"""``pma merge`` beside mergekit and beside the raw read of the same bytes, in turns; medians and ratios.

``python -m benchmarks.merge [--mergekit PATH/TO/mergekit-yaml] [--count 10] [--threads 2] [--rounds 5] [--folder DIR]``

mergekit is not a dependency: install ``mergekit==0.1.5`` in an environment of its own and name its command.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.checkpoints import write_checkpoints
from benchmarks.measure import Cost, medians, run_measured, timed
from cluster.fan_out import fan_out_local
from tasks.checkpoints.reader import open_checkpoint
from tasks.merging.merge import execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge
from tasks.merging.planned import MergePlan

BLOCK_BYTES = {"hot": 1 << 20, "large": 64 << 20}
"""Raw reads into one buffer: of 1 MiB, which stays in cache, and of 64 MiB, which does not."""


def main() -> None:
    """Generate inputs, time everything in turns, print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit", type=Path, default=None, help="mergekit-yaml of another environment")
    parser.add_argument("--folder", type=Path, default=None, help="keep inputs here for the next time")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="pma-bench-"))
    urls = write_checkpoints(folder, options.count)
    seconds: dict[str, list[float]] = {}
    costs: dict[str, list[Cost]] = {}
    for number in range(options.rounds + 1):
        for name, size in BLOCK_BYTES.items():
            keep(seconds, f"read_{name}", number, timed(lambda size=size: read_all(urls, options.threads, size)))
        keep(seconds, "engine", number, timed(lambda: merge_in_process(urls, folder, options.threads)))
        keep(costs, "pma", number, run_measured(pma_command(urls, folder, str(options.threads))))
        keep(costs, "pma_local", number, run_measured(pma_command(urls, folder, "local")))
        if options.mergekit is not None and number <= max(1, options.rounds // 2):
            keep(costs, "mergekit", number, run_measured(mergekit_command(options.mergekit, urls, folder)))
    size = sum(task.bytes_read for task in plan(urls, folder).tasks)
    print(json.dumps(summary(size, len(urls), options.threads, seconds, costs), indent=1))
    if options.folder is None:
        shutil.rmtree(folder)


def keep(rows: dict[str, list], name: str, number: int, value: object) -> None:  # type: ignore[type-arg]
    """Note a measurement; the first round only warms the page cache."""
    if number:
        rows.setdefault(name, []).append(value)


def summary(
    size: int, count: int, threads: int, seconds: dict[str, list[float]], costs: dict[str, list[Cost]]
) -> dict[str, object]:
    """Medians, ratios, and every single figure."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    rows = {name: medians(values) for name, values in costs.items()}
    gib = size / 2**30
    found: dict[str, object] = {
        "inputs": count,
        "gib_read": round(gib, 2),
        "threads": threads,
        "median_seconds": {name: round(value, 3) for name, value in middle.items()},
        "engine_over_read": {name: round(middle[f"read_{name}"] / middle["engine"], 3) for name in BLOCK_BYTES},
        "processes": rows,
        "cpu_seconds_per_gib": {name: round(row["cpu_seconds"] / gib, 2) for name, row in rows.items()},
        "all_seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "all_process_seconds": {name: [round(cost.seconds, 2) for cost in values] for name, values in costs.items()},
    }
    if "mergekit" in rows:
        found["times_faster_than_mergekit"] = round(rows["mergekit"]["seconds"] / rows["pma_local"]["seconds"], 1)
    return found


def plan(urls: Sequence[str], folder: Path) -> MergePlan:
    """The plan of the simple average of ``urls``."""
    return plan_merge(
        [open_checkpoint(url) for url in urls], MethodChoice(method="sma"), output_url=str(folder / "out")
    )


def read_all(urls: Sequence[str], threads: int, block_bytes: int) -> None:
    """Read every file of ``urls`` with ``threads`` threads, each into one buffer, and do nothing with it."""
    files = [str(path) for url in urls for path in sorted(Path(url).glob("*.safetensors"))]
    for _ in fan_out_local(_reader(block_bytes), files, num_workers=threads):
        pass


def merge_in_process(urls: Sequence[str], folder: Path, threads: int) -> None:
    """One merge by the engine."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    execute_merge(
        plan(urls, folder), lambda function, tasks: fan_out_local(function, tasks, num_workers=threads), lambda: None
    )


def pma_command(urls: Sequence[str], folder: Path, workers: str) -> list[str]:
    """The same through the command line; removes the output of the time before."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, "-m", "pipelines", "merge", "--output", str(folder / "out"), "--workers", workers]
    return [*command, "--json", "--inputs", *urls]


def mergekit_command(mergekit: Path, urls: Sequence[str], folder: Path) -> list[str]:
    """The linear merge of mergekit of the same inputs with equal weights."""
    shutil.rmtree(folder / "mergekit-out", ignore_errors=True)
    models = [{"model": url, "parameters": {"weight": 1.0 / len(urls)}} for url in urls]
    recipe = {"merge_method": "linear", "models": models, "dtype": "float32", "out_dtype": "bfloat16"}
    (folder / "mergekit.yaml").write_text(json.dumps(recipe))
    return [str(mergekit), str(folder / "mergekit.yaml"), str(folder / "mergekit-out"), "--no-copy-tokenizer"]


def _reader(block_bytes: int) -> Callable[[str], None]:
    def read(path: str) -> None:
        buffer = memoryview(bytearray(block_bytes))
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    return read


if __name__ == "__main__":
    main()
