"""Choose a window: the snapshots that one merge averages, by rule and from manifests alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import UserError
from tasks.checkpoints.run_folder import Snapshot


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

    def output_name(self, end_step: int) -> str:
        """Name of the merged checkpoint whose newest input is at ``end_step``; one name per rule and step."""
        method = f"ema{self.alpha!r}" if self.method == "ema" else self.method.replace(":", "-")
        return f"{method}-n{self.count}-v{self.interval_tokens}-step-{end_step:09d}"


def select_window(snapshots: Sequence[Snapshot], rule: WindowRule, end_step: int | None = None) -> list[Snapshot]:
    """The ``rule.count`` snapshots at ``rule.interval_tokens`` that end at ``end_step`` (default: the newest), oldest first.

    Raises :class:`configs.errors.UserError`, naming the snapshots that exist, if one is missing, not healthy, or of
    another phase of the schedule than the newest of the window.
    """
    if not snapshots:
        raise UserError("the run has no committed snapshots yet")
    if rule.count < 1:
        raise UserError(f"a window needs at least one snapshot, got a count of {rule.count}")
    by_tokens = {snapshot.manifest.tokens_seen: snapshot for snapshot in snapshots}
    end = snapshots[-1] if end_step is None else next((s for s in snapshots if s.step == end_step), None)
    if end is None:
        raise UserError(f"no snapshot at step {end_step}; there are {describe_steps(snapshots)}")
    assert end.manifest.tokens_seen is not None
    wanted = [end.manifest.tokens_seen - i * rule.interval_tokens for i in reversed(range(rule.count))]
    if wanted[0] <= 0:
        fits = (end.manifest.tokens_seen - 1) // rule.interval_tokens + 1
        raise UserError(
            f"a window of {rule.count} snapshots every {rule.interval_tokens} tokens does not fit before step {end.step} "
            f"({end.manifest.tokens_seen} tokens): at most {fits} do; there are {describe_steps(snapshots)}"
        )
    missing = [tokens for tokens in wanted if tokens not in by_tokens]
    if missing:
        raise UserError(
            f"a window of {rule.count} snapshots every {rule.interval_tokens} tokens that ends at step {end.step} needs "
            f"snapshots at {', '.join(map(str, missing[:5]))} tokens, which do not exist; there are "
            f"{describe_steps(snapshots)}. Choose a smaller --count or an --interval-tokens that fits their spacing"
        )
    window = [by_tokens[tokens] for tokens in wanted]
    _require_one_trajectory(window)
    return window


def due_windows(snapshots: Sequence[Snapshot], rule: WindowRule, done: set[str]) -> list[list[Snapshot]]:
    """Windows of ``rule`` that are complete and not merged yet (``done`` holds output names), oldest first."""
    due = []
    for snapshot in snapshots:
        if rule.output_name(snapshot.step) in done:
            continue
        try:
            due.append(select_window(snapshots, rule, snapshot.step))
        except UserError:
            continue
    return due


def describe_steps(snapshots: Sequence[Snapshot]) -> str:
    """``N snapshots: steps a, b, ... z`` for messages."""
    steps = [str(snapshot.step) for snapshot in snapshots]
    shown = steps if len(steps) <= 12 else [*steps[:5], "...", *steps[-5:]]
    return f"{len(steps)} snapshots: steps {', '.join(shown)}"


def _require_one_trajectory(window: Sequence[Snapshot]) -> None:
    sick = [str(s.step) for s in window if not s.manifest.healthy]
    if sick:
        raise UserError(
            f"snapshots at steps {', '.join(sick)} follow steps with a non-finite loss or gradient; "
            "choose an --end or a --count that leaves them out"
        )
    phases = {s.manifest.phase for s in window}
    if len(phases) > 1:
        rows = ", ".join(f"{s.step} ({s.manifest.phase})" for s in window)
        raise UserError(
            f"the window crosses phases of the schedule: steps {rows}; choose an --end or a --count within one phase"
        )
