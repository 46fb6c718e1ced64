"""Ticks: what is due, once each, whoever asks, how often and after how long."""

from __future__ import annotations

import concurrent.futures
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import LeaseHeld, StorageError
from cluster.journal import read_events
from cluster.lease import Lease
from cluster.storage import Store
from configs.errors import UserError
from configs.merging import MergeConfig, ScheduledMerge
from configs.schema import Config
from pipelines.tick import describe_round, is_complete, tick, watch
from tasks.checkpoints.manifest import MANIFEST_KEY, read_manifest
from tasks.checkpoints.run_folder import RunFolder, snapshot_key
from tests.retention_run import commit, make_run, small_config

CONFIG = small_config(merge=MergeConfig(count=3, evaluate=False))
ROUNDS = 100


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Store]:
    def make(num_snapshots: int, config: Config = CONFIG) -> Store:
        return make_run(str(tmp_path / "run"), range(1, num_snapshots + 1), config)

    return make


def merged_names(store: Store) -> list[str]:
    return [name for name in store.folders("merged") if store.exists(f"merged/{name}/{MANIFEST_KEY}")]


def sma(step: int) -> str:
    return f"sma-n3-v100-step-{step:09d}"


def test_tick_merges_what_is_due_and_the_next_one_nothing(run: Callable[..., Store]) -> None:
    store = run(5)
    answer = tick(store.url)
    assert answer["merged"] == [f"{store.url}/merged/{sma(step)}" for step in (3, 4, 5)]
    assert answer["skipped"] is None
    again = tick(store.url)
    assert again["merged"] == []
    assert "every complete window up to step 5 is merged" in again["skipped"]


def test_tick_merges_the_mean_of_its_window(run: Callable[..., Store]) -> None:
    """The weights of the snapshot at step s are s, s + 1, ...: their mean over steps 3, 4, 5 is that of step 4."""
    store = run(5)
    tick(store.url)
    manifest, _ = read_manifest(store.child(f"merged/{sma(5)}"))
    expected, _ = read_manifest(store.child(snapshot_key(4)))
    assert manifest.digest == expected.digest


def test_tick_catches_up_after_downtime(run: Callable[..., Store]) -> None:
    store = run(3)
    tick(store.url)
    for step in range(4, 9):
        commit(store, step)
    assert [url.rpartition("/")[2] for url in tick(store.url)["merged"]] == [sma(step) for step in range(4, 9)]


def test_tick_with_too_few_snapshots_says_what_it_waits_for(run: Callable[..., Store]) -> None:
    assert "1 snapshots: steps 1" in tick(run(1).url)["skipped"]


def test_tick_makes_every_row_of_the_schedule(run: Callable[..., Store]) -> None:
    rows = (ScheduledMerge(method="wma", count=2, every_tokens=200, evaluate=False),)
    store = run(4, replace(CONFIG, merge=replace(CONFIG.merge, schedule=rows)))
    tick(store.url)
    assert merged_names(store) == [sma(3), sma(4), "wma-n2-v100-step-000000002", "wma-n2-v100-step-000000004"]


def test_tick_takes_overrides_of_how_and_refuses_those_of_what(run: Callable[..., Store]) -> None:
    store = run(4)
    rows = "merge.schedule=[{method: ema, alpha: 0.5, count: 4, evaluate: false}]"
    assert "ema0.5-n4-v100-step-000000004" in " ".join(tick(store.url, overrides=(rows,))["merged"])
    with pytest.raises(UserError, match=r"merge\.count=4 differs from the run's 3"):
        tick(store.url, overrides=("merge.count=4",))


