"""Paired statistics against cases that can be worked out by hand."""

import numpy as np
import pytest

from clha.evaluation import statistics as stats


def test_resampled_means_of_two_prompts_have_the_three_values_that_two_draws_can_give() -> None:
    """Differences 0 and 1: two draws give 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    means = stats.bootstrap_means(np.array([[0.0], [1.0]]), 20_000, seed=1)[:, 0]
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    # Standard error of a share of 20,000 draws: at most 0.0036.
    assert np.allclose(counts / 20_000, [0.25, 0.5, 0.25], atol=0.015)


def test_the_percentile_interval_meets_the_normal_one_for_many_prompts() -> None:
    """Mean of 2,000 differences with standard deviation s: +-1.96 s / sqrt(2,000)."""
    d = np.random.default_rng(0).normal(0.3, 2.0, 2000)
    gain = stats.paired_gain(np.zeros(2000), d, 10_000, seed=0)
    half = 1.96 * d.std() / np.sqrt(2000)
    assert gain.value == pytest.approx(d.mean())
    assert gain.low == pytest.approx(d.mean() - half, abs=0.01)
    assert gain.high == pytest.approx(d.mean() + half, abs=0.01)


def test_the_interval_covers_the_true_gain_about_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for i in range(300):
        gain = stats.paired_gain(np.zeros(60), rng.normal(0.2, 1.0, 60), 1000, seed=i)
        hits += gain.low <= 0.2 <= gain.high
    assert 0.90 <= hits / 300 <= 0.98


def test_pairs_stay_together_so_that_what_prompts_share_does_not_widen_the_interval() -> None:
    """Prompts differ by 100, policies by exactly 1: every resampling has the mean difference 1."""
    base = np.random.default_rng(0).normal(0, 100, 50)
    assert stats.paired_gain(base, base + 1, 500, seed=0) == pytest.approx((1.0, 1.0, 1.0))


def test_equal_rewards_give_a_gain_and_an_interval_of_exactly_zero() -> None:
    same = np.full(7, 0.1)
    assert stats.paired_gain(same, same, 100, seed=0) == (0.0, 0.0, 0.0)
    assert stats.sign_flip_p(np.zeros(7), 100, seed=0) == 1.0


def test_one_prompt_gives_an_interval_of_one_point_and_no_evidence() -> None:
    assert stats.paired_gain(np.array([1.0]), np.array([3.0]), 50, seed=0) == (2.0, 2.0, 2.0)
    assert stats.sign_flip_p(np.array([2.0]), 50, seed=0) == 1.0


def test_the_seed_alone_decides_the_resamplings() -> None:
    base, trained = np.random.default_rng(0).normal(size=(2, 40))
    first, again = (stats.paired_gain(base, trained, 500, seed=4) for _ in range(2))
    assert first == again
    assert first != stats.paired_gain(base, trained, 500, seed=5)


@pytest.mark.parametrize(
    ("columns", "resamples"), [(np.empty((0, 1)), 10), (np.array([[np.nan]]), 10), (np.ones((2, 1)), 0)]
)
def test_no_prompts_no_resamples_and_nan_are_refused(columns: np.ndarray, resamples: int) -> None:
    with pytest.raises(ValueError):
        stats.bootstrap_means(columns, resamples, seed=0)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        # +-1+-1+-1: of 8 sums two reach 3.
        ([1, 1, 1], 2 / 8),
        # +-1+-2+-3: of 8 sums two reach 6.
        ([1, 2, 3], 2 / 8),
        # 3+1-1 = 3 observed; 5, 3, 3, 1 and their opposites: six of 8 reach 3.
        ([3, 1, -1], 6 / 8),
        # The sum is 0, which every sum reaches.
        ([1, -1], 1.0),
        # A zero changes nothing: as [2, 2], where two of 4 sums reach 4.
        ([2, 2, 0], 2 / 4),
        # Five of one sign: 2 / 2**5.
        ([1, 1, 1, 1, 1], 0.0625),
    ],
)
def test_the_sign_flip_test_is_exact_for_few_prompts(differences: list[float], p: float) -> None:
    assert stats.sign_flip_p(np.array(differences, dtype=float), 100, seed=0) == pytest.approx(p)


def test_random_sign_flips_come_near_the_exact_p_value() -> None:
    d = np.random.default_rng(1).normal(0.35, 1.0, 14)
    exact = stats.sign_flip_p(d, 2**14, seed=0)
    assert stats.sign_flip_p(d, 2**14 - 1, seed=0) == pytest.approx(exact, abs=0.012)
    assert stats.sign_flip_p(-d, 2**14, seed=0) == pytest.approx(exact)


def test_a_p_value_from_random_flips_is_never_zero() -> None:
    assert stats.sign_flip_p(np.ones(40), 999, seed=0) == 1 / 1000


def test_the_standardised_gain_is_in_standard_deviations_of_the_base() -> None:
    """Base 0 and 2 (standard deviation 1), trained 1 and 3: a gain of 1."""
    gain = stats.standardised_gain(np.array([0.0, 2.0]), np.array([1.0, 3.0]), 200, seed=0)
    assert gain is not None
    assert gain.value == pytest.approx(1.0)
    scaled = stats.standardised_gain(np.array([0.0, 20.0]), np.array([10.0, 30.0]), 200, seed=0)
    assert scaled == pytest.approx(gain)


def test_there_is_no_standardised_gain_where_the_base_does_not_vary() -> None:
    assert stats.standardised_gain(np.full(5, 0.1), np.arange(5.0), 100, seed=0) is None


def test_the_length_adjusted_gain_is_the_intercept() -> None:
    """reward difference = 0.5 + 0.1 * length difference, exactly: 0.5 is left at equal length."""
    length = np.array([-3.0, 0.0, 2.0, 8.0, 5.0])
    adjusted = stats.length_adjusted_gain(0.5 + 0.1 * length, length, 400, seed=0)
    assert adjusted is not None
    assert adjusted.slope == pytest.approx(0.1)
    assert adjusted.gain.value == pytest.approx(0.5)
    assert adjusted.gain.low <= 0.5 <= adjusted.gain.high


def test_a_gain_that_is_length_alone_vanishes_at_equal_length() -> None:
    rng = np.random.default_rng(0)
    length = rng.normal(12, 6, 300)
    adjusted = stats.length_adjusted_gain(0.05 * length + rng.normal(0, 0.3, 300), length, 1000, seed=0)
    assert adjusted is not None
    assert adjusted.gain.low < 0 < adjusted.gain.high


@pytest.mark.parametrize("length", [[4, 4, 4, 4], [0, 0, 0, 0]])
def test_equal_length_changes_cannot_be_adjusted_for(length: list[float]) -> None:
    assert stats.length_adjusted_gain(np.arange(4.0), np.array(length, dtype=float), 100, seed=0) is None


def test_judges_agree_where_their_preferences_have_one_sign() -> None:
    """Signs: same, same, other, and one prompt on which the second judge has no preference."""
    agree = stats.agreement(np.array([1.0, -2.0, 1.0, 3.0]), np.array([2.0, -1.0, -1.0, 0.0]))
    assert agree.share is not None
    assert agree.share.value == pytest.approx(2 / 3)
    assert (agree.compared, agree.undecided) == (3, 1)
    # (2 + 2 - 1 + 0) / sqrt(1 + 4 + 1 + 9) / sqrt(4 + 1 + 1 + 0)
    assert agree.correlation == pytest.approx(3 / np.sqrt(15 * 6))
    # Ranks 2.5, 1, 2.5, 4 and 4, 1.5, 1.5, 3.
    assert agree.rank_correlation == pytest.approx(np.corrcoef([2.5, 1, 2.5, 4], [4, 1.5, 1.5, 3])[0, 1])


def test_judges_without_preferences_have_no_agreement() -> None:
    agree = stats.agreement(np.zeros(3), np.ones(3))
    assert agree.share is None
    assert agree.correlation is None
    assert agree.rank_correlation is None
    assert agree.compared == 0


def test_a_difference_up_to_the_tie_is_a_tie() -> None:
    d = np.array([0.2, 0.1, 0.0, -0.1, -0.3])
    assert stats.win_tie_loss(d, 0.1) == (1, 3, 1)
    assert stats.win_tie_loss(d, 0.0) == (2, 1, 2)


def test_the_wilson_interval_of_eight_in_ten() -> None:
    """(0.8 + 3.8415 / 20 +- 1.96 sqrt(0.016 + 3.8415 / 400)) / 1.38415 = 0.717 -+ 0.2265."""
    assert stats.share_estimate(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert stats.share_estimate(0, 0) is None
