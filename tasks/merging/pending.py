"""Which snapshots the merge schedule still needs: for merges that are due, and for windows that can still complete."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from tasks.merging.schedule import ScheduleRow, due_merges
from tasks.merging.selection import Choosable, on_grid


class Kept(Choosable, Protocol):
    """What this asks of a snapshot."""

    @property
    def url(self) -> str:
        """Its folder."""


def reasons_of_windows(
    snapshots: Sequence[Kept], rows: Sequence[ScheduleRow], done: Collection[str], *, last_tokens: int | None
) -> dict[str, list[str]]:
    """Folders of ``snapshots`` (by step) that merges of ``rows`` need, and for what.

    ``done`` names merges that were made, those that retention took away included. ``last_tokens`` is where the run ends;
    None if that is not known. Borders of phases and spikes are not asked: a window that they forbid is kept too.
    """
    found: dict[str, list[str]] = {}
    for merge in due_merges(snapshots, rows, done):
        for snapshot in merge.window:
            found.setdefault(_folder(snapshot), []).append(f"{merge.name} is due")
    for row in rows:
        rule = row.rule
        for snapshot in on_grid(snapshots):
            if _can_still_serve(snapshot.tokens_seen or 0, snapshots[-1].tokens_seen or 0, row, last_tokens):
                why = f"coming windows of {rule.method} of {rule.count} every {rule.interval_tokens} tokens"
                found.setdefault(_folder(snapshot), []).append(why)
    return found


def _can_still_serve(tokens: int, newest: int, row: ScheduleRow, last_tokens: int | None) -> bool:
    """Whether a window that ends after ``newest`` takes the snapshot at ``tokens``."""
    for back in range(1, row.rule.count):
        end = tokens + back * row.rule.interval_tokens
        rule = row.rule.shortened(end)
        is_to_come = newest < end and (last_tokens is None or end <= last_tokens)
        fits = back < rule.count and end > (rule.count - 1) * rule.interval_tokens
        if is_to_come and fits and row.ends_at(_End(end)):
            return True
    return False


class _End:
    """The end of a window that is still to come."""

    def __init__(self, tokens_seen: int) -> None:
        self.step: int | None = None
        self.tokens_seen: int | None = tokens_seen
        self.recovery = 0


def _folder(snapshot: Kept) -> str:
    return f"snapshots/{snapshot.url.rsplit('/', 1)[1]}"
