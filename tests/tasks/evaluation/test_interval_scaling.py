"""The power law of V: exact on points of one, the paper's own points, and what too few points say."""

from __future__ import annotations

import pytest

from tasks.evaluation.interval_scaling import PAPER_DENSE, PAPER_MOE, fit_power_law


def test_points_of_a_power_law_are_met() -> None:
    law = fit_power_law([(size, 3.0 * size**0.7) for size in (1e6, 1e7, 5e8, 1e9)])
    assert law is not None and law.exponent_interval is not None
    assert law.coefficient == pytest.approx(3.0) and law.exponent == pytest.approx(0.7)
    assert law.exponent_interval[0] == pytest.approx(0.7, abs=1e-6)
    assert law.at(2e8) == pytest.approx(3.0 * 2e8**0.7)


def test_the_papers_values() -> None:
    moe, dense = fit_power_law(PAPER_MOE), fit_power_law(PAPER_DENSE)
    assert moe is not None and dense is not None
    assert moe.exponent == pytest.approx(1.13, abs=0.01) and moe.at(1e9) == pytest.approx(5.97e9, rel=0.01)
    assert dense.exponent == pytest.approx(0.59, abs=0.01) and dense.at(1e9) == pytest.approx(3.5e9, rel=0.03)


def test_scatter_widens_the_interval_and_two_points_have_none() -> None:
    law = fit_power_law([(1e6, 1.0), (1e7, 5.0), (1e8, 6.0), (1e9, 40.0)])
    assert law is not None and law.exponent_interval is not None
    assert law.exponent_interval[0] < law.exponent < law.exponent_interval[1]
    two = fit_power_law([(1e6, 1.0), (1e7, 10.0)])
    assert two is not None and two.exponent == pytest.approx(1.0) and two.exponent_interval is None


def test_one_size_has_no_law() -> None:
    assert fit_power_law([(1e6, 1.0), (1e6, 2.0)]) is None
    assert fit_power_law([]) is None
