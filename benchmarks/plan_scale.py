"""A merge too large for this machine, planned from synthetic headers and simulated from measured bandwidths.

``python -m benchmarks.plan_scale [--inputs 10] [--bandwidth-mib 1000] [--json]``

Plans are real: the same planner, on headers of a real configuration's tensors held in memory. Execution is a
simulation: tasks go to the first free worker, largest first, at a bandwidth per worker that the user states or
``benchmarks.merge`` measured, with stragglers and failures drawn from a seeded generator.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.checkpoints import tensor_shapes
from cluster.storage import open_store
from configs.load import load_config
from configs.model import ModelConfig
from pipelines.merge_request import collection_paused
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.regions import Region, TensorPlace
from tasks.checkpoints.safetensors_header import build_header, read_header
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge
from tasks.merging.planned import MergePlan
from tasks.peak_memory import peak_resident_bytes

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STRAGGLER_FRACTION, STRAGGLER_SLOWDOWN = 0.05, 3.0
FAILURE_PROBABILITY = 0.01
"""Of a task attempt; a failed attempt is lost half-way and starts again."""
SEED = 1


def main() -> None:
    """Plan and simulate every model; print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=10)
    parser.add_argument("--bandwidth-mib", type=float, default=1000.0, help="read per worker and second, MiB")
    parser.add_argument("--model", choices=sorted(models()), help="one model, in this process")
    options = parser.parse_args()
    if options.model is None:
        # A process each, so that peak memory is each model's own.
        command = [sys.executable, "-m", "benchmarks.plan_scale", "--inputs", str(options.inputs)]
        command += ["--bandwidth-mib", str(options.bandwidth_mib), "--model"]
        rows = [
            json.loads(subprocess.run([*command, name], check=True, capture_output=True).stdout) for name in models()
        ]
        print(json.dumps(rows, indent=1))
        return
    print(json.dumps(measure(options.model, options.inputs, options.bandwidth_mib * 2**20)))


def models() -> dict[str, ModelConfig]:
    """The 10B/100B of the shipped configurations, and a 15B/150B of the same shape but deeper and wider."""
    large = load_config("moe-10b-100b").config.model
    return {
        "10B/100B": large,
        "15B/150B": dataclasses.replace(large, num_layers=60),
    }


def measure(name: str, num_inputs: int, bandwidth: float) -> dict[str, object]:
    """Planning time and memory, balance, and simulated makespans of one model in float32."""
    headers = [encode_headers(models()[name]) for _ in range(num_inputs)]
    before = peak_resident_bytes()
    started = time.perf_counter()
    with collection_paused():
        inputs = [checkpoint_of(item, number) for number, item in enumerate(headers)]
        opened = time.perf_counter() - started
        plan = plan_merge(inputs, MethodChoice(method="sma"), output_url="memory://out")
    planned = time.perf_counter() - started
    sizes = [task.bytes_read for task in plan.tasks]
    return {
        "model": name,
        "tensors": len(inputs[0].model),
        "inputs": num_inputs,
        "bytes_per_input": sum(place.num_bytes for place in inputs[0].model.values()),
        "bytes_read": sum(sizes),
        "bytes_written": sum(task.bytes_written for task in plan.tasks),
        "header_seconds": round(opened, 2),
        "plan_seconds": round(planned, 2),
        "peak_memory_mib": peak_resident_bytes() >> 20,
        "memory_before_planning_mib": before >> 20,
        "tasks": len(plan.tasks),
        "largest_over_mean_task": round(max(sizes) * len(sizes) / sum(sizes), 3),
        "task_memory_mib": max(task.memory_bytes for task in plan.tasks) >> 20,
        "simulation": [simulate(plan, workers, bandwidth) for workers in WORKERS],
    }


def encode_headers(model: ModelConfig) -> list[tuple[str, bytes, int]]:
    """File name, header and file size of every shard of one input, at most 5 GiB a file as Hugging Face writes them."""
    files: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    room = 5 << 30
    for name, shape in tensor_shapes(model):
        size = 4 * int(np.prod(shape))
        if size > room:
            files.append([])
            room = 5 << 30
        files[-1].append((name, "F32", shape))
        room -= size
    shards = []
    for number, file in enumerate(files, start=1):
        header, entries = build_header(file)
        shards.append(
            (f"model-{number:05d}-of-{len(files):05d}.safetensors", header, entries[-1].offset + entries[-1].bytes)
        )
    return shards


def checkpoint_of(headers: Sequence[tuple[str, bytes, int]], number: int) -> Checkpoint:
    """A checkpoint whose headers are parsed as a stored one's are; its data does not exist."""
    store = HeaderStore(f"memory://plan-scale-{number}", {key: (header, size) for key, header, size in headers})
    model = {}
    for key, _, _ in headers:
        for entry in read_header(store, key):
            region = Region(key=key, offset=entry.offset, start=(0,) * len(entry.shape), shape=entry.shape)
            model[entry.name] = TensorPlace(dtype=entry.dtype, shape=entry.shape, regions=(region,))
    return Checkpoint(
        url=store.url, store=store, model=model, state={}, num_files=len(headers), manifest=None, manifest_digest=None
    )


class HeaderStore(type(open_store("memory://plan-scale"))):  # type: ignore[misc]
    """Objects that have a header and a size, and no data."""

    def __init__(self, url: str, headers: dict[str, tuple[bytes, int]]) -> None:
        super().__init__(url)
        self._headers = headers

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes of the header."""
        return self._headers[key][0][start:end]

    def size(self, key: str) -> int:
        """Header and the data that it describes."""
        return self._headers[key][1]

    def version(self, key: str) -> str:
        """Constant: nothing is ever replaced."""
        return str(self.size(key))


def simulate(plan: MergePlan, num_workers: int, bandwidth: float) -> dict[str, float]:
    """Makespan without trouble, and with stragglers and failures, in seconds."""
    seconds = [task.bytes_read / bandwidth for task in plan.tasks]
    random = np.random.default_rng(SEED)
    slow = np.where(random.random(len(seconds)) < STRAGGLER_FRACTION, STRAGGLER_SLOWDOWN, 1.0)
    failures = random.geometric(1 - FAILURE_PROBABILITY, len(seconds)) - 1
    troubled = [base * float(s) * (1 + 0.5 * int(f)) for base, s, f in zip(seconds, slow, failures, strict=True)]
    ideal = sum(seconds) / num_workers
    return {
        "workers": num_workers,
        "seconds": round(makespan(seconds, num_workers), 1),
        "over_ideal": round(makespan(seconds, num_workers) / ideal, 3),
        "seconds_with_trouble": round(makespan(troubled, num_workers), 1),
    }


def makespan(seconds: Sequence[float], num_workers: int) -> float:
    """When the last worker ends, if each takes the largest task that is left."""
    free = [0.0] * num_workers
    for duration in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


if __name__ == "__main__":
    main()
