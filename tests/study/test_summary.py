"""Paired gains worked by hand."""

import numpy as np
import pytest

from clha.study.summary import paired_gain


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
