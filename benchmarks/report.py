"""How long ``pma report`` takes over a long run: ``python -m benchmarks.report [--snapshots 1000] [--rounds 3]``.

The run is made up: manifests without weights, a journal of 50 steps a snapshot, a scheduled merge for every snapshot from
the tenth on, and a held-out loss for all of them. The page is written as the command writes it, without the
copy for MLflow.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

from benchmarks.measure import timed
from cluster.fan_out import fan_out_local
from cluster.storage import Store, open_store
from configs.merging import MergeConfig
from pipelines.report.build import draw, render, write_page
from pipelines.report.data import gather
from tasks.checkpoints.manifest import MANIFEST_KEY
from tasks.checkpoints.run_folder import RunFolder, snapshot_key
from tasks.evaluation.held_out import Evaluation, suite_of, write_evaluation
from tasks.merging.schedule import scheduled_rule
from tests.retention_run import BATCH, begin_run, commit, small_config

STEPS_A_SNAPSHOT = 50
WINDOW = 10
LINES_AN_OBJECT = 600


def main() -> None:
    """Print one line of JSON."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--snapshots", type=int, default=1000)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        url = f"{scratch}/run"
        make_run(url, options.snapshots)
        first, first_cpu = measured(lambda: write_page(RunFolder(url)))
        rounds = [measured(lambda: write_page(RunFolder(url))) for _ in range(options.rounds)]
        answer = {
            "snapshots": options.snapshots,
            "first_seconds": first,
            "first_cpu_seconds": first_cpu,
            "seconds": statistics.median(wall for wall, _ in rounds),
            "cpu_seconds": statistics.median(cpu for _, cpu in rounds),
            **parts(url),
            "page_bytes": len(open_store(url).read("report.html")),
            "load_average": round(os.getloadavg()[0], 1),
        }
    sys.stdout.write(json.dumps(answer) + "\n")


def parts(url: str) -> dict[str, float]:
    """Seconds of reading the run, drawing and writing the page, one after the other."""
    data = gather(url)
    charts = draw(data)
    works: dict[str, Callable[[], object]] = {
        "gather_seconds": lambda: gather(url),
        "draw_seconds": lambda: draw(data),
        "render_seconds": lambda: render(data, charts),
    }
    return {name: round(timed(work), 3) for name, work in works.items()}


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds and processor seconds that ``work`` takes."""
    cpu = time.process_time()
    wall = timed(work)
    return round(wall, 3), round(time.process_time() - cpu, 3)


def make_run(url: str, num_snapshots: int) -> Store:
    """A run of ``num_snapshots`` with merges and losses, without weights."""
    store = open_store(url)
    interval = STEPS_A_SNAPSHOT * BATCH
    config = small_config(
        steps=num_snapshots * STEPS_A_SNAPSHOT, merge=MergeConfig(count=WINDOW, interval_tokens=interval)
    )
    config = replace(
        config, snapshots=replace(config.snapshots, interval_tokens=interval), anneal=replace(config.anneal, tokens=10 * interval)
    )  # fmt: skip
    begin_run(store, config)
    commit(store, 1)
    pattern = json.loads(store.read(f"{snapshot_key(1)}/{MANIFEST_KEY}"))
    store.delete(f"{snapshot_key(1)}/{MANIFEST_KEY}")
    suite, rule = suite_of(config), scheduled_rule(config)

    def write(number: int) -> None:
        step = number * STEPS_A_SNAPSHOT
        values = {**pattern, "step": step, "tokens_seen": step * BATCH, "digest": f"{number:064x}"}
        store.create(f"{snapshot_key(step)}/{MANIFEST_KEY}", json.dumps(values).encode())
        write_evaluation(store, evaluation(values["digest"], suite, 1.2 + 2 / math.sqrt(number)))
        if number >= WINDOW:
            merged = {**values, "kind": "merged", "digest": f"{10**6 + number:064x}", "merge": merge_of(url, number)}
            store.create(f"merged/{rule.output_name(step)}/{MANIFEST_KEY}", json.dumps(merged).encode())
            write_evaluation(store, evaluation(merged["digest"], suite, 1.13 + 2.2 / math.sqrt(number)))

    list(fan_out_local(write, range(1, num_snapshots + 1), num_workers=8))
    steps = num_snapshots * STEPS_A_SNAPSHOT
    for start in range(1, steps + 1, LINES_AN_OBJECT):
        lines = (journal_line(step) for step in range(start, min(start + LINES_AN_OBJECT, steps + 1)))
        store.create(f"journal/0001-{start:09d}.jsonl", "".join(lines).encode())
    return store


def merge_of(url: str, number: int) -> dict[str, object]:
    """What the manifest of the merge that ends at the snapshot ``number`` says of its inputs."""
    numbers = range(number - WINDOW + 1, number + 1)
    return {
        "method": "sma", "alpha": None, "weights": [1 / WINDOW] * WINDOW, "dtypes": {}, "policies": {}, "identity": "i",
        "inputs": [
            {
                "url": f"{url}/{snapshot_key(n * STEPS_A_SNAPSHOT)}", "digest": f"{n:064x}", "manifest_digest": "m",
                "step": n * STEPS_A_SNAPSHOT, "tokens_seen": n * STEPS_A_SNAPSHOT * BATCH,
            }
            for n in numbers
        ],
    }  # fmt: skip


def evaluation(digest: str, suite: str, loss: float) -> Evaluation:
    """A record of three slices."""
    slices = (loss - 0.01, loss, loss + 0.01)
    return Evaluation(
        digest=digest, suite=suite, loss=loss, slices=slices, domains={"all": loss}, bits_per_byte=loss / math.log(2),
        tokens=98304, domain_bits_per_byte={"all": loss / math.log(2)},
    )  # fmt: skip


def journal_line(step: int) -> str:
    """What a step of a network with two layers of experts journals."""
    metrics = {
        "train/loss": 1.2 + 3 / math.sqrt(step), "train/gradient_norm": 0.5, "train/learning_rate": 3e-3,
        "train/tokens_per_second": 60_000.0, "train/load_balance_loss": 2.0,
    }  # fmt: skip
    for layer in range(2):
        metrics |= {f"router/layer_{layer}/{name}": 0.97 for name in ("load_entropy", "load_max_ratio", "dead_experts")}
    if step % STEPS_A_SNAPSHOT == 0:
        metrics["snapshot/stall_seconds"] = 0.007
    if step % STEPS_A_SNAPSHOT == 3 and step > STEPS_A_SNAPSHOT:
        metrics |= {"snapshot/upload_seconds": 0.1, "snapshot/publish_seconds": 0.12}
    return json.dumps({"step": step, "tokens": step * BATCH, "time": 1.8e9 + step / 20, "metrics": metrics}) + "\n"


if __name__ == "__main__":
    main()
