"""Paired gains worked by hand, and tables that say what was found."""

import numpy as np
import pytest

from clha.study.summary import paired_gain, study_tables


def test_a_gain_worked_by_hand() -> None:
    """Two seeds, four pairs: differences (1+0)/2, (1+1)/2, 0, (-1+0)/2; mean 1/4."""
    arm = [np.array([True, True, True, False]), np.array([True, True, False, True])]
    base = [np.array([False, False, True, True]), np.array([True, False, False, True])]
    found = paired_gain(arm, base, ["a", "b", "c", "d"])
    assert found["gain"] == 0.25
    assert found["interval"][0] < 0.25 < found["interval"][1]
    assert (found["pairs"], found["seeds"]) == (4, 2)


def test_the_interval_has_the_width_of_the_sample() -> None:
    draw = np.random.default_rng(0)
    arm, base = draw.random(400) < 0.6, draw.random(400) < 0.5
    found = paired_gain([arm], [base], [str(i) for i in range(400)])
    error = (arm.astype(float) - base).std() / 20
    low, high = found["interval"]
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found["smallest_effect"] == pytest.approx(2.8 * error, rel=0.05)


def test_pairs_of_one_dialogue_count_together() -> None:
    arm, base = np.tile([True, False], 100), np.tile([False, False], 100)
    apart = paired_gain([arm], [base], [str(i) for i in range(200)])
    together = paired_gain([arm], [base], [str(i // 100) for i in np.argsort(~arm, kind="stable").argsort()])
    assert together["smallest_effect"] > 3 * apart["smallest_effect"]


def test_the_tables_hold_every_cell() -> None:
    detection = {
        "rate": 0.4, "seed": 1, "arm": "clean", "accuracy": 0.66, "accuracy_interval": [0.6, 0.7], "auroc": 0.71,
        "auroc_interval": [0.66, 0.75], "auprc": 0.6, "auprc_interval": [0.5, 0.7], "theory_auroc": 0.72,
        "flip_rate": 0.37, "flip_rate_interval": [0.2, 0.45],
    }  # fmt: skip
    gain = {"gain": 0.03, "interval": [-0.01, 0.07], "smallest_effect": 0.06}
    training = [
        {"rate": 0.4, "weights": "none", "accuracy": 0.55},
        {"rate": 0.4, "weights": "calibrated", "accuracy": 0.58, "gain": gain},
    ]
    text = study_tables({"detection": [detection], "training": training})
    assert "| 40% (seed 1) | clean | 0.660 [0.600, 0.700] | 0.710 [0.660, 0.750] | 0.720 |" in text
    assert "| 40% | calibrated | 0.580 | +0.030 [-0.010, +0.070] | 0.060 |" in text
