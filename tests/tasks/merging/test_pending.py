"""What the schedule still needs, against asking every future moment what is due."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from tasks.merging.pending import reasons_of_windows
from tasks.merging.schedule import ScheduleRow, due_merges
from tasks.merging.selection import WindowRule

INTERVAL = 10
TOTAL = 600


@dataclass(frozen=True)
class At:
    """A snapshot."""

    step: int
    healthy: bool = True
    phase: str | None = "stable"
    ephemeral: bool = False
    recovery: int = 0

    @property
    def tokens_seen(self) -> int:
        return self.step * INTERVAL

    @property
    def url(self) -> str:
        return f"/run/snapshots/step-{self.step:09d}"


def row(count: int, spacing: int = 1, *, every: int | None = None, fraction: float | None = None) -> ScheduleRow:
    rule = WindowRule(
        method="sma", count=count, interval_tokens=spacing * INTERVAL, alpha=None, max_span_fraction=fraction
    )
    return ScheduleRow(rule=rule, every_tokens=None if every is None else every * INTERVAL)


ROWS = {
    "every snapshot": [row(3)],
    "sparse": [row(4, 3)],
    "ends now and then": [row(3, 2, every=6)],
    "two rows": [row(2), row(5, 2, every=4)],
    "short early": [row(6, fraction=0.2)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("now", [1, 2, 7, 20, 58, 59, 60])
def test_needed_is_what_some_later_moment_asks_for(rows: list[ScheduleRow], now: int) -> None:
    """Everything that is due up to now was made; what any window takes that becomes due later is needed, and no more."""
    all_snapshots = [At(step) for step in range(1, TOTAL // INTERVAL + 1)]
    made = {merge.name for merge in due_merges(all_snapshots[:now], rows, ())}
    later = [merge for merge in due_merges(all_snapshots, rows, ()) if merge.name not in made]
    asked = {s.url for merge in later for s in merge.window if s.step <= now}
    needed = reasons_of_windows(all_snapshots[:now], rows, made, last_tokens=TOTAL)
    assert {f"/run/{folder}" for folder in needed} == asked


def test_due_windows_are_needed_whole() -> None:
    snapshots = [At(step) for step in range(1, 8)]
    needed = reasons_of_windows(snapshots, [row(3)], {"sma-n3-v10-step-000000005"}, last_tokens=70)
    assert "sma-n3-v10-step-000000003 is due" in needed["snapshots/step-000000001"]
    assert len(needed) == 7
    assert not any("step-000000005 is due" in why for reasons in needed.values() for why in reasons)


def test_end_of_the_run_is_unknown_the_last_windows_stay() -> None:
    snapshots = [At(step) for step in range(1, 8)]
    made = {merge.name for merge in due_merges(snapshots, [row(3)], ())}
    assert not reasons_of_windows(snapshots, [row(3)], made, last_tokens=70)
    needed = reasons_of_windows(snapshots, [row(3)], made, last_tokens=None)
    assert sorted(needed) == ["snapshots/step-000000006", "snapshots/step-000000007"]


def test_sick_snapshots_stay_though_no_window_takes_them_now() -> None:
    snapshots = [At(1), At(2), dataclasses.replace(At(3), healthy=False), At(4)]
    assert "snapshots/step-000000003" in reasons_of_windows(snapshots, [row(3)], set(), last_tokens=None)


def test_no_snapshots_need_nothing() -> None:
    assert reasons_of_windows([], [row(3)], set(), last_tokens=None) == {}


def test_ephemeral_snapshots_are_needed_by_no_window() -> None:
    snapshots = [At(1), At(2), dataclasses.replace(At(3), ephemeral=True)]
    assert "snapshots/step-000000003" not in reasons_of_windows(snapshots, [row(3)], (), last_tokens=TOTAL)
