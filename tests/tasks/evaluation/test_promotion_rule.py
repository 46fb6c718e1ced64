"""The rule by which a champion gives way to a better version."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluation.promotion import Measured, judge

LOSSES = st.lists(st.tuples(st.floats(1, 5), st.floats(1, 5)), min_size=2, max_size=8)


def measured(*slices: float, suite: str | None = "s", name: str = "m/1") -> Measured:
    return Measured(name=name, suite=suite, slices=slices)


@given(LOSSES, st.floats(0, 3))
def test_champion_gives_way_exactly_to_a_gain_of_the_margin_and_never_both_ways(
    pairs: list[tuple[float, float]], margin: float
) -> None:
    old, new = measured(*(a for a, _ in pairs)), measured(*(b for _, b in pairs))
    gains = [a - b for a, b in pairs]
    gain, error = statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    assert judge(new, old, margin).is_moved == (gain > 0 and gain >= margin * error)
    assert not (judge(new, old, margin).is_moved and judge(old, new, margin).is_moved)
    assert not judge(old, old, margin).is_moved


@pytest.mark.parametrize(
    ("new", "champion", "moved", "reason"),
    [
        (measured(3.0, 3.1), None, True, "no version held it"),
        (measured(), None, False, "not known"),
        (measured(math.nan, 3.0), None, False, "not finite"),
        (measured(1.0, 1.1), measured(suite=None), False, "of the champion, m/1, is not known"),
        (measured(1.0, 1.1), measured(2.0, 2.1, suite="t"), False, "not measured on the same"),
        (measured(1.0, 1.1), measured(2.0, 2.1, 2.2), False, "not measured on the same"),
        (measured(1.0), measured(2.0), False, "no standard error"),
    ],
)
def test_what_is_not_known_moves_nothing(new: Measured, champion: Measured | None, moved: bool, reason: str) -> None:
    verdict = judge(new, champion, 1.0)
    assert verdict.is_moved is moved
    assert reason in verdict.reason
