"""Merges between a real S3 server and a folder: the same digests, resumed after a kill, nothing left half-uploaded."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints import SHAPE, write_checkpoints
from cluster.storage import open_store

MODEL = dataclasses.replace(SHAPE, num_layers=3, vocab_size=4_000)
COUNT = 3
PATIENCE_SECONDS = 60


@pytest.fixture(scope="module")
def local_inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_checkpoints(tmp_path_factory.mktemp("inputs"), COUNT, MODEL)


@pytest.fixture
def bucket(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return "s3://runs"


def upload(folder: str, url: str) -> str:
    source, target = open_store(folder), open_store(url)
    for key in source.keys(""):
        with target.create_stream(key) as out:
            out.write(source.read(key))
    return url


def unfinished_uploads(environment: dict[str, str]) -> list[Any]:
    import boto3

    client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
    found = client.list_multipart_uploads(Bucket="runs").get("Uploads", [])
    client.close()
    return list(found)


@pytest.mark.slow
def test_merge_on_s3_killed_resumed_verified_and_exported(
    pma: Callable[..., Any],
    start_pma: Callable[..., Any],
    local_inputs: list[str],
    bucket: str,
    s3_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    urls = [upload(url, f"{bucket}/merge-test/in{number}") for number, url in enumerate(local_inputs)]
    output = f"{bucket}/merge-test/out"
    local = pma("merge", "--json", "--output", str(tmp_path / "local"), "--inputs", *local_inputs)
    options = ("merge", "--json", "--output", output, "--workers", "local", "--inputs", *urls)
    process = start_pma(*options, log=tmp_path / "killed.log")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if any(key.startswith("receipts/task") for key in open_store(output).keys("")):
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    process.wait()
    done = pma(*options)
    assert done.code == 0, done.stderr
    assert done.json["digest"] == local.json["digest"]
    assert [row["digest"] for row in done.json["inputs"]] == [row["digest"] for row in local.json["inputs"]]
    assert process.returncode != -signal.SIGKILL or done.json["tasks_reused"] >= 1
    assert unfinished_uploads(s3_environment) == []
    checked = pma("verify", output, "--json")
    assert checked.code == 0, checked.stdout
    for number, kind in enumerate(("hf", "dcp")):
        exported = pma("export", output, "--output", f"{bucket}/merge-test/{kind}", "--format", kind, "--json")
        assert exported.code == 0, exported.stderr
        back = pma("export", f"{bucket}/merge-test/{kind}", "--output", str(tmp_path / str(number)), "--json")
        assert back.code == 0, back.stderr
        assert back.json["digest"] == local.json["digest"]
    assert unfinished_uploads(s3_environment) == []


@pytest.mark.slow
def test_merge_mixes_s3_and_local_inputs(
    pma: Callable[..., Any], local_inputs: list[str], bucket: str, tmp_path: Path
) -> None:
    there = upload(local_inputs[0], f"{bucket}/mixed/in0")
    mixed = pma("merge", "--json", "--output", str(tmp_path / "mixed"), "--inputs", there, *local_inputs[1:])
    assert mixed.code == 0, mixed.stderr
    local = pma("merge", "--json", "--output", f"{bucket}/mixed/out", "--workers", "2", "--inputs", *local_inputs)
    assert local.code == 0, local.stderr
    assert mixed.json["digest"] == local.json["digest"]
