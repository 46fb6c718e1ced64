"""``pma status``: what a run is doing, from its folder alone, once or as it happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.journal import write_event
from cluster.lease import Lease
from cluster.storage import Store
from configs.merging import MergeConfig
from pipelines.render import render_status
from pipelines.status import describe_news, follow, is_finished, status
from pipelines.tick import tick
from pipelines.wording import describe_event
from tasks.checkpoints.run_folder import RunFolder
from tests.retention_run import commit, make_run, small_config

CONFIG = small_config(steps=6, merge=MergeConfig(count=3, evaluate=False))


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return make_run(str(tmp_path / "run"), range(1, 5), CONFIG)


def test_status_shows_what_is_done_due_held_and_happened(run: Store) -> None:
    tick(run.url)
    commit(run, 5, healthy=False)
    commit(run, 6)
    lease = Lease(run, "run")
    lease.acquire()
    write_event(run, "worker-lost", {"attempt": 1, "message": "the node is gone"})
    answer = status(run.url)
    assert [(s["step"], s["healthy"]) for s in answer["snapshots"]][-2:] == [(5, False), (6, True)]
    assert [m["name"] for m in answer["merged"]] == ["sma-n3-v100-step-000000003", "sma-n3-v100-step-000000004"]
    assert answer["merged"][0]["inputs"] == [s["url"] for s in answer["snapshots"][:3]]
    assert answer["due"] == []
    (held,) = answer["leases"]
    assert held["name"] == "run" and "pid" in str(held["owner"])
    text = render_status(answer)
    assert "UNHEALTHY" in text and "worker-lost: attempt 1, message the node is gone" in text
    lease.release()


def test_status_names_the_merges_that_a_tick_would_make(run: Store) -> None:
    due = status(run.url)["due"]
    assert due == ["sma-n3-v100-step-000000003", "sma-n3-v100-step-000000004"]
    assert [url.rpartition("/")[2] for url in tick(run.url)["merged"]] == due


def test_follow_tells_every_change_until_the_run_is_done(run: Store) -> None:
    RunFolder(run.url).open_segment(cause="start", start={"step": 0}, plan={"startup_seconds": 1.0})
    changes = [
        lambda: commit(run, 5),
        lambda: write_event(run, "worker-lost", {"attempt": 1}),
        lambda: RunFolder(run.url).close_segment(1, reason="completed", step=6),
        lambda: commit(run, 6),
        lambda: tick(run.url),
    ]
    lines: list[str] = []

    class Clockwork:
        """Stands in for the event that ends following: something happens at every wait."""

        def wait(self, _: float) -> bool:
            if changes:
                changes.pop(0)()
            return False

    answer = follow(run.url, tell=lines.append, stop=Clockwork())  # type: ignore[arg-type]
    told = [line.split(" ", 1)[1] for line in lines]
    assert told == [
        "snapshot step 5 (stable)",
        "worker-lost: attempt 1",
        "segment 1 ended at step 6: completed",
        "snapshot step 6 (stable)",
        *(f"merged sma-n3-v100-step-{step:09d}" for step in (3, 4, 5, 6)),
    ]
    assert is_finished(answer)


def test_news_are_what_was_not_there_before() -> None:
    before: dict[str, Any] = {"snapshots": [], "merged": [], "leases": [], "segments": [], "events": []}
    segment = {"segment": 1, "cause": "start", "start": {"step": 0}, "end": None}
    now = {**before, "segments": [segment], "leases": [{"name": "run", "owner": "ann"}]}
    assert describe_news(before, now) == ["lease run taken by ann", "segment 1: start, from step 0"]
    assert describe_news(now, now) == []


def test_event_line_leaves_long_and_nested_fields_out() -> None:
    event = {"key": "k", "kind": "spike", "time": 1.0, "z": 3.14159, "nested": {"a": 1}, "step": 7}
    assert describe_event(event) == "spike: z 3.142, step 7"


def test_run_that_is_held_is_not_finished() -> None:
    done = {"snapshots": [{"step": 6}], "total_steps": 6, "due": [], "leases": []}
    assert is_finished(done)
    assert not is_finished({**done, "leases": [{"name": "run"}]})
    assert not is_finished({**done, "due": ["sma"]})
    assert not is_finished({**done, "total_steps": 7})
