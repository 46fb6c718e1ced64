"""The same inputs give the same bytes from every executor, and two drivers of one output publish once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints import SHAPE, write_checkpoints

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "two threads": ("--workers", "local"),
    "one process": ("--workers", "1"),
    "two processes": ("--workers", "2"),
    "small chunks": ("--workers", "local", "--memory-budget", "128KiB"),
    "middling chunks": ("--workers", "1", "--memory-budget", "1000KiB"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = dataclasses.replace(SHAPE, num_layers=4, vocab_size=2_000)
    return write_checkpoints(tmp_path_factory.mktemp("inputs"), 3, model)


def shard_digests(output: Path) -> list[str]:
    manifest = json.loads((output / "manifest.json").read_text())
    return [manifest["digest"], *(shard["digest"] for shard in manifest["shards"])]


@pytest.mark.ray
@pytest.mark.slow
def test_merge_bytes_are_the_same_from_every_executor(
    pma: Callable[..., Any], inputs: list[str], tmp_path: Path
) -> None:
    made = {}
    for name, options in OPTIONS.items():
        output = tmp_path / name.replace(" ", "-")
        answer = pma(
            "merge",
            "--json",
            "--method",
            "ema",
            "--alpha",
            "0.2",
            *options,
            "--output",
            str(output),
            "--inputs",
            *inputs,
        )
        assert answer.code == 0, answer.stderr
        made[name] = shard_digests(output)
    done = subprocess.run(
        [sys.executable, "-m", "tests.merge_on_ray", str(tmp_path), *inputs],
        cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    made |= {f"{workers} on Ray": digests for workers, digests in json.loads(done.stdout.splitlines()[-1]).items()}
    assert len(made) == len(OPTIONS) + 3
    assert all(digests == made["two threads"] for digests in made.values()), made


def test_merge_by_two_drivers_at_once_publishes_one(pma: Callable[..., Any], inputs: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ("merge", "--json", "--output", str(output), "--inputs", *inputs)
    drivers = [
        subprocess.Popen(
            [sys.executable, "-m", "pipelines", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    answers = [json.loads(driver.communicate(timeout=120)[0]) for driver in drivers]
    codes = sorted(driver.returncode for driver in drivers)
    assert codes in ([0, 75], [0, 0]), answers
    published = {answer["digest"] for answer in answers if "digest" in answer}
    assert len(published) == 1
    refused = [answer for answer in answers if "error" in answer]
    assert all(answer["error"] == "LeaseHeld" for answer in refused)
    assert pma("verify", str(output)).code == 0
    again = pma(*command)
    assert (again.code, again.json["digest"], again.json["bytes_read"]) == (0, published.pop(), 0)
