"""Calibration of margins: the temperature, and the three measures worked by hand."""

import numpy as np
import pytest
from scipy.special import expit

from clha.rewards.calibration import fit_temperature, measure, reliability


def labelled(factor: float, count: int, seed: int) -> np.ndarray:
    """Margins of pairs whose label is right with probability sigmoid(factor * margin)."""
    draw = np.random.default_rng(seed)
    d = draw.normal(0, 2, count)
    return np.where(draw.random(count) < expit(factor * d), d, -d)


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0])
def test_the_factor_that_made_the_labels_is_found(factor: float) -> None:
    assert fit_temperature(labelled(factor, 20_000, 0)) == pytest.approx(factor, rel=0.06)


def test_calibration_brings_the_error_down() -> None:
    d = labelled(0.3, 20_000, 1)
    before, after = measure(d), measure(d * fit_temperature(d))
    assert after.ece < 0.02 < before.ece
    assert after.nll < before.nll
    assert after.brier < before.brier


def test_measures_worked_by_hand() -> None:
    """One margin of log 3: p = 0.75 in one bin (seen 1), 0.25 in another (seen 0): ECE 0.25, Brier 1/16."""
    found = measure(np.array([np.log(3)]))
    assert found.ece == pytest.approx(0.25)
    assert found.brier == pytest.approx(0.0625)
    assert found.nll == pytest.approx(-np.log(0.75))


def test_both_orders_of_a_pair_make_the_diagram_symmetric() -> None:
    predicted, observed, mass = reliability(labelled(1.0, 5000, 2))
    assert predicted == pytest.approx(1 - predicted[::-1])
    assert observed == pytest.approx(1 - observed[::-1])
    assert mass == pytest.approx(mass[::-1])


def test_a_faultless_judge_of_few_pairs_is_not_certain() -> None:
    """Platt's prior: 10 pairs, all right, count as 11 of 12, so p stays near 11/12."""
    d = np.ones(10)
    assert expit(fit_temperature(d) * 1.0) == pytest.approx(11 / 12, abs=1e-3)


def test_a_judge_worse_than_chance_gets_hardly_any_weight() -> None:
    d = -np.abs(labelled(1.0, 1000, 3))
    assert np.abs(d * fit_temperature(d)).max() < 0.01


def test_margins_of_zero_need_no_factor() -> None:
    assert fit_temperature(np.zeros(5)) == 1.0
