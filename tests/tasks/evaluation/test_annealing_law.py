"""The law of loss under a schedule: its areas by hand, its parameters and forecasts back from curves that it made."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.evaluation.annealing_law import AnnealingLaw, LawUnknown, LossCurve, areas, fit_law

WARMUP, STEPS, PEAK = 100, 2000, 3e-3
TRUTH = AnnealingLaw(floor=1.05, scale=0.9, exponent=0.6, annealing=0.055, decay=0.99, error=0.0)


def rates(fork: int | None, length: int = 400, steps: int = STEPS) -> np.ndarray:
    """Warm-up, constant, and from ``fork`` on a linear decay to nothing."""
    done = np.arange(1, (fork + length if fork else steps) + 1) - 0.5
    decay = np.ones_like(done) if fork is None else np.clip((fork + length - done) / length, 0, 1)
    return PEAK * np.minimum(1, done / WARMUP) * decay


def curve(fork: int | None, noise: float = 0.0, seed: int = 0) -> LossCurve:
    learning_rates = rates(fork)
    steps = tuple(range(50, len(learning_rates) + 1, 50))
    draws = np.random.default_rng(seed).normal(0, noise, len(steps))
    losses = tuple(TRUTH.loss_at(learning_rates, WARMUP, s) + x for s, x in zip(steps, draws, strict=True))
    return LossCurve(learning_rates=learning_rates, warmup_steps=WARMUP, steps=steps, losses=losses)


def test_areas_are_the_sums_of_the_definition() -> None:
    eta, decay = np.array([1.0, 2.0, 2.0, 1.5, 1.5, 0.5]), 0.5
    total, annealed = areas(eta, warmup_steps=2, decay=decay)
    assert total.tolist() == [1.0, 3.0, 5.0, 6.5, 8.0, 8.5]
    by_hand = [
        sum((eta[k - 1] - eta[k]) * decay ** (i - k) for i in range(6) for k in range(3, i + 1) if i <= s)
        for s in range(6)
    ]
    assert annealed == pytest.approx(by_hand)


def test_rise_in_warmup_does_not_count() -> None:
    _, annealed = areas(rates(None), WARMUP, 0.99)
    assert np.abs(annealed).max() < 1e-12


def test_forecast_of_an_anneal_that_was_not_fitted_is_the_truth() -> None:
    law = fit_law([curve(None), curve(800)])
    other = rates(1600)
    assert law.decay == TRUTH.decay
    assert law.loss_at(other, WARMUP, 2000) == pytest.approx(TRUTH.loss_at(other, WARMUP, 2000), abs=1e-4)


def test_noise_of_a_hundredth_leaves_a_forecast_within_it() -> None:
    errors = []
    for seed in range(5):
        law = fit_law([curve(None, 0.01, seed), curve(800, 0.01, 100 + seed), curve(1200, 0.01, 200 + seed)])
        other = rates(1600)
        errors.append(law.loss_at(other, WARMUP, 2000) - TRUTH.loss_at(other, WARMUP, 2000))
    assert max(abs(error) for error in errors) < 0.02


def test_one_outlier_does_not_decide() -> None:
    clean, other = curve(800), rates(1600)
    losses = (*clean.losses[:10], clean.losses[10] + 2.0, *clean.losses[11:])
    spiked = LossCurve(learning_rates=clean.learning_rates, warmup_steps=WARMUP, steps=clean.steps, losses=losses)
    law = fit_law([curve(None), spiked])
    assert law.loss_at(other, WARMUP, 2000) == pytest.approx(TRUTH.loss_at(other, WARMUP, 2000), abs=5e-3)


def test_constant_learning_rate_alone_is_refused() -> None:
    with pytest.raises(LawUnknown, match="never fell"):
        fit_law([curve(None)])


def test_too_few_points_are_refused_with_their_number() -> None:
    full = curve(800)
    few = LossCurve(
        learning_rates=full.learning_rates, warmup_steps=WARMUP, steps=full.steps[:5], losses=full.losses[:5]
    )
    # Two of the five lie in warm-up.
    with pytest.raises(LawUnknown, match="3 losses after warm-up"):
        fit_law([few])


def test_steps_beyond_the_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to 2000"):
        LossCurve(learning_rates=rates(None), warmup_steps=WARMUP, steps=(2001,), losses=(1.0,))
