"""Fixtures for the whole suite: the command line as users run it, and one finished demo run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from s3_server import s3_server

os.environ["OMP_NUM_THREADS"] = "1"
# As users run it: a local Ray makes a token of its own.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parent.parent
COMMAND_SECONDS = 480

# A few hundred steps of the demo's network: long enough for windows, an annealing branch and a comparison.
SMALL = (
    "training.total_tokens=819200",
    "schedule.warmup_tokens=51200",
    "snapshots.interval_tokens=51200",
    "anneal.tokens=204800",
    "merge.count=3",
    "merge.comparison_counts=[3,6]",
    "evaluation.slice_tokens=8192",
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command said."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        return value


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Overrides that make ``tiny`` short."""
    return SMALL


@pytest.fixture(scope="session")
def pma() -> Callable[..., Answer]:
    """Run ``pma`` in a process of its own and return what it said."""

    def run(*arguments: str, seconds: int = COMMAND_SECONDS, env: dict[str, str] | None = None) -> Answer:
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", *arguments],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        return Answer(code=done.returncode, stdout=done.stdout, stderr=done.stderr)

    return run


@pytest.fixture(scope="session")
def start_pma() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start ``pma`` in the background; what is still running at the end is killed by pid."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, log: Path) -> subprocess.Popen[str]:
        with log.open("a") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipelines", *arguments],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                text=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def demo_run(pma: Callable[..., Answer], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished short demo: its run folder and its answer."""
    run = tmp_path_factory.mktemp("demo") / "run"
    answer = pma("demo", "--run", str(run), "--json", *SMALL)
    assert answer.code == 0, answer.stderr
    return run, answer.json


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of clients of a real S3 server on loopback; the bucket is ``runs``."""
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture
def port() -> int:
    """A free loopback port."""
    return free_port()
