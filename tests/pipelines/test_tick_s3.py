"""Ticks on object storage: few requests with nothing due, and the same merges as in a folder."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from cluster.storage_s3_client import client
from configs.merging import MergeConfig
from pipelines.status import status
from pipelines.tick import tick
from tasks.checkpoints.run_folder import RunFolder
from tests.retention_run import commit, make_run, small_config

MOST_REQUESTS = 20
SNAPSHOTS = 40


@pytest.fixture
def url(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    for key, value in s3_environment.items():
        monkeypatch.setenv(key, value)
    return f"s3://runs/{uuid.uuid4().hex}"


@pytest.fixture
def requests(url: str) -> Iterator[list[str]]:
    """What the S3 client asks for: operation and path."""
    sent: list[str] = []

    def note(request: object, **_: object) -> None:
        sent.append(f"{getattr(request, 'method', '')} {getattr(request, 'url', '')}")

    client().meta.events.register("before-send.s3", note)
    yield sent
    client().meta.events.unregister("before-send.s3", note)


def test_tick_with_nothing_due_reads_no_manifest_again(url: str, requests: list[str]) -> None:
    never = SNAPSHOTS * 1000
    make_run(url, range(1, SNAPSHOTS + 1), small_config(merge=MergeConfig(count=3, every_tokens=never, evaluate=False)))
    tick(url)
    requests.clear()
    assert tick(url)["merged"] == []
    assert len(requests) <= MOST_REQUESTS
    assert not any("manifest.json" in request for request in requests)


def test_tick_on_s3_makes_the_same_merges_as_in_a_folder(url: str, tmp_path: object) -> None:
    config = small_config(merge=MergeConfig(count=3, evaluate=False))
    remote, local = make_run(url, range(1, 5), config), make_run(f"{tmp_path}/run", range(1, 5), config)
    assert len(tick(remote.url)["merged"]) == len(tick(local.url)["merged"]) == 2
    commit(remote, 5)
    commit(local, 5)
    assert len(tick(remote.url)["merged"]) == len(tick(local.url)["merged"]) == 1
    digests = [{name: m.digest for name, m in RunFolder(store.url).merged().items()} for store in (remote, local)]
    assert digests[0] == digests[1]
    assert status(remote.url)["due"] == []
    assert [key for key in remote.keys("leases") if "merge" in key] == []
