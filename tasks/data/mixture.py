"""Which domain of a weighted mixture a sequence is of, and the how-manieth of its domain: exact, and without state.

Two domains of weights a and b: of the first n sequences the first domain gets ``floor(n a / (a + b) + 1/2)``, so
sequence n is of the first domain if that count rises from n to n + 1 (a Sturmian word; Bresenham's line). More domains
are halves of halves: a balanced tree of such splits, each exact in whole numbers. No count is ever more than half the
depth of the tree away from its share, however long the run, and the answer for any n takes as many divisions as the tree is deep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from tasks.data.batches import permute

SHUFFLED_TOGETHER = 256
"""Sequences whose order of domains is drawn anew, so that it does not beat with ranks and batches."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Where sequences of a mixture come from."""

    domains: NDArray[np.int64]
    """Number of the domain of each sequence ``[n]``."""
    counters: NDArray[np.int64]
    """How many sequences of that domain stand before it in the mixture ``[n]``."""


class Mixture:
    """Domains in exact proportions of their weights."""

    def __init__(self, weights: Sequence[float], *, seed: int | None) -> None:
        """``seed`` draws the order of domains within short stretches; None leaves it regular."""
        # The decimal that a person wrote, not its nearest binary fraction.
        fractions = [Fraction(repr(float(weight))) for weight in weights]
        self._num_domains, self._seed = len(fractions), seed
        self._splits = dict(_splits(fractions, 0, len(fractions)))

    def assign(self, positions: NDArray[np.int64]) -> Assignment:
        """Domain and counter of the sequences at ``positions`` ``[n]`` of the stream."""
        if self._num_domains == 1:
            return Assignment(domains=np.zeros_like(positions), counters=positions)
        places = positions if self._seed is None else _shuffled(positions, self._seed)
        found = np.array([self._find(place) for place in places.tolist()], dtype=np.int64).reshape(-1, 2)
        return Assignment(domains=found[:, 0], counters=found[:, 1])

    def counts(self, length: int) -> list[int]:
        """Upper bounds of each domain's counters over the first ``length`` sequences; exact ones at the end of a stretch."""
        if self._seed is not None and self._num_domains > 1:
            length = -(-length // SHUFFLED_TOGETHER) * SHUFFLED_TOGETHER
        return self._count(length, 0, self._num_domains)

    def _find(self, place: int) -> tuple[int, int]:
        first, end = 0, self._num_domains
        while end - first > 1:
            split = self._splits[first, end]
            before = split.left_of(place)
            if split.left_of(place + 1) > before:
                place, end = before, split.middle
            else:
                place, first = place - before, split.middle
        return first, place

    def _count(self, length: int, first: int, end: int) -> list[int]:
        if end - first == 1:
            return [length]
        split = self._splits[first, end]
        left = split.left_of(length)
        return self._count(left, first, split.middle) + self._count(length - left, split.middle, end)


@dataclass(frozen=True)
class _Split:
    """Domains before ``middle`` against the others: their share is ``part / whole``."""

    middle: int
    part: int
    whole: int

    def left_of(self, length: int) -> int:
        """Sequences of the left side among the first ``length``: the share to the nearest whole number, halves up."""
        return (2 * length * self.part + self.whole) // (2 * self.whole)


def _splits(weights: Sequence[Fraction], first: int, end: int) -> Iterator[tuple[tuple[int, int], _Split]]:
    if end - first < 2:
        return
    middle = (first + end) // 2
    share = sum(weights[first:middle], Fraction()) / sum(weights[first:end], Fraction())
    yield (first, end), _Split(middle, share.numerator, share.denominator)
    yield from _splits(weights, first, middle)
    yield from _splits(weights, middle, end)


def _shuffled(positions: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    stretches, offsets = np.divmod(positions, SHUFFLED_TOGETHER)
    places = np.empty_like(positions)
    for stretch in np.unique(stretches):
        chosen = stretches == stretch
        order = permute(offsets[chosen], SHUFFLED_TOGETHER, key=f"{seed}/mixture/{stretch}")
        places[chosen] = stretch * SHUFFLED_TOGETHER + order
    return places
