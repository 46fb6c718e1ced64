"""Rows packed into sequences: whole, several to a sequence, as few sequences as can be."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.data.batches import permute


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Which rows stand in which sequence."""

    rows: NDArray[np.int64]
    """Numbers of rows ``[R]``, sequence after sequence; each row once."""
    starts: NDArray[np.int64]
    """Borders of the sequences in ``rows`` ``[W + 1]``."""

    @property
    def num_bins(self) -> int:
        """Sequences W."""
        return len(self.starts) - 1

    def rows_of(self, number: int) -> NDArray[np.int64]:
        """Rows of a sequence, in order."""
        return self.rows[self.starts[number] : self.starts[number + 1]]


def pack_in_order(lengths: NDArray[np.int64], capacity: int) -> Bins:
    """Rows as they lie: a sequence ends where the next row does not fit any more."""
    bins: list[list[int]] = []
    space = -1
    for row, length in enumerate(lengths.tolist()):
        if length > space:
            bins.append([])
            space = capacity
        bins[-1].append(row)
        space -= length
    return _bins(bins)


def pack_best_fit(lengths: NDArray[np.int64], capacity: int, *, key: str) -> Bins:
    """Best-fit decreasing: the longest first, each where the least space stays free.

    Rows of one length take turns in an order drawn by ``key``, so that neighbours differ from seed to seed. At most 11/9
    of the fewest possible sequences, and 4 (Johnson, Demers, Ullman, Garey and Graham, 1974).
    """
    drawn = permute(np.arange(len(lengths), dtype=np.int64), len(lengths), key=key)
    order = drawn[np.argsort(-lengths[drawn], kind="stable")]
    bins: list[list[int]] = []
    by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # keys of by_space, which says which sequences have so much left, ascending
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            number, space = len(bins), capacity
            bins.append([])
        else:
            space = spaces[at]
            number = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        bins[number].append(row)
        left = space - length
        if left not in by_space:
            by_space[left] = []
            bisect.insort(spaces, left)
        by_space[left].append(number)
    return _bins(bins)


def _bins(bins: list[list[int]]) -> Bins:
    return Bins(
        rows=np.array([row for rows in bins for row in rows], dtype=np.int64),
        starts=np.concatenate([[0], np.cumsum([len(rows) for rows in bins])]).astype(np.int64),
    )
