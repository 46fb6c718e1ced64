"""Forecasts of annealing, on runs whose losses are made by a known law."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.evaluation.anneal_forecast import Anneal, BackTest, back_test, predict
from tasks.evaluation.annealing_law import AnnealingLaw, LossCurve

WARMUP, PEAK, LENGTH = 100, 3e-3, 400
TRUTH = AnnealingLaw(floor=1.05, scale=0.9, exponent=0.6, annealing=0.5, decay=0.99, error=0.0)
OFFSET = -0.02
"""Annealed less merged loss in the runs made here."""


def rates(fork: int | None, steps: int) -> np.ndarray:
    done = np.arange(1, steps + 1) - 0.5
    decay = np.ones_like(done) if fork is None else np.clip((fork + LENGTH - done) / LENGTH, 0, 1)
    return PEAK * np.minimum(1, done / WARMUP) * decay


def curve(fork: int | None, steps: int, *, first: int = 50) -> LossCurve:
    learning_rates, at = rates(fork, steps), tuple(range(first, steps + 1, 50))
    losses = tuple(TRUTH.loss_at(learning_rates, WARMUP, step) for step in at)
    return LossCurve(learning_rates=learning_rates, warmup_steps=WARMUP, steps=at, losses=losses)


TRUNK = curve(None, 2400)


def anneal(fork: int, offset: float = OFFSET) -> Anneal:
    branch = curve(fork, fork + LENGTH, first=fork + 50)
    raw = dict(zip(TRUNK.steps, TRUNK.losses, strict=True))[fork + LENGTH]
    return Anneal(
        name=f"from {fork}",
        fork_step=fork,
        end_step=fork + LENGTH,
        curve=branch,
        raw=raw,
        merged=branch.losses[-1] - offset,
    )


REAL = [anneal(fork) for fork in (600, 1000, 1400, 1800)]


def test_predictors_that_know_the_truth_find_it() -> None:
    said = predict(REAL[-1], TRUNK, REAL[:-1]).losses
    truth = REAL[-1].annealed
    assert said["merged_with_offset"] == pytest.approx(truth, abs=1e-9)
    assert said["law"] == pytest.approx(truth, abs=1e-3)
    assert said["combined"] == pytest.approx(truth, abs=1e-3)
    assert said["merged"] == pytest.approx(truth - OFFSET)
    assert said["raw"] > truth + 0.05


def test_back_test_never_shows_an_anneal_to_its_own_prediction() -> None:
    """One anneal is off by 0.3: its own prediction must miss by that, and the others' by a third of it."""
    odd = [*REAL[:3], anneal(1800, offset=OFFSET + 0.3)]
    errors = back_test(odd, TRUNK)["merged_with_offset"].errors
    assert errors["from 1800"] == pytest.approx(-0.3)
    assert errors["from 600"] == pytest.approx(0.1)


def test_back_test_of_the_naive_predictors_is_their_offset() -> None:
    tests = back_test(REAL, TRUNK)
    assert tests["merged"].mean_absolute == pytest.approx(abs(OFFSET))
    assert tests["raw"].mean_absolute > tests["merged"].mean_absolute > tests["combined"].mean_absolute


def test_back_test_in_time_has_nothing_for_the_first_anneal() -> None:
    errors = back_test(REAL, TRUNK, only_earlier=True)["merged_with_offset"].errors
    assert set(errors) == {"from 1000", "from 1400", "from 1800"}


def test_without_a_real_anneal_it_says_what_it_cannot_know() -> None:
    thought = Anneal(
        name="",
        fork_step=2000,
        end_step=2400,
        curve=LossCurve(learning_rates=rates(2000, 2400), warmup_steps=WARMUP, steps=(), losses=()),
        raw=1.2,
        merged=1.15,
    )
    said = predict(thought, TRUNK, [])
    assert said.losses == {"raw": 1.2, "merged": 1.15}
    assert "no real anneal" in said.unknown["merged_with_offset"]
    assert "no real anneal" in said.unknown["law"]
    assert set(said.unknown) == {"merged_with_offset", "law", "combined"}


def test_dip_of_a_rewarm_is_no_anneal_to_learn_from() -> None:
    learning_rates = TRUNK.learning_rates.copy()
    learning_rates[1000:1050] = np.linspace(0, PEAK, 50)
    dipped = LossCurve(learning_rates=learning_rates, warmup_steps=WARMUP, steps=TRUNK.steps, losses=TRUNK.losses)
    assert "law" not in predict(REAL[-1], dipped, []).losses


def test_missing_merge_is_named_by_its_step() -> None:
    lacking = Anneal(name="x", fork_step=600, end_step=1000, curve=REAL[0].curve, raw=1.2, merged=None)
    said = predict(lacking, TRUNK, REAL[1:])
    assert "step 1,000" in said.unknown["merged"]
    assert "merged_with_offset" not in said.losses and "law" in said.losses


def test_interval_needs_two_anneals_and_holds_its_level() -> None:
    assert BackTest(errors={"a": 0.1}).half_width() is None
    # t of one degree of freedom at 97.5 % is 12.706.
    assert BackTest(errors={"a": 0.1, "b": -0.1}).half_width() == pytest.approx(1.2706, rel=1e-4)
    draws = np.random.default_rng(1).normal(0, 0.01, (2000, 6))
    held = [
        abs(row[5]) <= (BackTest(errors={str(i): x for i, x in enumerate(row[:5])}).half_width() or 0.0)
        for row in draws
    ]
    assert 0.93 < np.mean(held) < 0.99
