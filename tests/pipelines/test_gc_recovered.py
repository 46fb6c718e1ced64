"""What a recovery left behind: merges of the old way give room to those of the new one, everywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Store
from configs.merging import MergeConfig, RetentionConfig
from configs.recovery import RecoveryConfig
from configs.schema import Config
from pipelines.compare import missing_comparisons
from pipelines.gc import gc
from pipelines.render import render_status
from pipelines.scheduled import due_now, make_merges, unevaluated
from pipelines.status import status
from tasks.checkpoints.recoveries import Recovery, write_recovery
from tasks.checkpoints.run_folder import RunFolder
from tasks.checkpoints.start_point import StartPoint
from tests.retention_run import BATCH, Clock, commit, make_run, small_config, snapshot_url

NO_RULE = RetentionConfig()
CONFIG = small_config(
    steps=7, merge=MergeConfig(count=2, keep_last=2, comparison_counts=(2,)), retention=RetentionConfig(keep_last=100)
)


def sma(step: int, recovery: int = 0) -> str:
    return f"sma-n2-v100-step-{step:09d}" + (f"-r{recovery:02d}" if recovery else "")


def in_this_thread(function: Callable[[Any], Any], tasks: Sequence[Any], is_lost: Callable[[], bool]) -> list[Any]:
    return [function(task) for task in tasks]


def merge_what_is_due(store: Store, config: Config) -> list[str]:
    run = RunFolder(store.url)
    return sorted(
        url.rpartition("/")[2] for url in make_merges(run, config, due_now(run, config), in_this_thread).merged
    )


def go_back(store: Store, number: int, step: int, url: str | None = None) -> None:
    start = StartPoint(url=url or snapshot_url(store, step), digest="d", step=step, tokens_seen=step * BATCH)
    write_recovery(
        store,
        Recovery(
            number=number, incident=number, attempt=1, policy="pma", start=start, count=1, onset_step=step + 1,
            alarm_step=step + 2, reason="loss is up", moments="merge", confirm_step=step + 3,
        ),
    )  # fmt: skip


@pytest.fixture
def recovered(tmp_path: Path) -> Store:
    """Trained to step 6 and merged, back to 3, and on to 5."""
    store = make_run(str(tmp_path / "run"), range(1, 7), CONFIG)
    all_rows = dataclasses.replace(CONFIG, merge=dataclasses.replace(CONFIG.merge, keep_last=None))
    assert merge_what_is_due(store, all_rows) == [sma(step) for step in range(2, 7)]
    go_back(store, 1, 3)
    for step in (4, 5):
        commit(store, step, recovery=1)
    assert merge_what_is_due(store, CONFIG) == [sma(4, 1), sma(5, 1)]
    return store


def deleted(store: Store, *overrides: str, now: float | None = None) -> list[str]:
    clock = Clock() if now is None else Clock(now)
    rows = gc(store.url, apply=False, overrides=overrides, clock=clock)["rows"]
    return [
        r["name"].removeprefix("merged/") for r in rows if r["action"] == "delete" and r["name"].startswith("merged/")
    ]


def test_keep_last_counts_living_merges_alone(recovered: Store) -> None:
    """By step alone 5 and 6 of the old way, or 5 twice, would be the newest two."""
    assert deleted(recovered) == [sma(2), sma(3), sma(4), sma(5), sma(6)]


def test_left_behind_merges_stay_as_evidence_while_no_rule_is_set_or_they_are_young(recovered: Store) -> None:
    assert deleted(recovered, "retention.keep_last=null") == [sma(2), sma(3)]
    created = min(m.created for m in RunFolder(recovered.url).all_merged().values())
    aged = ("retention.keep_hours=2",)
    assert deleted(recovered, *aged, now=created + 3600) == [sma(2), sma(3)]
    assert deleted(recovered, *aged, now=created + 3 * 3600) == [sma(2), sma(3), sma(4), sma(5), sma(6)]


def test_applied_the_new_way_keeps_its_merges_and_nothing_is_due(recovered: Store) -> None:
    gc(recovered.url, apply=True)
    assert recovered.folders("merged") == [sma(4, 1), sma(5, 1)]
    assert merge_what_is_due(recovered, CONFIG) == []


def test_start_of_a_recovery_stays_though_a_later_one_left_it_behind(recovered: Store) -> None:
    """The second start is a merge at step 4 of the new way; the third recovery goes back before it."""
    name = "recovery-0002-sma-n2-step-000000004"
    manifest = recovered.read(f"merged/{sma(4, 1)}/manifest.json")
    for key in recovered.keys(f"merged/{sma(4, 1)}"):
        recovered.put(key.replace(sma(4, 1), name), recovered.read(key))
    assert recovered.read(f"merged/{name}/manifest.json") == manifest
    go_back(recovered, 2, 4, f"{recovered.url}/merged/{name}")
    go_back(recovered, 3, 2)
    gone = deleted(recovered)
    assert name not in gone
    assert {sma(4, 1), sma(5, 1), sma(6)} <= set(gone)


def test_pinned_by_registration_a_left_behind_merge_stays_with_its_inputs(recovered: Store) -> None:
    digest = RunFolder(recovered.url).all_merged()[sma(6)].digest
    recovered.put("tracking/cursor.json", f'{{"sqlite:///x": {{"items": ["version/{digest}"]}}}}'.encode())
    rows = {row["name"]: row for row in gc(recovered.url, apply=False)["rows"]}
    assert rows[f"merged/{sma(6)}"]["reasons"] == ["registered model version"]
    assert rows["snapshots/step-000000005"]["reasons"] == [f"input of registered {sma(6)}"]


def test_every_reader_is_given_the_living_merges(recovered: Store) -> None:
    living, left = [sma(2), sma(3), sma(4, 1), sma(5, 1)], [sma(4), sma(5), sma(6)]
    run = RunFolder(recovered.url)
    look = run.look()
    assert sorted(run.merged()) == sorted(look.merged()) == living
    assert sorted(look.left_behind_merges()) == left
    assert sorted(run.all_merged()) == sorted(look.all_merged()) == sorted(living + left)
    assert not [url for url in unevaluated(run, CONFIG) if url.rpartition("/")[2] in left]
    answer = status(recovered.url)
    assert [row["name"] for row in answer["merged"]] == living
    assert [row["name"] for row in answer["left_behind_merges"]] == left
    assert "left behind by a recovery: snapshots 3, merged 3" in render_status(answer)


def test_comparison_on_the_new_way_does_not_take_the_old_way_for_it(recovered: Store) -> None:
    names = [merge.name for merge in missing_comparisons(RunFolder(recovered.url), CONFIG)]
    assert sma(5, 1) not in names  # Made by the schedule.
    assert names and all(name.endswith("-r01") for name in names)


def test_gc_keeps_what_a_spike_needs_until_the_run_is_at_its_end(tmp_path: Path) -> None:
    """Interval and batch are one step: margin 1/2, patience 8, one try of two: 20 - 8 - 1 - 1/2 = 10.5 steps."""
    rule = RecoveryConfig(count=2, max_attempts=1, patience_steps=8)
    config = small_config(steps=20, merge=MergeConfig(count=50), recovery=rule)
    store = make_run(str(tmp_path / "run"), range(1, 20), config)

    def kept(*overrides: str) -> list[int]:
        return [r["step"] for r in gc(store.url, apply=False, overrides=overrides)["rows"] if r["action"] == "keep"]

    assert kept() == list(range(8, 20))  # 19: the newest two up to 9.5, and all after.
    assert kept("recovery.policy=ignore") == [19]
    commit(store, 20)
    assert kept() == [20]
    run = RunFolder(store.url)
    number = run.open_segment(cause="start", start={"step": 0}, plan={})
    run.close_segment(number, reason="spike", step=20, alarm={})
    assert kept() == list(range(9, 21))
