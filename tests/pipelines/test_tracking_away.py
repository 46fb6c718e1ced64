"""An MLflow server that dies never stops a run, and is brought up to date once it is back."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_config
from pipelines.tracking import open_forwarder
from tasks.checkpoints.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE_SECONDS = 120


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A real MLflow server on loopback, with one worker and no job execution."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return server
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert server.poll() is None, "the MLflow server ended at start"
            time.sleep(0.3)
    raise AssertionError("the MLflow server did not answer")


def stop_server(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, 9)
    server.wait()


def test_run_survives_a_dead_mlflow_server_and_status_catches_up(
    pma: Callable[..., Any],
    start_pma: Callable[..., subprocess.Popen[str]],
    small: tuple[str, ...],
    tmp_path: Path,
    port: int,
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    server = start_server(tmp_path, port)
    uri = f"tracking.uri=http://127.0.0.1:{port}"
    process = start_pma("pretrain", "--config", "tiny", "--run", str(run), *small, uri, log=log)
    while len(list((run / "snapshots").glob("*/manifest.json"))) < 4:
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    stop_server(server)
    assert process.wait(timeout=PATIENCE_SECONDS) == 0, log.read_text()
    text = log.read_text()
    assert "The run goes on" in text
    assert "pma status" in text

    away = pma("status", "--run", str(run), "--json")
    assert away.code == 0
    assert away.json["tracking"]["lag"] > 0
    server = start_server(tmp_path, port)
    try:
        back = pma("status", "--run", str(run), "--json")
    finally:
        stop_server(server)
    assert back.json["tracking"]["lag"] == 0, back.json["tracking"]
    with sqlite3.connect(tmp_path / "server.db") as db:
        steps = db.execute("select count(distinct step) from metrics where key = 'train/loss'").fetchone()[0]
    assert steps == 400


def test_lag_counts_everything_when_nothing_was_ever_sent(
    demo_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = RunFolder(str(demo_run[0]))
    config = load_config("tiny", ("tracking.uri=http://127.0.0.1:9",)).config
    forwarder = open_forwarder(run, config)
    assert forwarder is not None
    assert forwarder.lag() > len(run.snapshots())
