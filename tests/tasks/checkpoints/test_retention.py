"""What stays and what goes, from what a run holds: pure, row by row."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
from retention_run import BATCH, HOUR, NOW

from configs.errors import ConfigError
from configs.merging import RetentionConfig
from tasks.checkpoints.catalog import Glance
from tasks.checkpoints.retention import (
    Holdings,
    RetentionPlan,
    join_reasons,
    plan_retention,
    reasons_of_health,
    reasons_of_registered,
    reasons_of_segments,
    reasons_of_starts,
)
from tasks.checkpoints.start_point import StartPoint

LAST = RetentionConfig(keep_last=1)


def glance(step: int, *, healthy: bool = True, kind: str = "training", created: float = NOW, **fields: Any) -> Glance:
    return Glance(
        **{
            "url": f"/run/snapshots/step-{step:09d}", "kind": kind, "step": step, "tokens_seen": step * BATCH,
            "digest": f"digest {step}", "healthy": healthy, "phase": "stable", "bytes": 10, "created": created, **fields,
        }
    )  # fmt: skip


def merge(name: str, step: int, *inputs: int) -> Glance:
    urls = tuple(f"/run/snapshots/step-{i:09d}" for i in inputs)
    return glance(step, kind="merged", url=f"/run/merged/{name}", digest=name, method="sma", inputs=urls)


def plan(policy: RetentionConfig, *snapshots: Glance, now: float = NOW, **fields: Any) -> RetentionPlan:
    held = Holdings(**{"snapshots": snapshots, "merged": {}, "needed": {}, "surplus": (), **fields})
    return plan_retention(held, policy, interval_tokens=BATCH, now=now)


def kept(made: RetentionPlan) -> list[int | None]:
    return [row.step for row in made.rows if row.action == "keep"]


TEN = [glance(step) for step in range(1, 11)]


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        ({}, list(range(1, 11))),
        ({"milestones": (3,)}, list(range(1, 11))),
        ({"keep_last": 3}, [8, 9, 10]),
        ({"keep_last": 100}, list(range(1, 11))),
        ({"keep_every": 4}, [4, 8, 10]),
        ({"keep_last": 2, "keep_every": 5}, [5, 9, 10]),
        ({"keep_last": 1, "milestones": (3, 99)}, [3, 10]),
        ({"keep_last": 1, "milestones": (0,)}, [10]),
    ],
)
def test_plan_keeps_what_a_rule_keeps_and_the_newest(policy: dict[str, Any], steps: list[int]) -> None:
    assert kept(plan(RetentionConfig(**policy), *TEN)) == steps


def test_plan_keep_hours_counts_from_the_commit() -> None:
    aged = [glance(step, created=NOW - (10 - step) * HOUR) for step in range(1, 11)]
    assert kept(plan(RetentionConfig(keep_hours=2.5), *aged)) == [8, 9, 10]
    assert kept(plan(RetentionConfig(keep_hours=2.0), *aged)) == [9, 10]


def test_plan_keep_every_is_stable_under_deletion() -> None:
    policy = RetentionConfig(keep_every=3)
    left = list(TEN)
    for _ in range(4):
        made = plan(policy, *left)
        left = [snapshot for snapshot in left if snapshot.step in kept(made)]
        assert [snapshot.step for snapshot in left] == [3, 6, 9, 10]


def test_plan_what_is_needed_stays_and_says_why() -> None:
    made = plan(LAST, *TEN, needed={"snapshots/step-000000004": ["pinned by me"]})
    assert kept(made) == [4, 10]
    assert made.rows[3].reasons == ("pinned by me",)
    assert made.rows[0].reasons == ("no rule keeps it",)


def test_plan_adopted_stays_and_frees_nothing() -> None:
    made = plan(LAST, *[dataclasses.replace(snapshot, kind="adopted") for snapshot in TEN])
    assert kept(made) == list(range(1, 11))
    assert {row.bytes for row in made.rows} == {0}


def test_plan_empty_run() -> None:
    assert plan(LAST).rows == ()


def test_plan_prints_as_json() -> None:
    assert json.loads(json.dumps(plan(LAST, *TEN).describe()))[0]["action"] == "delete"


# Merges


def test_plan_merges_stay_unless_the_schedule_gives_them_away() -> None:
    merged = {name: merge(name, 5, 1, 2) for name in ("a", "b", "c")}
    made = plan(LAST, *TEN, merged=merged, surplus={"b", "c"}, needed={"merged/c": ["pinned by me"]})
    assert [(r.name, r.action) for r in made.rows[10:]] == [
        ("merged/a", "keep"), ("merged/b", "delete"), ("merged/c", "keep"),
    ]  # fmt: skip


def test_plan_without_retention_rules_surplus_merges_go_and_snapshots_stay() -> None:
    made = plan(RetentionConfig(), *TEN, merged={"a": merge("a", 5)}, surplus={"a"})
    assert [row.name for row in made.doomed] == ["merged/a"]


# Health


def test_health_newest_stays_sick_or_not_and_the_newest_healthy_one() -> None:
    snapshots = [glance(step, healthy=step < 5) for step in range(1, 7)]
    assert kept(plan(LAST, *snapshots)) == [2, 3, 4, 6]


def test_health_last_spike_keeps_what_recovery_merges() -> None:
    sick = {4, 12, 13}
    snapshots = [glance(step, healthy=step not in sick) for step in range(1, 21)]
    found = reasons_of_health(snapshots)
    assert sorted(name for name, why in found.items() if "healthy before the last spike" in why) == [
        f"snapshots/step-{step:09d}" for step in (9, 10, 11)
    ]


def test_health_spike_at_the_very_start() -> None:
    assert kept(plan(LAST, glance(1, healthy=False), glance(2))) == [2]


# Branches, segments, registered versions


def test_starts_by_url_or_in_a_moved_run_by_step_and_digest() -> None:
    by_url = StartPoint(url=TEN[2].url, digest="?", step=3, tokens_seen=300)
    moved = StartPoint(url="/elsewhere/snapshots/step-000000005", digest="digest 5", step=5, tokens_seen=500)
    other = StartPoint(url="/elsewhere/snapshots/step-000000006", digest="another", step=6, tokens_seen=600)
    holdings = [(f"snapshots/step-{s.step:09d}", s) for s in TEN]
    found = reasons_of_starts({"a": by_url, "b": moved, "c": other}, holdings)
    assert found == {
        "snapshots/step-000000003": ["start of branch a"],
        "snapshots/step-000000005": ["start of branch b"],
    }


def test_segments_open_ones_keep_their_start() -> None:
    segments = [
        {"segment": 1, "start": {"step": 2}, "end": {"reason": "done"}},
        {"segment": 2, "start": {"step": 7}, "end": None},
    ]
    assert reasons_of_segments(segments, TEN) == {"snapshots/step-000000007": ["start of open segment 2"]}


def test_registered_merges_stay_with_their_inputs() -> None:
    merges = {"a": merge("a", 3, 2, 3), "b": merge("b", 6, 5, 6)}
    holdings = [(f"snapshots/step-{s.step:09d}", s) for s in TEN] + [(f"merged/{n}", m) for n, m in merges.items()]
    needed = reasons_of_registered({"a"}, merges.values(), holdings)
    assert kept(plan(LAST, *TEN, merged=merges, surplus={"a", "b"}, needed=needed)) == [2, 3, 10, 3]
    assert needed["merged/a"] == ["registered model version"]
    assert needed["snapshots/step-000000002"] == ["input of registered a"]


def test_registered_inputs_are_found_in_a_run_that_was_moved() -> None:
    moved = dataclasses.replace(merge("a", 3), inputs=("/old/place/snapshots/step-000000002",))
    assert reasons_of_registered({"a"}, [moved], [("snapshots/step-000000002", TEN[1])])


def test_join_reasons_each_once() -> None:
    assert join_reasons({"a": ["x"]}, {"a": ["y", "x"], "b": ["z"]}) == {"a": ["x", "y"], "b": ["z"]}


def test_plan_never_gives_up_what_is_needed_whatever_the_policy() -> None:
    chance = random.Random(20261121)
    for _ in range(300):
        snapshots = [
            glance(s, healthy=chance.random() < 0.9, created=NOW - 99 * HOUR) for s in range(1, chance.randint(2, 30))
        ]
        policy = RetentionConfig(
            keep_last=chance.choice([None, 1, 3]), keep_every=chance.choice([None, 2, 7]),
            keep_hours=chance.choice([None, 1.0]), milestones=tuple(chance.sample(range(30), 2)),
        )  # fmt: skip
        needed = {f"snapshots/step-{s.step:09d}": ["needed"] for s in snapshots if chance.random() < 0.2}
        made = plan(policy, *snapshots, needed=needed)
        gone = {row.name for row in made.doomed}
        assert not gone & needed.keys()
        assert f"snapshots/step-{snapshots[-1].step:09d}" not in gone
        assert not {s.step for s in snapshots if f"snapshots/step-{s.step:09d}" in gone} & set(policy.milestones)
        assert policy.is_set or not gone
        assert all(row.reasons for row in made.rows)


@pytest.mark.parametrize(
    "fields",
    [{"keep_last": 0}, {"keep_every": -1}, {"keep_hours": 0.0}, {"keep_hours": float("inf")}, {"milestones": (-1,)}],
)
def test_config_impossible_values_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"retention.{next(iter(fields))}"):
        RetentionConfig(**fields)


# Ephemeral snapshots


@pytest.mark.parametrize("policy", [{}, {"keep_last": 2}, {"keep_hours": 1.0}, {"milestones": (3, 8)}])
def test_ephemeral_goes_once_a_later_one_is_committed_whatever_the_rules(policy: dict[str, Any]) -> None:
    snapshots = [glance(step, ephemeral=step in {3, 7, 8, 10}) for step in range(1, 11)]
    made = plan(RetentionConfig(**policy), *snapshots)
    assert {row.step for row in made.doomed} >= {3, 7, 8}
    assert 10 in kept(made)
    assert {row.reasons for row in made.rows if row.step in {3, 7, 8}} == {
        ("ephemeral, and a later snapshot is committed",)
    }


def test_ephemeral_is_not_one_of_the_last() -> None:
    snapshots = [glance(step, ephemeral=step in {8, 10}) for step in range(1, 11)]
    assert kept(plan(RetentionConfig(keep_last=2), *snapshots)) == [7, 9, 10]


def test_ephemeral_that_is_needed_stays() -> None:
    snapshots = [glance(1), glance(2, ephemeral=True), glance(3)]
    made = plan(RetentionConfig(), *snapshots, needed={"snapshots/step-000000002": ["start of open segment 2"]})
    assert kept(made) == [1, 2, 3]


def test_ephemeral_is_not_what_recovery_merges() -> None:
    snapshots = [glance(s, ephemeral=s in {3, 5}, healthy=s not in {5, 7}) for s in range(1, 10)]
    found = reasons_of_health(snapshots)
    assert {name for name, why in found.items() if "healthy before the last spike" in why} == {
        f"snapshots/step-{step:09d}" for step in (2, 4, 6)
    }


def test_ephemeral_left_behind_by_a_recovery_goes_without_any_rule() -> None:
    made = plan(RetentionConfig(), glance(1), left_behind=(glance(5, ephemeral=True), glance(6)))
    assert {row.step: row.action for row in made.rows} == {1: "keep", 5: "delete", 6: "keep"}
