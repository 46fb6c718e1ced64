"""Stretches of the data stream that a run jumps over: what recovery from a loss spike leaves out.

A run numbers the sequences that it trains on 0, 1, 2, ...; the stream has positions. Without skips they are the same.
A skip of ``count`` at position ``at`` moves every sequence that would stand at ``at`` or after by ``count``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, order=True)
class SkipRange:
    """Positions ``at`` to ``at + count`` of the stream, which no sequence of the run is read from."""

    at: int
    """First position that is jumped over, in sequences."""
    count: int
    """How many positions are jumped over."""

    def __post_init__(self) -> None:
        if self.at < 0 or self.count < 0:
            raise ValueError(f"a skip of {self.count} sequences at {self.at}: both are 0 or more")


def skip_to(sequences: NDArray[np.int64], skips: Sequence[SkipRange]) -> NDArray[np.int64]:
    """Positions ``[n]`` in the stream of the run's ``sequences`` ``[n]``.

    Ranges are taken in order of ``at``, which counts positions, that is with all earlier ranges already jumped over:
    so a range that was written down when a run stood at a position stays right whatever ranges came before it. Ranges
    that overlap add up.
    """
    positions = sequences.copy()
    for skip in sorted(skips):
        positions[positions >= skip.at] += skip.count
    return positions


def join_skips(skips: Iterable[SkipRange]) -> tuple[SkipRange, ...]:
    """The union of ``skips``, all in positions of the stream, as ranges in order that neither overlap nor touch."""
    joined: list[SkipRange] = []
    for skip in sorted(skips):
        end = joined[-1].at + joined[-1].count if joined else -1
        if joined and skip.at <= end:
            joined[-1] = SkipRange(at=joined[-1].at, count=max(end, skip.at + skip.count) - joined[-1].at)
        else:
            joined.append(skip)
    return tuple(joined)
