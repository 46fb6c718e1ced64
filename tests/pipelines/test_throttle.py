"""Looks that are asked for all the time, and made now and then."""

from __future__ import annotations

import math

from pipelines.throttle import Throttle


def test_throttle_passes_once_every_so_many_seconds() -> None:
    now = [0.0]
    throttle = Throttle(5.0, clock=lambda: now[0])
    passed = []
    for second in range(18):
        now[0] = float(second)
        if throttle.passes():
            passed.append(second)
    assert passed == [5, 10, 15]
    throttle.seconds = 1.0
    assert throttle.passes() and not throttle.passes()


def test_throttle_of_nothing_always_passes_and_of_infinity_never() -> None:
    assert all(Throttle(0.0).passes() for _ in range(3))
    now = [0.0]
    never = Throttle(math.inf, clock=lambda: now[0])
    now[0] = 1e12
    assert not never.passes()
