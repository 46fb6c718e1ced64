"""What a manifest says of the steps before it."""

from __future__ import annotations

import math

import pytest

from configs.errors import ConfigError
from configs.training import SnapshotConfig
from tasks.training.snapshots.take import LossWindow

LOSSES = [3.0, 2.5, math.nan, 2.75, 2.0, math.inf, 1.5]
NORMS = [1.0, 2.0, 3.0, 0.5, math.nan, 1.0, 4.0]


def window_of(first: int, last: int, carried: LossWindow | None = None) -> LossWindow:
    window = LossWindow(carried.statistics() if carried else None)
    for loss, norm in list(zip(LOSSES, NORMS, strict=True))[first:last]:
        window.add(loss, norm)
    return window


def test_loss_window_counts_finite_steps() -> None:
    found = window_of(0, 7).statistics()
    assert (found.mean, found.maximum, found.last, found.gradient_norm_mean) == (2.4375, 3.0, 1.5, 1.875)
    assert (found.steps, found.nonfinite_steps, found.healthy) == (7, 3, False)


def test_loss_window_of_nothing() -> None:
    found = LossWindow().statistics()
    assert (found.mean, found.maximum, found.last, found.steps, found.healthy) == (None, None, None, 0, True)


@pytest.mark.parametrize("cut", range(8))
def test_loss_window_carried_over_an_ephemeral_snapshot_is_that_of_all_steps(cut: int) -> None:
    # Exact in float64: sums of quarters.
    assert window_of(cut, 7, window_of(0, cut)).statistics() == window_of(0, 7).statistics()


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_ephemeral_seconds_impossible_values_are_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"snapshots\.ephemeral_seconds"):
        SnapshotConfig(ephemeral_seconds=seconds)
