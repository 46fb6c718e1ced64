"""The sections about merges: which are made on schedule, and what retention keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from configs.errors import ConfigError
from configs.fields import execution, require
from configs.typed import parse_record


@dataclass(frozen=True, kw_only=True)
class ScheduledMerge:
    """One more row of the merge schedule, beside the one that ``merge.method``, ``count`` and ``interval_tokens`` make."""

    method: Literal["sma", "wma", "ema", "wsm:linear", "wsm:cosine", "wsm:1-sqrt"] = "sma"
    """How merge weights are chosen."""
    count: int = 10
    """Snapshots of one window (the paper's N)."""
    interval_tokens: int | None = None
    """Tokens between neighbouring snapshots of a window (V); null means every snapshot."""
    alpha: float | None = None
    """Weight of the newest snapshot, for ``ema`` alone."""
    every_tokens: int | None = None
    """Merges end at multiples of this many tokens; null means at every snapshot."""
    evaluate: bool = True
    """Whether the held-out loss of these merges is measured."""
    keep_last: int | None = None
    """Merges of this row that retention keeps, the newest; null means all."""

    def __post_init__(self) -> None:
        require(self.count >= 2, "merge.schedule[].count", self.count, "at least 2 snapshots make a merge")
        if self.method == "ema":
            allowed = "in (0, 1] for ema"
            require(self.alpha is not None and 0 < self.alpha <= 1, "merge.schedule[].alpha", self.alpha, allowed)
        else:
            require(
                self.alpha is None, "merge.schedule[].alpha", self.alpha, f"null for {self.method}: only ema has one"
            )
        for key in ("interval_tokens", "every_tokens", "keep_last"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"merge.schedule[].{key}", value, "a positive number, or null")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merges that the run makes by itself while it trains (PMA, arXiv 2505.12082)."""

    method: Literal["sma", "wma", "ema"] = "sma"
    """How merge weights are chosen: simple, weighted or exponential moving average."""
    count: int = 10
    """Snapshots of one window (the paper's N)."""
    interval_tokens: int | None = None
    """Tokens between neighbouring snapshots of a window (the paper's V); null means ``snapshots.interval_tokens``."""
    alpha: float = 0.2
    """Weight of the newest snapshot in the EMA recursion; the paper tries 0.1 and 0.2."""
    max_span_fraction: float | None = None
    """Longest span of a window, (N - 1) V, as a part of the tokens seen: early merges take fewer snapshots; null means any."""
    every_tokens: int | None = execution(None)
    """Scheduled merges end at multiples of this many tokens; null means at every snapshot."""
    evaluate: bool = execution(True)
    """Whether the held-out loss of scheduled merges is measured."""
    keep_last: int | None = execution(None)
    """Scheduled merges that retention keeps, the newest; null means all."""
    schedule: tuple[ScheduledMerge, ...] = execution(())
    """Further merges that are made on schedule, a row each."""
    comparison_counts: tuple[int, ...] = (3, 6, 10, 15)
    """Values of N that the end-of-run table compares, where there are enough snapshots."""
    shard_bytes: int = execution(1 << 30)
    """Largest output shard, which is the work of one merge task."""
    num_workers: int = execution(1)
    """Merge and evaluation tasks that run at once beside training, one CPU each."""

    def __post_init__(self) -> None:
        require(self.count >= 2, "merge.count", self.count, "at least 2 snapshots make a merge")
        require(0 < self.alpha <= 1, "merge.alpha", self.alpha, "in (0, 1]")
        require(
            self.max_span_fraction is None or 0 < self.max_span_fraction <= 1,
            "merge.max_span_fraction",
            self.max_span_fraction,
            "in (0, 1], or null",
        )
        require(
            all(count >= 2 for count in self.comparison_counts),
            "merge.comparison_counts",
            list(self.comparison_counts),
            "every count needs at least 2",
        )
        # OmegaConf leaves the items of a list as it read them.
        object.__setattr__(self, "schedule", tuple(_scheduled_merge(row, i) for i, row in enumerate(self.schedule)))
        for key in ("every_tokens", "keep_last"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"merge.{key}", value, "a positive number, or null")
        require(self.shard_bytes >= 1, "merge.shard_bytes", self.shard_bytes, "a positive number of bytes")
        require(self.num_workers >= 1, "merge.num_workers", self.num_workers, "at least 1")


def _scheduled_merge(row: Any, number: int) -> ScheduledMerge:
    if isinstance(row, ScheduledMerge):
        return row
    try:
        return parse_record(ScheduledMerge, row)
    except TypeError as error:
        known = ", ".join(item.name for item in fields(ScheduledMerge))
        raise ConfigError(
            f"merge.schedule[{number}]={row!r} is not possible: {error}; keys of a row: {known}"
        ) from None


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """Which snapshots `pma gc` may remove: those that no rule here keeps and that nothing needs (docs/retention.md)."""

    keep_last: int | None = execution(None)
    """The newest K snapshots stay; null: this rule keeps none."""
    keep_every: int | None = execution(None)
    """Every M-th snapshot stays, those at multiples of M times ``snapshots.interval_tokens``; null: this rule keeps none."""
    keep_hours: float | None = execution(None)
    """Snapshots younger than this stay; null: this rule keeps none."""
    milestones: tuple[int, ...] = execution(())
    """Steps whose snapshots stay for ever."""

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"retention.{name}", value, "a positive number, or null")
        hours = self.keep_hours
        require(hours is None or 0 < hours < math.inf, "retention.keep_hours", hours, "a positive number, or null")
        steps = list(self.milestones)
        require(all(step >= 0 for step in steps), "retention.milestones", steps, "steps, 0 or more")

    @property
    def is_set(self) -> bool:
        """Whether any rule says what may go; without one everything stays."""
        return (self.keep_last, self.keep_every, self.keep_hours) != (None, None, None)
