"""How ``pma merge`` grows: with N, with the model, with workers, and with the merges made in one read.

``python -m benchmarks.scaling [--rounds 3] [--folder DIR]``; every figure is of a whole process tree, medians, in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.checkpoints import SHAPE, write_checkpoints
from benchmarks.measure import Cost, medians, run_measured
from configs.model import ModelConfig

COUNTS = (3, 10, 20, 40)
SMALL = dataclasses.replace(SHAPE, num_layers=2, vocab_size=16_000)
GRID = "sma:10,sma:8,sma:6,sma:3,wma:10,wma:6,ema=0.2:10,ema=0.1:10"
RAY_WORKERS = (1, 2)


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="keep inputs here for the next time")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="pma-scaling-"))
    urls = {name: write_checkpoints(folder / name, count, model) for name, count, model in models()}
    costs: dict[str, list[Cost]] = {}
    for number in range(options.rounds + 1):
        for name, command in commands(urls, folder).items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            cost = run_measured(command)
            if number:  # the first round warms the page cache
                costs.setdefault(name, []).append(cost)
    rows = {name: medians(values) for name, values in costs.items()}
    print(json.dumps({"rows": rows, **ratios(rows)}, indent=1))
    if options.folder is None:
        shutil.rmtree(folder)


def models() -> list[tuple[str, int, ModelConfig]]:
    """Name, number and shape of the inputs: one of about 100 MB, and one of about four times as much."""
    return [("small", max(COUNTS), SMALL), ("large", 10, dataclasses.replace(SMALL, num_layers=11, vocab_size=40_000))]


def commands(urls: dict[str, list[str]], folder: Path) -> dict[str, list[str]]:
    """Every measured command by name."""
    small, large = urls["small"], urls["large"]
    found = {f"N={count}": command(small[:count], folder) for count in COUNTS}
    found["large N=10"] = command(large, folder)
    found["large grid of 8"] = command(large, folder, "--grid", GRID)
    for workers in RAY_WORKERS:
        found[f"large processes={workers}"] = command(large, folder, "--workers", str(workers))
    return found


def command(urls: Sequence[str], folder: Path, *options: str) -> list[str]:
    """A merge of ``urls``."""
    start = [sys.executable, "-m", "pipelines", "merge", "--json", "--output", str(folder / "out")]
    return [*start, *options, "--inputs", *urls]


def ratios(rows: dict[str, dict[str, float]]) -> dict[str, object]:
    """What the targets are about."""
    seconds = [rows[f"N={count}"]["seconds"] for count in COUNTS]
    slope, start = np.polyfit(COUNTS, seconds, 1)
    memory = [rows[name]["peak_private_mib"] for name in (*(f"N={c}" for c in COUNTS), "large N=10")]
    return {
        "seconds_per_input": round(float(slope), 4),
        "seconds_at_no_input": round(float(start), 3),
        "largest_miss_of_the_line": round(
            max(abs(s - (start + slope * c)) / s for c, s in zip(COUNTS, seconds, strict=True)), 3
        ),
        "peak_private_memory_largest_over_smallest": round(max(memory) / min(memory), 3),
        "grid_of_8_over_one": round(rows["large grid of 8"]["seconds"] / rows["large N=10"]["seconds"], 2),
        "two_processes_over_one": round(rows["large processes=1"]["seconds"] / rows["large processes=2"]["seconds"], 2),
        "median_peak_private_mib": round(statistics.median(memory), 1),
    }


if __name__ == "__main__":
    main()