def test_tick_on_no_run_and_with_wrong_workers_names_the_mistake(run: Callable[..., Store], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        tick(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="--workers '0'"):
        tick(run(3).url, workers="0")


def test_merge_that_another_driver_is_making_is_left_to_it(run: Callable[..., Store]) -> None:
    store = run(4)
    other = Lease(store, f"merge-{sma(3)}")
    other.acquire()
    answer = tick(store.url)
    assert answer["merged"] == [f"{store.url}/merged/{sma(4)}"]
    assert "is being worked on by" in answer["skipped"]
    with pytest.raises(LeaseHeld, match="is being worked on by"):
        tick(store.url)
    other.release()
    assert tick(store.url)["merged"] == [f"{store.url}/merged/{sma(3)}"]


def test_merge_whose_maker_died_is_taken_over_and_finished(run: Callable[..., Store]) -> None:
    store = run(3)
    dead = Lease(store, f"merge-{sma(3)}", clock=lambda: time.time() - 3600)
    dead.acquire()
    store.put(f"merged/{sma(3)}/receipts/attempt", b"of a merge that never ended")
    assert tick(store.url)["merged"] == [f"{store.url}/merged/{sma(3)}"]


def test_damaged_snapshot_fails_the_merges_that_read_it_and_no_others(run: Callable[..., Store]) -> None:
    store = run(6)
    key = next(key for key in store.keys(snapshot_key(2)) if key.endswith("00002-of-00002.safetensors"))
    store.put(key, store.read(key)[:-4])
    answer = tick(store.url)
    assert answer["ok"] is False
    assert [row["name"] for row in answer["failed"]] == [sma(3), sma(4)]
    assert all(key in row["reason"] for row in answer["failed"])
    assert merged_names(store) == [sma(5), sma(6)]


def test_merges_leave_no_lease_behind(run: Callable[..., Store]) -> None:
    store = run(6)
    tick(store.url)
    assert [key for key in store.keys("leases") if "merge-" in key and not key.endswith(".part")] == []


def test_hundred_double_ticks_make_each_merge_once(run: Callable[..., Store]) -> None:
    store = run(2)
    draw = random.Random(1)
    made: list[str] = []

    def delayed(seconds: float) -> list[str]:
        time.sleep(seconds)
        try:
            return list(tick(store.url)["merged"])
        except LeaseHeld:
            return []

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for step in range(3, 3 + ROUNDS):
            ticks = [pool.submit(delayed, draw.uniform(0, 0.02)) for _ in range(2)]
            commits = [pool.submit(commit, store, step)]
            made += [url for future in ticks for url in future.result()]
            commits[0].result()
    made += tick(store.url)["merged"]
    expected = [sma(step) for step in range(3, 3 + ROUNDS)]
    assert Counter(url.rpartition("/")[2] for url in made) == Counter(expected)
    assert merged_names(store) == expected
    told = Counter(str(event["name"]) for event in read_events(store) if event["kind"] == "merge")
    assert told == Counter(expected)


def test_two_tick_processes_at_once_share_the_work(run: Callable[..., Store]) -> None:
    store = run(12)
    command = [sys.executable, "-m", "pipelines", "tick", "--run", store.url, "--json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [(process.communicate()[0], process.returncode) for process in both]
    assert {code for _, code in outputs} <= {0, 75}
    made = [url for text, code in outputs if code == 0 for url in json.loads(text)["merged"]]
    assert Counter(url.rpartition("/")[2] for url in made) == Counter(sma(step) for step in range(3, 13))


def test_watch_ticks_until_the_run_is_done(run: Callable[..., Store]) -> None:
    config = replace(small_config(steps=5, merge=MergeConfig(count=3, evaluate=False)))
    store = run(3, config)
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if len(lines) < 3:
            commit(store, 3 + len(lines))

    answer = watch(store.url, every_seconds=0.01, until_done=True, tell=tell)
    assert [url.rpartition("/")[2] for url in answer["merged"]] == [sma(3), sma(4), sma(5)]
    assert answer["rounds"] == len(lines) == 4
    assert lines[0] == f"round 1: merged {sma(3)}"
    assert is_complete(store.url)


def test_watch_goes_on_where_storage_fails(run: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    store = run(3)
    stop = threading.Event()
    lines: list[str] = []
    answers: list[Any] = [StorageError("the bucket is away"), LeaseHeld("someone is at it"), None]
    real = tick

    def faulty(*args: Any, **options: Any) -> dict[str, Any]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        stop.set()
        return real(*args, **options)

    monkeypatch.setattr("pipelines.tick.tick", faulty)
    watch(store.url, every_seconds=0.01, tell=lines.append, stop=stop)
    assert lines[:2] == ["round 1: the bucket is away", "round 2: someone is at it"]
    assert merged_names(store) == [sma(3)]


def test_round_is_told_in_one_line() -> None:
    answer = {
        "merged": ["run/merged/a"],
        "failed": [{"name": "b", "reason": "bad"}],
        "adopted": [{"step": 7}],
        "waiting": [{"url": "there", "reason": "too short"}],
        "skipped": None,
    }
    assert describe_round(2, answer) == "round 2: merged a; adopted step 7; FAILED b: bad; waiting for there: too short"


def test_tick_does_not_touch_the_snapshots(run: Callable[..., Store]) -> None:
    store = run(4)
    before = {key: store.read(key) for key in store.keys("snapshots")}
    tick(store.url)
    assert {key: store.read(key) for key in store.keys("snapshots")} == before
    assert [s.step for s in RunFolder(store.url).snapshots()] == [1, 2, 3, 4]
