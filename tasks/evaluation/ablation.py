"""Which N, V and method are best for a run: a grid of merges of stored snapshots, compared on the same held-out slices."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import UserError
from tasks.checkpoints.catalog import Glance
from tasks.evaluation.held_out import Evaluation, paired_gain
from tasks.merging.methods import MethodChoice
from tasks.merging.selection import WindowRule, select_window


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is tried: every combination."""

    methods: tuple[str, ...]
    """Merge methods that need no parameter but alpha."""
    counts: tuple[int, ...]
    """N."""
    intervals: tuple[int, ...]
    """V in tokens."""
    alphas: tuple[float, ...]
    """For ``ema``."""
    ends: tuple[int, ...]
    """Steps of the newest snapshot of a window."""

    def rules(self) -> list[WindowRule]:
        """One per method (and alpha), N and V. Raises :class:`configs.errors.UserError` for a method that does not exist."""
        rules = []
        for method, count, interval in itertools.product(self.methods, self.counts, self.intervals):
            for alpha in self.alphas if method == "ema" else (None,):
                MethodChoice(method=method, alpha=alpha).check()
                rules.append(WindowRule(method=method, count=count, interval_tokens=interval, alpha=alpha))
        return rules


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One merge of the grid that can be made."""

    rule: WindowRule
    """Method, N and V."""
    window: tuple[Glance, ...]
    """Its snapshots, oldest first."""

    @property
    def name(self) -> str:
        """The name that the merge has wherever it is made."""
        return self.rule.output_name(self.end.step or 0, self.end.recovery)

    @property
    def end(self) -> Glance:
        """The newest snapshot."""
        return self.window[-1]

    @property
    def span_tokens(self) -> int:
        """(N - 1) V."""
        return (self.rule.count - 1) * self.rule.interval_tokens


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A cell that was made and evaluated."""

    cell: Cell
    """Which."""
    digest: str
    """Content digest of the merged weights."""
    evaluation: Evaluation
    """Its held-out loss."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What the grid says of one end point."""

    best: Scored
    """Lowest held-out loss."""
    chosen: Scored
    """The shortest span, then the fewest snapshots, of all that are not told apart from the best."""
    alike: tuple[Scored, ...]
    """Those: worse than the best by at most one standard error of their paired difference over slices."""


def lay_out(grid: Grid, snapshots: Sequence[Glance]) -> tuple[list[Cell], dict[str, str]]:
    """Cells of ``grid`` that ``snapshots`` suffice for, and why the others cannot be made, by name.

    Raises :class:`configs.errors.UserError`, saying what is there and what is needed, if none can.
    """
    cells: list[Cell] = []
    lacking: dict[str, str] = {}
    for end, rule in itertools.product(grid.ends, grid.rules()):
        try:
            window = select_window(snapshots, rule, end)
        except UserError as error:
            lacking[rule.output_name(end)] = str(error)
        else:
            cells.append(Cell(rule=rule, window=tuple(window)))
    if not cells:
        raise UserError(f"no merge of the grid can be made: {next(iter(lacking.values()), 'the grid is empty')}")
    return cells, lacking


def passes(cells: Sequence[Cell]) -> list[list[Cell]]:
    """``cells`` in groups that one read serves: those of one end and V, whose windows are parts of the longest."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.end.url, cell.rule.interval_tokens), []).append(cell)
    return list(groups.values())


def advise(scored: Sequence[Scored]) -> Advice:
    """The best of ``scored``, which share an end point, and the cheapest that is not told apart from it.

    The rule of one standard error: a shorter window is less at the mercy of old weights and costs less, so it is preferred
    until it is measurably worse. The error is that of the paired difference over held-out slices; it does not count seeds.
    """
    best = min(scored, key=lambda item: item.evaluation.loss)
    alike = tuple(item for item in scored if _is_alike(best.evaluation, item.evaluation))
    chosen = min(alike, key=lambda item: (item.cell.span_tokens, item.cell.rule.count, item.evaluation.loss))
    return Advice(best=best, chosen=chosen, alike=alike)


def span_view(scored: Sequence[Scored]) -> list[tuple[int, float, int]]:
    """Span in tokens, mean held-out loss and number of cells, by span: whether the span alone decides, not N and V."""
    spans: dict[int, list[float]] = {}
    for item in scored:
        spans.setdefault(item.cell.span_tokens, []).append(item.evaluation.loss)
    return [(span, statistics.fmean(losses), len(losses)) for span, losses in sorted(spans.items())]


def _is_alike(best: Evaluation, other: Evaluation) -> bool:
    lower, error = paired_gain(other, best)
    # One slice has no error: then only equals are alike.
    return lower <= (error if len(best.slices) > 1 else 0.0)
