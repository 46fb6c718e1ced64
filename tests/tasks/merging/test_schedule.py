"""The merge schedule: which merges of several rows are due, which are evaluated, which retention may take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from configs.errors import UserError
from configs.merging import MergeConfig, ScheduledMerge
from configs.schema import Config
from tasks.merging.schedule import (
    ScheduleRow,
    describe_schedule,
    due_merges,
    is_evaluated,
    kept_merges,
    schedule_of,
    scheduled_rule,
)
from tests.retention_run import BATCH, small_config


@dataclass(frozen=True)
class Point:
    """A snapshot, or the end of a merge."""

    step: int
    healthy: bool = True
    phase: str | None = "stable"
    ephemeral: bool = False
    recovery: int = 0

    @property
    def tokens_seen(self) -> int:
        return self.step * BATCH


TEN = [Point(step) for step in range(1, 11)]


def config_with(*rows: ScheduledMerge, **first: object) -> Config:
    return small_config(merge=MergeConfig(count=3, schedule=rows, **first))  # type: ignore[arg-type]


def names(rows: list[ScheduleRow], done: tuple[str, ...] = (), points: list[Point] = TEN) -> list[str]:
    return [merge.name for merge in due_merges(points, rows, done)]


def test_first_row_is_that_of_the_merge_section() -> None:
    config = config_with(evaluate=False, keep_last=4, every_tokens=500)
    (row,) = schedule_of(config)
    assert row == ScheduleRow(rule=scheduled_rule(config), evaluate=False, keep_last=4, every_tokens=500)


def test_due_merges_of_all_rows_come_oldest_first() -> None:
    rows = schedule_of(config_with(ScheduledMerge(method="wma", count=9)))
    due = due_merges(TEN, rows, ())
    assert [merge.window[-1].step for merge in due] == [3, 4, 5, 6, 7, 8, 9, 9, 10, 10]
    assert [merge.name.split("-")[0] for merge in due[-4:]] == ["sma", "wma", "sma", "wma"]
    assert [point.step for point in due[-1].window] == list(range(2, 11))


def test_row_without_an_interval_takes_every_snapshot_and_one_with_takes_its_own() -> None:
    rows = schedule_of(
        config_with(ScheduledMerge(method="wma", count=2), ScheduledMerge(method="wma", count=2, interval_tokens=300))
    )
    windows = {merge.name: [point.step for point in merge.window] for merge in due_merges(TEN, rows[1:], ())}
    assert windows["wma-n2-v100-step-000000010"] == [9, 10]
    assert windows["wma-n2-v300-step-000000010"] == [7, 10]


def test_every_tokens_leaves_the_ends_between_out() -> None:
    rows = schedule_of(config_with(every_tokens=400))
    assert names(rows) == ["sma-n3-v100-step-000000004", "sma-n3-v100-step-000000008"]


def test_done_merges_are_not_due() -> None:
    rows = schedule_of(config_with())
    done = tuple(names(rows)[:-2])
    assert names(rows, done) == ["sma-n3-v100-step-000000009", "sma-n3-v100-step-000000010"]


def test_merges_that_retention_would_take_at_once_are_never_due_again() -> None:
    rows = schedule_of(config_with(keep_last=2))
    made = tuple(names(rows))
    assert made == ("sma-n3-v100-step-000000009", "sma-n3-v100-step-000000010")
    later = [*TEN, Point(11)]
    assert names(rows, made, later) == ["sma-n3-v100-step-000000011"]
    assert names(rows, (*made[1:], "sma-n3-v100-step-000000011"), later) == []


def test_windows_over_a_spike_or_a_phase_are_not_due() -> None:
    points = [replace(p, healthy=p.step != 4, phase="warmup" if p.step < 2 else "stable") for p in TEN]
    rows = schedule_of(config_with())
    assert names(rows, points=points)[0] == "sma-n3-v100-step-000000007"


def test_rows_that_are_shortened_to_the_same_merge_make_it_once() -> None:
    rows = schedule_of(config_with(ScheduledMerge(method="sma", count=8), max_span_fraction=0.2))
    due = due_merges(TEN, rows, ())
    assert [merge.name for merge in due] == sorted({merge.name for merge in due}, key=lambda name: int(name[-9:]))
    assert {len(merge.window) for merge in due} == {2, 3}


def test_same_row_twice_is_refused() -> None:
    with pytest.raises(UserError, match="sma-n3-v100"):
        schedule_of(config_with(ScheduledMerge(method="sma", count=3)))


def test_evaluated_are_rows_that_ask_for_it_and_merges_by_hand() -> None:
    rows = schedule_of(config_with(ScheduledMerge(method="wma", count=4, evaluate=False)))
    assert is_evaluated("sma-n3-v100-step-000000010", TEN[-1], rows)
    assert not is_evaluated("wma-n4-v100-step-000000010", TEN[-1], rows)
    assert is_evaluated("wma-n5-v100-step-000000010", TEN[-1], rows)


def test_kept_are_the_newest_of_a_row_and_all_by_hand() -> None:
    rows = schedule_of(config_with(ScheduledMerge(method="wma", count=2), keep_last=2))
    merged = [(f"sma-n3-v100-step-{p.step:09d}", p) for p in reversed(TEN[2:])]
    merged += [("wma-n2-v100-step-000000005", TEN[4]), ("by-hand", TEN[3])]
    assert kept_merges(merged, rows) == {
        "sma-n3-v100-step-000000009", "sma-n3-v100-step-000000010", "wma-n2-v100-step-000000005", "by-hand",
    }  # fmt: skip


def test_nothing_due_is_explained_with_what_is_there() -> None:
    rows = schedule_of(config_with())
    assert "1 snapshots: steps 1; the schedule makes sma of 3 every 100 tokens" in describe_schedule(TEN[:1], rows)
    assert "every complete window up to step 10 is merged" in describe_schedule(TEN, rows)
