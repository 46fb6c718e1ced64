"""Mixtures: exact shares of any stretch, and counters that leave nothing out and take nothing twice."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.mixture import SHUFFLED_TOGETHER, Mixture

WEIGHTS = st.lists(st.one_of(st.integers(1, 1000).map(float), st.floats(1e-4, 1e4)), min_size=1, max_size=9)


def assigned(mixture: Mixture, first: int, count: int) -> list[tuple[int, int]]:
    found = mixture.assign(np.arange(first, first + count, dtype=np.int64))
    return list(zip(found.domains.tolist(), found.counters.tolist(), strict=True))


def shares_of(weights: list[float]) -> list[Fraction]:
    exact = [Fraction(repr(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(weights=WEIGHTS)
def test_regular_order_counters_are_those_of_a_replay(weights: list[float]) -> None:
    seen: Counter[int] = Counter()
    for domain, counter in assigned(Mixture(weights, seed=None), 0, 600):
        assert counter == seen[domain]
        seen[domain] += 1


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(weights=WEIGHTS)
def test_regular_order_every_beginning_has_its_shares(weights: list[float]) -> None:
    # Half a sequence a level of the tree.
    bound, shares = Fraction(math.ceil(math.log2(max(2, len(weights)))), 2), shares_of(weights)
    seen: Counter[int] = Counter()
    for length, (domain, _) in enumerate(assigned(Mixture(weights, seed=None), 0, 600), start=1):
        seen[domain] += 1
        assert all(abs(seen[number] - length * share) <= bound for number, share in enumerate(shares))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**32 - 1))
def test_shuffled_order_stretches_hold_what_the_regular_order_holds(weights: list[float], seed: int) -> None:
    regular, shuffled = Mixture(weights, seed=None), Mixture(weights, seed=seed)
    for number in (0, 1, 7):
        place = number * SHUFFLED_TOGETHER
        assert sorted(assigned(shuffled, place, SHUFFLED_TOGETHER)) == sorted(
            assigned(regular, place, SHUFFLED_TOGETHER)
        )


def test_shuffled_order_takes_each_counter_once_and_in_exact_shares() -> None:
    found = assigned(Mixture([7, 2, 1], seed=3), 0, 10 * SHUFFLED_TOGETHER)
    counters: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for domain, counter in found:
        counters[domain].append(counter)
    assert [len(counters[number]) for number in range(3)] == [1792, 512, 256]
    assert all(sorted(values) == list(range(len(values))) for values in counters.values())


def test_far_away_is_as_exact_as_near_by() -> None:
    # A replay is out of the question here; the count before and after a stretch says what it must hold.
    weights, first = [0.7, 0.2999, 0.0001], 10**12
    mixture = Mixture(weights, seed=None)
    before, after = mixture.counts(first), mixture.counts(first + 50_000)
    found = assigned(mixture, first, 50_000)
    tally = Counter(domain for domain, _ in found)
    assert [tally[number] for number in range(3)] == [b - a for a, b in zip(before, after, strict=True)]
    assert tally[2] == 5
    for number in range(3):
        ordered = [counter for domain, counter in found if domain == number]
        assert ordered == list(range(before[number], after[number]))
        assert abs(before[number] - first * shares_of(weights)[number]) <= 1


def test_any_cut_gives_the_same() -> None:
    mixture = Mixture([3, 1, 2], seed=5)
    whole = assigned(mixture, 0, 700)
    pieces = [pair for first in range(0, 700, 7) for pair in assigned(mixture, first, 7)]
    assert pieces == whole


def test_shuffled_order_does_not_beat_with_ranks() -> None:
    # Regularly, every other sequence is of the same domain, and one of two ranks would see nothing else.
    assert {domain for domain, _ in assigned(Mixture([1, 1], seed=None), 0, 200)[::2]} == {0}
    tally = Counter(domain for domain, _ in assigned(Mixture([1, 1], seed=1), 0, 2000)[::2])
    # Five standard deviations of a draw without replacement are less than 5 * sqrt(1000 / 4) = 79.
    assert abs(tally[0] - 500) < 79


def test_stretches_have_their_own_orders() -> None:
    mixture = Mixture([1, 1], seed=1)
    orders = {tuple(domain for domain, _ in assigned(mixture, 256 * n, 256)) for n in range(10)}
    assert len(orders) == 10


def test_seeds_give_other_orders() -> None:
    orders = {tuple(assigned(Mixture([1, 1], seed=seed), 0, 64)) for seed in range(10)}
    assert len(orders) == 10


def test_only_proportions_count() -> None:
    assert assigned(Mixture([0.1, 0.3], seed=1), 0, 500) == assigned(Mixture([1, 3], seed=1), 0, 500)
    # As decimals these are one to two; their binary values are not quite.
    assert assigned(Mixture([0.1, 0.2], seed=None), 0, 3000) == assigned(Mixture([1, 2], seed=None), 0, 3000)


def test_one_domain_takes_all() -> None:
    assert assigned(Mixture([0.3], seed=9), 1000, 4) == [(0, 1000), (0, 1001), (0, 1002), (0, 1003)]


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("length", [0, 1, 255, 256, 1000])
def test_counts_bound_what_a_beginning_takes(seed: int | None, length: int) -> None:
    mixture = Mixture([5, 3, 1], seed=seed)
    tops = Counter(dict.fromkeys(range(3), 0))
    for domain, counter in assigned(mixture, 0, length):
        tops[domain] = max(tops[domain], counter + 1)
    bounds = mixture.counts(length)
    assert all(tops[number] <= bounds[number] for number in range(3))
    assert sum(bounds) - length < (SHUFFLED_TOGETHER if seed else 1)
