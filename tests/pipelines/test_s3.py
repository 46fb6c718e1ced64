"""The same run on object storage: an S3 server on loopback instead of a folder."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from tasks.checkpoints.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_pretrain_and_merge_on_s3_give_the_same_digests_as_in_a_folder(
    demo_run: tuple[Path, dict[str, Any]],
    pma: Callable[..., Any],
    small: tuple[str, ...],
    s3_environment: dict[str, str],
) -> None:
    url = f"s3://runs/{uuid.uuid4().hex}"
    short = ("training.total_tokens=204800", "anneal.tokens=51200")
    answer = pma("pretrain", "--config", "tiny", "--run", url, "--json", *small, *short, env=s3_environment)
    assert answer.code == 0, answer.stderr
    assert "tracking.uri is not set" in answer.stderr

    status = pma("status", "--run", url, "--json", env=s3_environment).json
    local = RunFolder(str(demo_run[0]))
    expected = {s.step: s.manifest.digest for s in local.snapshots()}
    assert {row["step"]: row["digest"] for row in status["snapshots"]} == {s: expected[s] for s in (25, 50, 75, 100)}
    merged = {name: manifest.digest for name, manifest in local.merged().items()}
    assert {row["name"]: row["digest"] for row in status["merged"]} == {
        name: merged[name] for name in ("sma-n3-v51200-step-000000075", "sma-n3-v51200-step-000000100")
    }

    again = pma(
        "merge",
        "--run",
        url,
        "--count",
        "3",
        "--output",
        f"{url}/by-hand",
        "--json",
        "--workers",
        "2",
        env=s3_environment,
    )
    assert again.code == 0, again.stderr
    assert again.json["digest"] == merged["sma-n3-v51200-step-000000100"]
    client = boto3.client("s3", **credentials(s3_environment))
    assert not client.list_multipart_uploads(Bucket="runs").get("Uploads")
    client.close()


def credentials(environment: dict[str, str]) -> dict[str, str]:
    return {
        "endpoint_url": environment["AWS_ENDPOINT_URL"],
        "aws_access_key_id": environment["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": environment["AWS_SECRET_ACCESS_KEY"],
        "region_name": environment["AWS_DEFAULT_REGION"],
    }
