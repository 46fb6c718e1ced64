"""Windows: the snapshots that one merge averages, by tokens, of one healthy phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from configs.errors import UserError
from tasks.checkpoints.manifest import Manifest
from tasks.checkpoints.run_folder import Snapshot
from tasks.merging.selection import WindowRule, describe_steps, due_windows, select_window

BATCH_TOKENS = 100


def snapshot(step: int, **fields: Any) -> Snapshot:
    manifest = Manifest(
        **{
            "kind": "training", "step": step, "tokens_seen": step * BATCH_TOKENS, "digest": f"d{step}",
            "state_digest": None, "shards": (), "files": (), "parameter_groups": {}, "phase": "stable", **fields,
        }
    )  # fmt: skip
    return Snapshot(step=step, url=f"/run/snapshots/step-{step:09d}", manifest=manifest)


def rule(count: int, interval_tokens: int = 1000, method: str = "sma", alpha: float | None = None) -> WindowRule:
    return WindowRule(method=method, count=count, interval_tokens=interval_tokens, alpha=alpha)


def steps(window: Sequence[Snapshot]) -> list[int]:
    return [item.step for item in window]


EVERY_TEN = [snapshot(step) for step in range(10, 110, 10)]

# Selection


@pytest.mark.parametrize(
    ("count", "interval_tokens", "end", "expected"),
    [
        (3, 1000, None, [80, 90, 100]),
        (10, 1000, None, list(range(10, 110, 10))),
        (1, 1000, None, [100]),
        (3, 2000, None, [60, 80, 100]),
        (3, 4000, 90, [10, 50, 90]),
        (2, 1000, 20, [10, 20]),
    ],
)
def test_select_window_by_count_interval_and_end(
    count: int, interval_tokens: int, end: int | None, expected: list[int]
) -> None:
    assert steps(select_window(EVERY_TEN, rule(count, interval_tokens), end)) == expected


def test_select_window_goes_by_tokens_not_by_neighbours() -> None:
    # The last step of a run is published off the grid; so is a snapshot by hand.
    found = select_window([*EVERY_TEN, snapshot(107)], rule(3), 100)
    assert steps(found) == [80, 90, 100]
    with pytest.raises(UserError, match="9700"):
        select_window([*EVERY_TEN, snapshot(107)], rule(2))


def test_select_window_missing_snapshots_are_named_with_those_that_exist() -> None:
    gap = [item for item in EVERY_TEN if item.step not in (70, 90)]
    with pytest.raises(UserError) as caught:
        select_window(gap, rule(5))
    message = str(caught.value)
    assert "a window of 5 snapshots every 1000 tokens that ends at step 100" in message
    assert "7000, 9000 tokens, which do not exist" in message
    assert "8 snapshots: steps 10, 20, 30, 40, 50, 60, 80, 100" in message


@pytest.mark.parametrize(
    ("count", "interval_tokens", "fits"), [(11, 1000, 10), (100, 1000, 10), (3, 5000, 2), (2, 10_000, 1)]
)
def test_select_window_longer_than_the_run_refused_with_what_fits(count: int, interval_tokens: int, fits: int) -> None:
    with pytest.raises(UserError, match=f"at most {fits} do; there are 10 snapshots: steps 10, 20"):
        select_window(EVERY_TEN, rule(count, interval_tokens))
    select_window(EVERY_TEN, rule(fits, interval_tokens))


def test_select_window_interval_that_does_not_match_the_spacing_refused() -> None:
    with pytest.raises(UserError, match="8500 tokens, which do not exist; there are 10 snapshots"):
        select_window(EVERY_TEN, rule(2, 1500))


@pytest.mark.parametrize("count", [0, -1])
def test_select_window_count_below_one_refused(count: int) -> None:
    with pytest.raises(UserError):
        select_window(EVERY_TEN, rule(count))


def test_select_window_unknown_end_refused_with_those_that_exist() -> None:
    with pytest.raises(UserError, match="no snapshot at step 55; there are 10 snapshots: steps 10, 20"):
        select_window(EVERY_TEN, rule(2), 55)


def test_select_window_run_without_snapshots_refused() -> None:
    with pytest.raises(UserError, match="no committed snapshots yet"):
        select_window([], rule(2))


@pytest.mark.parametrize(("first", "second"), [("warmup", "stable"), ("stable", "decay")])
def test_select_window_mixed_phases_refused(first: str, second: str) -> None:
    snapshots = [snapshot(10, phase=first), snapshot(20, phase=second), snapshot(30, phase=second)]
    with pytest.raises(UserError, match=rf"crosses phases of the schedule: steps 10 \({first}\), 20 \({second}\)"):
        select_window(snapshots, rule(3))
    assert steps(select_window(snapshots, rule(2))) == [20, 30]


def test_select_window_within_the_decay_phase_allowed() -> None:
    snapshots = [snapshot(step, phase="decay") for step in (10, 20)]
    assert steps(select_window(snapshots, rule(2))) == [10, 20]


def test_select_window_unhealthy_snapshot_refused_by_step() -> None:
    snapshots = [snapshot(10), snapshot(20, healthy=False), snapshot(30)]
    with pytest.raises(UserError, match="snapshots at steps 20 follow steps with a non-finite loss"):
        select_window(snapshots, rule(3))
    assert steps(select_window(snapshots, rule(2, 2000))) == [10, 30]


# What is due


def test_due_windows_complete_ones_oldest_first() -> None:
    due = due_windows(EVERY_TEN, rule(8), set())
    assert [steps(window)[-1] for window in due] == [80, 90, 100]
    assert all(len(window) == 8 for window in due)


def test_due_windows_leave_out_what_is_done() -> None:
    this = rule(8)
    done = {this.output_name(90), rule(8, method="wma").output_name(100)}
    assert [steps(window)[-1] for window in due_windows(EVERY_TEN, this, done)] == [80, 100]
    assert due_windows(EVERY_TEN, this, {this.output_name(step) for step in (80, 90, 100)}) == []


def test_due_windows_leave_out_what_cannot_be_merged() -> None:
    snapshots = [snapshot(10, phase="warmup"), *(snapshot(step, healthy=step != 40) for step in range(20, 80, 10))]
    assert [steps(window) for window in due_windows(snapshots, rule(2), set())] == [[20, 30], [50, 60], [60, 70]]


def test_due_windows_too_few_snapshots_is_none() -> None:
    assert due_windows(EVERY_TEN[:3], rule(4), set()) == []
    assert due_windows([], rule(4), set()) == []


# Names


def test_output_name_one_for_each_rule_and_step() -> None:
    rules = [
        rule(3), rule(4), rule(3, 2000), rule(3, method="wma"),
        rule(3, method="ema", alpha=0.1), rule(3, method="ema", alpha=0.2),
    ]  # fmt: skip
    names = {item.output_name(step) for item in rules for step in (100, 200)}
    assert len(names) == 2 * len(rules)
    assert rules[0].output_name(100) == "sma-n3-v1000-step-000000100"
    assert rules[-1].output_name(100) == "ema0.2-n3-v1000-step-000000100"


def test_output_name_close_values_of_alpha_are_apart() -> None:
    assert rule(3, method="ema", alpha=0.1234567).output_name(1) != rule(3, method="ema", alpha=0.1234571).output_name(
        1
    )


def test_describe_steps_many_are_shortened() -> None:
    assert describe_steps(EVERY_TEN[:2]) == "2 snapshots: steps 10, 20"
    many = [snapshot(step) for step in range(1, 31)]
    assert describe_steps(many) == "30 snapshots: steps 1, 2, 3, 4, 5, ..., 26, 27, 28, 29, 30"


# Borders that are crossed only if asked, and spans that stay short early


def test_select_window_across_a_phase_only_if_asked() -> None:
    mixed = [snapshot(10), snapshot(20), snapshot(30, phase="decay")]
    with pytest.raises(UserError, match="or say --across phase"):
        select_window(mixed, rule(3))
    assert steps(select_window(mixed, rule(3), across=("phase",))) == [10, 20, 30]


def test_select_window_across_a_spike_only_if_asked() -> None:
    spiked = [snapshot(10), snapshot(20, healthy=False), snapshot(30)]
    with pytest.raises(UserError, match="or say --across spike"):
        select_window(spiked, rule(3), across=("phase",))
    assert steps(select_window(spiked, rule(3), across=("spike",))) == [10, 20, 30]


@pytest.mark.parametrize(
    ("step", "expected"),
    [(10, 1), (60, 1), (70, 2), (100, 2), (200, 4), (1000, 10)],
)
def test_rule_shortens_its_span_early_in_a_run(step: int, expected: int) -> None:
    limited = dataclasses.replace(rule(10), max_span_fraction=0.16)
    assert limited.shortened(step * BATCH_TOKENS).count == expected


def test_rule_without_a_limit_is_never_shortened() -> None:
    assert rule(10).shortened(1).count == 10


def test_due_windows_of_a_limited_rule_grow_with_the_run() -> None:
    limited = dataclasses.replace(rule(4), max_span_fraction=0.25)
    due = due_windows(EVERY_TEN, limited, set())
    assert [steps(window) for window in due] == [
        [30, 40], [40, 50], [50, 60], [60, 70], [60, 70, 80], [70, 80, 90], [80, 90, 100],
    ]  # fmt: skip
    names = {limited.name_at(window[-1].manifest) for window in due}
    assert len(names) == len(due)
    assert due_windows(EVERY_TEN, limited, names) == []


def test_ephemeral_snapshots_are_in_no_window() -> None:
    # Ten steps apart from one another, as if they were on the grid.
    mixed = sorted([*EVERY_TEN, *(snapshot(step, ephemeral=True) for step in (85, 95, 105))], key=lambda s: s.step)
    assert steps(select_window(mixed, rule(3))) == [80, 90, 100]
    with pytest.raises(UserError, match="no snapshot at step 95; there are 10 snapshots"):
        select_window(mixed, rule(2), 95)
    assert [steps(w) for w in due_windows(mixed, rule(8), set())] == [
        steps(w) for w in due_windows(EVERY_TEN, rule(8), set())
    ]
