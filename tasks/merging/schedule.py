"""The merge schedule of a run: which merges it makes by itself, and which of them are due.

Due is judged from committed snapshots and merges alone, so that whoever asks after downtime catches up, and two who
ask at once agree.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Generic

from configs.errors import UserError
from configs.merging import ScheduledMerge
from configs.schema import Config
from tasks.merging.selection import MIN_COUNT, Place, Placed, WindowRule, describe_steps, due_windows


@dataclass(frozen=True, kw_only=True)
class ScheduleRow:
    """One row of the schedule."""

    rule: WindowRule
    """Method, N and V."""
    every_tokens: int | None = None
    """Merges end at multiples of this many tokens; None means at every snapshot."""
    evaluate: bool = True
    """Whether their held-out loss is measured."""
    keep_last: int | None = None
    """How many of this row's merges retention keeps, the newest; None means all."""

    def owns(self, name: str, end: Place) -> bool:
        """Whether the merge ``name`` that ends at ``end`` is one of this row's."""
        return name == self.rule.name_at(end) and self.ends_at(end)

    def ends_at(self, end: Place) -> bool:
        """Whether a merge of this row may end at ``end``."""
        return self.every_tokens is None or (end.tokens_seen or 0) % self.every_tokens == 0


@dataclass(frozen=True, kw_only=True)
class DueMerge(Generic[Placed]):
    """A merge that is due."""

    name: str
    """Of the merged checkpoint, below ``<run>/merged``."""
    rule: WindowRule
    """With the count that fits here."""
    window: Sequence[Placed]
    """Oldest first."""


def schedule_of(config: Config) -> list[ScheduleRow]:
    """Rows of the schedule; the first is that of ``merge.method``, ``merge.count`` and ``merge.interval_tokens``.

    Raises :class:`configs.errors.UserError` if two rows would make merges of the same name.
    """
    rows = [
        ScheduleRow(
            rule=scheduled_rule(config),
            every_tokens=config.merge.every_tokens,
            evaluate=config.merge.evaluate,
            keep_last=config.merge.keep_last,
        ),
        *(_row(config, merge) for merge in config.merge.schedule),
    ]
    names = [row.rule.output_name(0) for row in rows]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"merge.schedule holds the same merge twice: {twice.removesuffix('-step-000000000')}")
    return rows


def scheduled_rule(config: Config) -> WindowRule:
    """The rule of the schedule's first row."""
    return WindowRule(
        method=config.merge.method,
        count=config.merge.count,
        interval_tokens=config.merge_interval_tokens,
        alpha=config.merge.alpha if config.merge.method == "ema" else None,
        max_span_fraction=config.merge.max_span_fraction,
    )


def due_merges(
    snapshots: Sequence[Placed], rows: Sequence[ScheduleRow], done: Collection[str]
) -> list[DueMerge[Placed]]:
    """Merges of ``rows`` whose windows are complete and that are not in ``done`` (names), oldest first.

    Of a row that keeps its last K merges only the K newest can be due: what retention took away is not made again.
    """
    due: dict[str, DueMerge[Placed]] = {}
    for row in rows:
        windows = [window for window in due_windows(snapshots, row.rule, ()) if row.ends_at(window[-1])]
        for window in windows[-row.keep_last :] if row.keep_last else windows:
            name = row.rule.name_at(window[-1])
            if name not in done:
                rule = row.rule.shortened(window[-1].tokens_seen or 0)
                # Early in a run two rows can be shortened to the same merge: it is made once.
                due.setdefault(name, DueMerge(name=name, rule=rule, window=window))
    return sorted(due.values(), key=lambda merge: merge.window[-1].step or 0)


def is_evaluated(name: str, end: Place, rows: Sequence[ScheduleRow]) -> bool:
    """Whether the merge ``name`` is to be evaluated: made by hand, or by a row that asks for it."""
    owners = [row for row in rows if row.owns(name, end)]
    return not owners or any(row.evaluate for row in owners)


def kept_merges(merged: Sequence[tuple[str, Placed]], rows: Sequence[ScheduleRow]) -> set[str]:
    """Names of ``merged`` (name and end, in any order) that the schedule does not give to retention."""
    kept = {name for name, end in merged if not any(row.owns(name, end) for row in rows)}
    for row in rows:
        own = sorted((pair for pair in merged if row.owns(*pair)), key=lambda pair: pair[1].step or 0)
        kept.update(name for name, _ in (own[-row.keep_last :] if row.keep_last else own))
    return kept


def describe_schedule(snapshots: Sequence[Placed], rows: Sequence[ScheduleRow]) -> str:
    """Why nothing is due: what the rows wait for."""
    counts = ", ".join(
        f"{row.rule.method} of {row.rule.count} every {row.rule.interval_tokens:,} tokens" for row in rows
    )
    if len(snapshots) < MIN_COUNT:
        return f"nothing is due: {describe_steps(snapshots)}; the schedule makes {counts}"
    return f"nothing is due: every complete window up to step {snapshots[-1].step} is merged ({counts})"


def _row(config: Config, merge: ScheduledMerge) -> ScheduleRow:
    return ScheduleRow(
        rule=WindowRule(
            method=merge.method,
            count=merge.count,
            interval_tokens=merge.interval_tokens or config.snapshots.interval_tokens,
            alpha=merge.alpha,
            max_span_fraction=config.merge.max_span_fraction,
        ),
        every_tokens=merge.every_tokens,
        evaluate=merge.evaluate,
        keep_last=merge.keep_last,
    )
