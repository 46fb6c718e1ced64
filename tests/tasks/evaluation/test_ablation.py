"""Grids of merges: which cells there are, which one read serves, and what is chosen."""

from __future__ import annotations

import pytest

from configs.errors import UserError
from tasks.checkpoints.catalog import Glance
from tasks.evaluation.ablation import Cell, Grid, Scored, advise, lay_out, passes, span_view
from tasks.evaluation.held_out import Evaluation
from tasks.merging.selection import WindowRule

V = 100


def glance(step: int, phase: str = "stable") -> Glance:
    return Glance(
        url=f"memory://run/snapshots/step-{step:09d}", kind="training", step=step, tokens_seen=V * step,
        digest=f"{step:064x}", healthy=True, phase=phase, bytes=1, created=0.0,
    )  # fmt: skip


SNAPSHOTS = [glance(step) for step in range(1, 11)]


def grid(**changes: tuple[object, ...]) -> Grid:
    values = {
        "methods": ("sma",),
        "counts": (2, 5),
        "intervals": (V, 2 * V),
        "alphas": (0.1,),
        "ends": (10,),
        **changes,
    }
    return Grid(**values)  # type: ignore[arg-type]


def scored(count: int, interval: int, losses: tuple[float, ...]) -> Scored:
    rule = WindowRule(method="sma", count=count, interval_tokens=interval, alpha=None)
    evaluation = Evaluation(
        digest="d", suite="s", loss=sum(losses) / len(losses), slices=losses, domains={}, bits_per_byte=None, tokens=1
    )
    cell = Cell(rule=rule, window=tuple(SNAPSHOTS[-count:]))
    return Scored(cell=cell, digest="d", evaluation=evaluation)


def test_alpha_multiplies_ema_alone() -> None:
    rules = grid(methods=("sma", "ema"), alphas=(0.1, 0.2), counts=(3,), intervals=(V,)).rules()
    assert [(rule.method, rule.alpha) for rule in rules] == [("sma", None), ("ema", 0.1), ("ema", 0.2)]


def test_unknown_method_is_refused() -> None:
    with pytest.raises(UserError, match="mean"):
        grid(methods=("mean",)).rules()


def test_cells_have_the_snapshots_of_their_window_and_others_a_reason() -> None:
    cells, lacking = lay_out(grid(counts=(2, 5, 6)), SNAPSHOTS)
    windows = {(c.rule.count, c.rule.interval_tokens): [s.step for s in c.window] for c in cells}
    assert windows == {
        (2, V): [9, 10], (2, 2 * V): [8, 10], (5, V): [6, 7, 8, 9, 10], (5, 2 * V): [2, 4, 6, 8, 10],
        (6, V): [5, 6, 7, 8, 9, 10],
    }  # fmt: skip
    (reason,) = lacking.values()
    assert "does not fit before step 10" in reason


def test_window_across_phases_is_left_out() -> None:
    mixed = [*SNAPSHOTS[:8], glance(9, "decay"), glance(10, "decay")]
    cells, lacking = lay_out(grid(intervals=(V,)), mixed)
    assert [cell.rule.count for cell in cells] == [2]
    assert "crosses phases" in lacking["sma-n5-v100-step-000000010"]


def test_grid_without_a_single_cell_says_what_is_there() -> None:
    with pytest.raises(UserError, match="there are 2 snapshots"):
        lay_out(grid(counts=(5,), ends=(2,)), SNAPSHOTS[:2])


def test_one_read_serves_one_end_and_interval() -> None:
    cells, _ = lay_out(grid(methods=("sma", "wma"), ends=(9, 10), counts=(2, 4)), SNAPSHOTS)
    groups = passes(cells)
    assert [len(group) for group in groups] == [4, 4, 4, 4]
    for group in groups:
        longest = max(group, key=lambda cell: cell.rule.count).window
        assert all(cell.window == longest[-cell.rule.count :] for cell in group)


def test_shortest_span_within_an_error_of_the_best_is_chosen() -> None:
    best = scored(10, V, (1.00, 1.10, 1.20))
    close = scored(3, V, (1.01, 1.09, 1.21))  # worse by 0.003 with an error of 0.007
    worse = scored(2, V, (1.05, 1.16, 1.25))  # by 0.053 with an error of 0.003
    advice = advise([best, close, worse])
    assert advice.best is best and advice.chosen is close
    assert set(map(id, advice.alike)) == {id(best), id(close)}


def test_one_slice_tells_no_error_and_so_the_best_is_chosen() -> None:
    best, close = scored(10, V, (1.0,)), scored(3, V, (1.0001,))
    assert advise([close, best]).chosen is best


def test_span_view_groups_what_has_one_span() -> None:
    view = span_view([scored(5, V, (1.0,)), scored(3, 2 * V, (1.2,)), scored(2, V, (2.0,))])
    assert view == [(V, 2.0, 1), (4 * V, pytest.approx(1.1), 2)]
