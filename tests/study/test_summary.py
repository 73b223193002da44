"""Paired gains worked by hand."""

import numpy as np
import pytest
from scipy.stats import t as student

from clha.errors import UserError
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


def test_seeds_that_differ_widen_the_interval_worked_by_hand() -> None:
    """Two seeds, three pairs: differences (1, 1, 0) and (0, 0, -1); the gain is 1/6.

    Means of pairs 1/2, 1/2, -1/2: variance 1/3, over 3: 1/9. Means of seeds 2/3, -1/3: variance 1/2, over 2: 1/4. No
    rest. The error is sqrt(13/36); degrees of freedom (13/36)^2 / ((1/9)^2 / 2 + (1/4)^2 / 1) = 1.8987.
    """
    arm = [np.array([True, True, True]), np.array([False, True, False])]
    base = [np.array([False, False, True]), np.array([False, True, True])]
    found = paired_gain(arm, base, ["a", "b", "c"])
    assert found["gain"] == pytest.approx(1 / 6)
    half = student.ppf(0.975, 1.8987) * np.sqrt(13 / 36)
    assert found["interval"] == pytest.approx([1 / 6 - half, 1 / 6 + half], rel=1e-3)


def test_three_seeds_cover_what_another_three_would_show() -> None:
    """Gains of 0.05 that seeds move by 0.1: of 100 intervals about 92 hold 0.05, those of the pairs alone 60."""
    draw, both, pairs_only = np.random.default_rng(0), 0, 0
    names = [str(i) for i in range(200)]
    for _ in range(100):
        shift = 0.05 + draw.normal(0, 0.1, (3, 1))
        arm, base = draw.random((3, 200)) < 0.5 + shift, draw.random((3, 200)) < 0.5
        low, high = paired_gain(list(arm), list(base), names)["interval"]
        both += low <= 0.05 <= high
        of_pairs = (arm.astype(float) - base).mean(axis=0)
        pairs_only += abs(of_pairs.mean() - 0.05) <= 1.96 * of_pairs.std() / np.sqrt(200)
    assert 85 <= both <= 99 and pairs_only < 70, (both, pairs_only)


def test_pairs_of_one_dialogue_alone_are_a_clear_error():
    right = np.array([True, False, True])
    with pytest.raises(UserError, match="all held-out pairs are of one dialogue; raise noise_study.test_pairs"):
        paired_gain([right], [~right], ["same"] * 3)
