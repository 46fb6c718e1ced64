"""Choose a window: the snapshots that one merge averages, by rule and from manifests alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from configs.errors import UserError
from tasks.checkpoints.recoveries import folder_suffix

BORDERS = ("phase", "spike", "fork")
"""What a window crosses only if asked: phases of the schedule, a non-finite step, the start of a branch."""
MIN_COUNT = 2
"""Snapshots that make a merge."""


class Place(Protocol):
    """Where in a run something lies."""

    @property
    def step(self) -> int | None:
        """Completed optimizer steps."""

    @property
    def tokens_seen(self) -> int | None:
        """Tokens seen up to it."""

    @property
    def recovery(self) -> int:
        """Recoveries that were in force when it was made."""


class Choosable(Place, Protocol):
    """What choosing a window asks of a snapshot."""

    @property
    def healthy(self) -> bool:
        """Whether every step since the one before was finite."""

    @property
    def phase(self) -> str | None:
        """Phase of the schedule."""

    @property
    def ephemeral(self) -> bool:
        """Whether it lies off the grid of intervals, to resume from alone."""


Placed = TypeVar("Placed", bound=Choosable)


@dataclass(frozen=True, kw_only=True)
class WindowRule:
    """Which merge of a run: method, N, V."""

    method: str
    """Merge method."""
    count: int
    """The paper's N."""
    interval_tokens: int
    """The paper's V."""
    alpha: float | None
    """For ``ema``."""
    max_span_fraction: float | None = None
    """Longest span, (N - 1) V, as a part of the tokens seen; None means any."""

    def shortened(self, tokens_seen: int) -> WindowRule:
        """The rule with as few snapshots as ``max_span_fraction`` allows at ``tokens_seen``; one means that no merge is due.

        The paper's scores fall with the span early in training: at 204B tokens the best spans tried were up to 16B, at 452B and
        1112B 72B, at 1607B 72B to 112B (arXiv 2505.12082, section 4.4).
        """
        if self.max_span_fraction is None:
            return self
        fits = 1 + int(self.max_span_fraction * tokens_seen) // self.interval_tokens
        return dataclasses.replace(self, count=max(1, min(self.count, fits)))

    def name_at(self, end: Place) -> str:
        """Name of the merged checkpoint that ends where ``end`` does; one name per rule and step."""
        assert end.step is not None
        return self.shortened(end.tokens_seen or 0).output_name(end.step, end.recovery)

    def output_name(self, end_step: int, recovery: int = 0) -> str:
        """Name of a merge of exactly ``count`` snapshots that ends at ``end_step``, ``recovery`` recoveries being in force."""
        method = f"ema{self.alpha!r}" if self.method == "ema" else self.method.replace(":", "-")
        return f"{method}-n{self.count}-v{self.interval_tokens}-step-{end_step:09d}{folder_suffix(recovery)}"


def select_window(
    snapshots: Sequence[Placed], rule: WindowRule, end_step: int | None = None, across: Collection[str] = ()
) -> list[Placed]:
    """The ``rule.count`` snapshots at ``rule.interval_tokens`` that end at ``end_step`` (default: the newest), oldest first.

    Ephemeral ones are not counted: they may be gone before the merge is made. Raises :class:`configs.errors.UserError`, naming the snapshots that exist, if one is missing; or, unless ``across`` holds
    ``spike`` or ``phase``, if one is not healthy or the window crosses phases of the schedule.
    """
    snapshots = on_grid(snapshots)
    if not snapshots:
        raise UserError("the run has no committed snapshots yet")
    if rule.count < 1:
        raise UserError(f"a window needs at least one snapshot, got a count of {rule.count}")
    end = snapshots[-1] if end_step is None else next((s for s in snapshots if s.step == end_step), None)
    if end is None:
        raise UserError(f"no snapshot at step {end_step}; there are {describe_steps(snapshots)}")
    assert end.tokens_seen is not None
    if end.tokens_seen <= (rule.count - 1) * rule.interval_tokens:
        fits = (end.tokens_seen - 1) // rule.interval_tokens + 1
        raise UserError(
            f"a window of {rule.count} snapshots every {rule.interval_tokens} tokens does not fit before step {end.step} "
            f"({end.tokens_seen} tokens): at most {fits} do; there are {describe_steps(snapshots)}"
        )
    found = _window({snapshot.tokens_seen: snapshot for snapshot in snapshots}, rule, end)
    window = [snapshot for snapshot in found.values() if snapshot is not None]
    missing = [tokens for tokens, snapshot in found.items() if snapshot is None]
    if missing:
        raise UserError(
            f"a window of {rule.count} snapshots every {rule.interval_tokens} tokens that ends at step {end.step} needs "
            f"snapshots at {', '.join(map(str, missing[:5]))} tokens, which do not exist; there are "
            f"{describe_steps(snapshots)}. Choose a smaller --count or an --interval-tokens that fits their spacing"
        )
    if problem := _border_crossed(window, across):
        raise UserError(problem)
    return window


def due_windows(snapshots: Sequence[Placed], rule: WindowRule, done: Collection[str]) -> list[list[Placed]]:
    """Windows of ``rule`` that are complete and not merged yet (``done`` holds output names), oldest first."""
    snapshots = on_grid(snapshots)
    by_tokens = {snapshot.tokens_seen: snapshot for snapshot in snapshots}
    due = []
    for end in snapshots:
        fitting = rule.shortened(end.tokens_seen or 0)
        fits = (end.tokens_seen or 0) > (fitting.count - 1) * fitting.interval_tokens
        if fitting.count < MIN_COUNT or not fits or fitting.output_name(end.step or 0, end.recovery) in done:
            continue
        window = [snapshot for snapshot in _window(by_tokens, fitting, end).values() if snapshot is not None]
        if len(window) == fitting.count and _border_crossed(window, ()) is None:
            due.append(window)
    return due


def on_grid(snapshots: Iterable[Placed]) -> list[Placed]:
    """Those of ``snapshots`` that windows are made of: all but ephemeral ones."""
    return [snapshot for snapshot in snapshots if not snapshot.ephemeral]


def _window(by_tokens: Mapping[int | None, Placed], rule: WindowRule, end: Placed) -> dict[int, Placed | None]:
    """What lies at each place of the window that ends at ``end``, by tokens, oldest first."""
    newest = end.tokens_seen or 0
    places = [newest - i * rule.interval_tokens for i in reversed(range(rule.count))]
    return {tokens: by_tokens.get(tokens) for tokens in places}


def describe_steps(snapshots: Sequence[Place]) -> str:
    """``N snapshots: steps a, b, ... z`` for messages."""
    steps = [str(snapshot.step) for snapshot in snapshots]
    shown = steps if len(steps) <= 12 else [*steps[:5], "...", *steps[-5:]]
    return f"{len(steps)} snapshots: steps {', '.join(shown)}"


def _border_crossed(window: Sequence[Choosable], across: Collection[str]) -> str | None:
    """What keeps the snapshots of ``window`` from being one stretch of training, and what to do."""
    sick = [str(s.step) for s in window if not s.healthy]
    if sick and "spike" not in across:
        return (
            f"snapshots at steps {', '.join(sick)} follow steps with a non-finite loss or gradient; "
            "choose an --end or a --count that leaves them out, or say --across spike"
        )
    if len({s.phase for s in window}) > 1 and "phase" not in across:
        rows = ", ".join(f"{s.step} ({s.phase})" for s in window)
        return (
            f"the window crosses phases of the schedule: steps {rows}; choose an --end or a --count within one phase, "
            "or say --across phase"
        )
    return None
