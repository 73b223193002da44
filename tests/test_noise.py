"""The arithmetic of trust: what must hold for any rewards, and cases worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit
from scipy.stats import norm

from clha import noise

finite = st.floats(-50, 50, allow_nan=False)
rewards = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=finite)
members = arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=finite)
rates = st.floats(0.01, 0.49)


def ranked(r: np.ndarray) -> np.ndarray:
    return np.take_along_axis(r, noise.rank_by_reward(r), axis=1)


# The reference rule.


def test_the_masks_of_the_paper_worked_by_hand() -> None:
    """4.581, 2.390, -0.612 with gap 3: 4.581 - 2.390 = 2.191 is noise, 5.193 and 3.002 are not."""
    weights = noise.gap_weights(np.array([[4.581, 2.390, -0.612]]), 3.0)
    assert weights.tolist() == [[[0, 0, 1], [0, 0, 1], [0, 0, 0]]]


@given(rewards, st.floats(0, 10))
def test_the_gap_rule_is_the_strict_comparison_of_each_pair(r: np.ndarray, gap: float) -> None:
    r = ranked(r)
    weights = noise.gap_weights(r, gap)
    for p in range(r.shape[0]):
        for k in range(r.shape[1]):
            for j in range(r.shape[1]):
                assert weights[p, k, j] == (1.0 if k < j and abs(r[p, k] - r[p, j]) > gap else 0.0)


def test_a_difference_of_exactly_the_gap_and_a_reward_of_exactly_the_threshold_are_off() -> None:
    assert noise.gap_weights(np.array([[3.0, 0.0]]), 3.0).sum() == 0
    assert noise.threshold_lambda(np.array([0.0, 1e-9, -1.0]), 0.0).tolist() == [0, 1, 0]


@given(rewards)
def test_ranking_by_reward_sorts_and_keeps_ties_in_order(r: np.ndarray) -> None:
    order = noise.rank_by_reward(np.round(r))
    for row, o in zip(np.round(r), order, strict=True):
        assert sorted(o) == list(range(len(row)))
        keys = [(-row[i], i) for i in o]
        assert keys == sorted(keys)


def test_ranking_by_label_puts_chosen_first_and_unlabelled_last() -> None:
    order = noise.rank_by_label(np.array([[9.0, 1.0, 5.0, 2.0]]), np.array([[0, -1, 1, 1]]))
    assert order.tolist() == [[2, 3, 1, 0]]


def test_the_quantile_gap_is_the_quantile_of_all_pair_gaps() -> None:
    """Rewards 5, 3, 0 and 1, 1, 1: gaps 2, 5, 3, 0, 0, 0; their median is 1."""
    gaps = noise.pair_gaps(np.array([[5.0, 3.0, 0.0], [1.0, 1.0, 1.0]]))
    assert sorted(gaps) == [0, 0, 0, 2, 3, 5]
    assert noise.quantile_gap(gaps, 0.5) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_no_number_is_refused(bad: float) -> None:
    r = np.array([[1.0, bad]])
    for call in (
        lambda: noise.rank_by_reward(r),
        lambda: noise.gap_weights(r, 1.0),
        lambda: noise.all_ones(r),
        lambda: noise.threshold_lambda(r[0], 0.0),
        lambda: noise.pair_probability(r[..., None], np.ones(1)),
        lambda: noise.fit_flip_rate(r[0]),
    ):
        with pytest.raises(ValueError, match="not finite"):
            call()


# Probabilities.


def test_one_model_worked_by_hand() -> None:
    """d = 2, a = 0.5: l = 1, p = 1 / (1 + e^-1) = 0.731059, w = 0.462117."""
    p = noise.pair_probability(np.array([2.0]), np.array([0.5]))
    assert p == pytest.approx(0.731058578630005)
    assert noise.trust_weight(p) == pytest.approx(0.46211715726001)


def test_an_ensemble_worked_by_hand() -> None:
    """l = (1, 3): mean 2, s^2 = 2; 2 / sqrt(1 + pi 2 / 8) = 2 / sqrt(1.785398) = 1.496795; p = 0.817096."""
    p = noise.pair_probability(np.array([1.0, 3.0]), np.ones(2))
    assert p == pytest.approx(expit(2 / np.sqrt(1 + np.pi / 4)))
    assert p == pytest.approx(0.817096, abs=1e-6)


def test_the_annotator_formula_worked_by_hand() -> None:
    """p = 0.8, e = 0.25: 0.6 / (0.6 + 0.05) = 12/13."""
    assert noise.label_probability(np.array(0.8), 0.25) == pytest.approx(12 / 13)


@pytest.mark.parametrize("e", [0.0, 1.0, -0.1])
def test_a_flip_rate_of_zero_or_beyond_is_refused(e: float) -> None:
    with pytest.raises(ValueError, match="flip_rate must lie between 0 and 1"):
        noise.label_probability(np.array(0.8), e)


@pytest.mark.parametrize("bad", [np.inf, np.nan, 0.0, -1.0])
def test_a_factor_that_is_not_finite_or_not_above_zero_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="calibration factors must be finite and above 0"):
        noise.pair_probability(np.zeros((3, 2)), np.array([1.0, bad]))


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1, np.inf])
def test_what_is_no_probability_becomes_no_weight(bad: float) -> None:
    p = np.array([[0.5, bad], [0.9, 1.0]])
    with pytest.raises(ValueError, match="a probability is NaN or lies outside"):
        noise.label_probability(p, 0.25)
    with pytest.raises(ValueError, match="a probability is NaN or lies outside"):
        noise.trust_weight(p)


@given(members, st.floats(0.01, 5))
def test_swapping_the_pair_gives_one_minus_p(d: np.ndarray, factor: float) -> None:
    factors = np.full(d.shape[-1], factor)
    total = noise.pair_probability(d, factors) + noise.pair_probability(-d, factors)
    assert np.allclose(total, 1, atol=1e-12)


@given(st.floats(0, 1), rates)
def test_swapping_a_labelled_pair_swaps_what_is_known_but_not_who_labelled(p: float, e: float) -> None:
    """The labelled order and its opposite, labelled by annotators who are right with 1-e and with e."""
    right = noise.label_probability(np.array(p), e)
    opposite = noise.label_probability(np.array(1 - p), 1 - e)
    assert right + opposite == pytest.approx(1)


@given(rewards, st.floats(-100, 100), st.floats(0, 3))
def test_a_constant_added_to_a_prompt_changes_no_pair(r: np.ndarray, shift: float, gap: float) -> None:
    r, shift = np.round(ranked(r) * 8) / 8, np.round(shift)  # so that the sums are exact
    gap = np.round(gap * 8) / 8
    assert (noise.gap_weights(r, gap) == noise.gap_weights(r + shift, gap)).all()
    p, q = (noise.pair_probability(noise.differences(x)[..., None], np.ones(1)) for x in (r, r + shift))
    assert (p == q).all()


@given(arrays(np.float64, 20, elements=st.floats(0, 30)), st.floats(0.01, 5))
def test_in_reward_order_p_is_at_least_a_half_and_weights_grow_with_the_margin(d: np.ndarray, factor: float) -> None:
    p = noise.pair_probability(np.sort(d)[:, None], np.array([factor]))
    assert (p >= 0.5).all()
    assert (np.diff(noise.trust_weight(p)) >= 0).all()


@given(members)
def test_disagreement_only_takes_confidence_away(d: np.ndarray) -> None:
    together = np.repeat(d.mean(axis=-1, keepdims=True), 2, axis=-1)
    ones = np.ones(d.shape[-1])
    apart = np.abs(noise.pair_probability(d, ones) - 0.5)
    assert (apart <= np.abs(noise.pair_probability(together, np.ones(2)) - 0.5) + 1e-12).all()


@given(st.floats(0, 1), rates)
def test_trusting_annotators_more_trusts_labels_more(p: float, e: float) -> None:
    assert noise.label_probability(np.array(p), e) >= noise.label_probability(np.array(p), 0.5) - 1e-12
    assert noise.label_probability(np.array(p), 0.5) == pytest.approx(p)


@given(arrays(np.float64, st.integers(1, 50), elements=st.floats(0, 1)))
def test_weights_stay_between_none_and_one(p: np.ndarray) -> None:
    w = noise.trust_weight(p)
    assert ((w >= 0) & (w <= 1)).all()
    assert (w[p <= 0.5] == 0).all()


# Sums.


def test_effective_sample_size_worked_by_hand() -> None:
    """Weights 1, 1, 2: (4)^2 / 6 = 2.667."""
    assert noise.effective_sample_size(4, 6) == pytest.approx(16 / 6)
    assert noise.effective_sample_size(0, 0) == 0


def test_pairs_are_counted_by_distance_and_a_soft_pair_once() -> None:
    weights = np.zeros((1, 3, 3))
    weights[0, 0, 1], weights[0, 1, 0], weights[0, 0, 2] = 0.7, 0.3, 1.0
    assert noise.count_pairs(weights) == ({1: 2, 2: 1}, {1: 1, 2: 1})


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0.01, 1)))
def test_normalised_weights_have_mean_one(w: np.ndarray) -> None:
    assert (w * noise.mean_one_scale(w.sum(), len(w))).mean() == pytest.approx(1)


# Finding flipped labels.


def test_auroc_and_auprc_worked_by_hand() -> None:
    """Scores 4, 3, 2, 1, the first and the third are positive: 3 of 4 pairs in order; precision 1/1 and 2/3."""
    scores, truth = np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False])
    assert noise.auroc(scores, truth) == 0.75
    assert noise.auprc(scores, truth) == pytest.approx((1 + 2 / 3) / 2)


def test_ties_count_half_and_tied_scores_share_their_precision() -> None:
    scores, truth = np.zeros(4), np.array([True, False, True, False])
    assert noise.auroc(scores, truth) == 0.5
    assert noise.auprc(scores, truth) == 0.5


@pytest.mark.parametrize(
    ("accuracy", "expected"), [(0.60, 0.640), (0.65, 0.707), (0.70, 0.771), (0.80, 0.883), (0.90, 0.965)]
)
def test_theory_values(accuracy: float, expected: float) -> None:
    assert noise.theory_auroc(accuracy) == pytest.approx(expected, abs=5e-4)


def gaussian_margins(accuracy: float, flip_rate: float, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Margins of a reward model of that accuracy along flipped labels, and which labels are flipped."""
    draw = np.random.default_rng(seed)
    true = draw.normal(norm.ppf(accuracy), 1, pairs)
    flipped = draw.random(pairs) < flip_rate
    return np.where(flipped, -true, true), flipped


@pytest.mark.parametrize("accuracy", [0.60, 0.65, 0.70, 0.80, 0.90])
@pytest.mark.parametrize("flip_rate", [0.2, 0.4])
def test_detection_meets_theory_on_gaussian_margins(accuracy: float, flip_rate: float) -> None:
    """The log-odds of N(mu, 1) against N(-mu, 1) are 2 mu d: the calibrated factor. 20,000 pairs, to 0.01."""
    margins, flipped = gaussian_margins(accuracy, flip_rate, 20_000, seed=1)
    p = noise.pair_probability(margins[:, None], np.array([2 * norm.ppf(accuracy)]))
    found = noise.auroc(1 - noise.label_probability(p, flip_rate), flipped)
    assert found == pytest.approx(noise.theory_auroc(accuracy), abs=0.01)


@pytest.mark.parametrize("flip_rate", [0.1, 0.25, 0.4])
def test_the_flip_rate_is_found_where_calibration_is_known(flip_rate: float) -> None:
    """The margins of clean labels are such that sigmoid(a d) is the probability that they are right."""
    margins, _ = gaussian_margins(0.8, flip_rate, 20_000, seed=2)
    found = noise.fit_flip_rate(margins, factor=2 * norm.ppf(0.8))
    assert found.estimate == pytest.approx(flip_rate, abs=0.02)
    assert found.low <= found.estimate <= found.high
    assert found.high - found.low < 0.1


def test_flip_rate_and_factor_are_found_together_from_a_strong_model() -> None:
    """Labels drawn from sigmoid(2 d), then flipped with 0.2: heavy margins tell the flips from honest doubt."""
    draw = np.random.default_rng(3)
    d = draw.normal(0, 3, 20_000)
    better = draw.random(20_000) < expit(2 * d)
    kept = draw.random(20_000) >= 0.2
    found = noise.fit_flip_rate(np.where(better == kept, d, -d))
    assert found.estimate == pytest.approx(0.2, abs=0.02)
    assert found.factor == pytest.approx(2, rel=0.15)


def test_a_weak_model_says_so_by_a_wide_interval() -> None:
    margins, _ = gaussian_margins(0.55, 0.2, 500, seed=4)
    found = noise.fit_flip_rate(margins)
    assert found.high - found.low > 0.3


def labels_with_flips(count: int, size: float, factor: float, e: float, draw: np.random.Generator) -> np.ndarray:
    """Margins of labels drawn from sigmoid(factor d), d ~ N(0, size^2), and flipped with e."""
    d = draw.normal(0, size, count)
    right = draw.random(count) < expit(factor * d)
    kept = draw.random(count) >= e
    return np.asarray(np.where(right == kept, d, -d))


@pytest.mark.parametrize("count", [500, 5_000, 20_000])
def test_the_interval_covers_the_flip_rate_however_narrow_it_is(count: int) -> None:
    """95 of 100 are expected. Bounds taken from points of a grid lie inside the interval: 30 of 100 at 20,000 pairs."""
    draw = np.random.default_rng(count)
    found = [noise.fit_flip_rate(labels_with_flips(count, 2, 1, 0.2, draw), 1.0) for _ in range(100)]
    assert 90 <= sum(f.low <= 0.2 <= f.high for f in found) <= 99


def test_the_interval_ends_where_the_likelihood_has_fallen_by_1_92() -> None:
    d = labels_with_flips(20_000, 3, 2, 0.2, np.random.default_rng(0))
    found = noise.fit_flip_rate(d, 2.0)

    def likelihood(e: float) -> float:
        return float(np.log((1 - e) * expit(2 * d) + e * expit(-2 * d)).sum())

    top = likelihood(found.estimate)
    assert top >= max(likelihood(e) for e in np.linspace(0.15, 0.25, 101)) - 1e-6
    assert [top - likelihood(e) for e in (found.low, found.high)] == pytest.approx([1.9207, 1.9207], abs=1e-3)


def test_the_width_is_that_of_the_information_worked_by_hand() -> None:
    """Where every margin decides (|a d| = 30) e is a share of 20,000: its error is sqrt(0.2 * 0.8 / 20,000)."""
    d = np.where(np.arange(20_000) < 4_000, -1.0, 1.0)
    found = noise.fit_flip_rate(d, 30.0)
    assert found.estimate == pytest.approx(0.2, abs=1e-5)
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.16 / 20_000), rel=0.01)


def test_the_joint_interval_covers_too() -> None:
    draw = np.random.default_rng(7)
    found = [noise.fit_flip_rate(labels_with_flips(2_000, 3, 1, 0.2, draw)) for _ in range(60)]
    assert 53 <= sum(f.low <= 0.2 <= f.high for f in found) <= 60


def test_a_factor_fitted_on_the_same_labels_is_not_taken_for_known() -> None:
    """A weak model, 500 pairs: with its own factor taken as known the interval looks sure, and misses the truth."""
    joint, sure = [], []
    for seed in range(20):
        margins, _ = gaussian_margins(0.62, 0.3, 500, seed)
        joint.append(noise.fit_flip_rate(margins))
        sure.append(noise.fit_flip_rate(margins, joint[-1].factor))
    assert [j.estimate for j in joint] == pytest.approx([s.estimate for s in sure], abs=2e-3)
    assert all(j.low <= s.low + 1e-5 and s.high <= j.high + 1e-5 for j, s in zip(joint, sure, strict=True))
    covered = [sum(f.low <= 0.3 <= f.high for f in found) for found in (joint, sure)]
    assert covered[0] >= 18 and covered[1] <= 14, covered


def test_the_joint_fit_does_not_depend_on_the_scale() -> None:
    margins = labels_with_flips(1_000, 3, 1, 0.2, np.random.default_rng(1))
    once, scaled = noise.fit_flip_rate(margins), noise.fit_flip_rate(margins * 7)
    assert scaled[:3] == pytest.approx(once[:3], abs=1e-4)
    assert scaled.factor == pytest.approx(once.factor / 7, rel=1e-2)


def test_a_factor_without_an_end_stops_and_says_so() -> None:
    """Margins from 0.01 to 1, each fifth label flipped: the smallest ones are as right, so no factor is too large."""
    margins = np.linspace(0.01, 1, 1000) * np.where(np.arange(1000) % 5 == 2, -1, 1)
    found = noise.fit_flip_rate(margins)
    size = np.sqrt(np.mean(np.square(margins)))
    assert found.at_limit and found.factor == pytest.approx(noise.FACTOR_LIMITS[1] / size, rel=0.01)
    assert found.low < 0.2 < found.high
    assert not noise.fit_flip_rate(labels_with_flips(5_000, 3, 1, 0.2, np.random.default_rng(0))).at_limit
    assert not noise.fit_flip_rate(margins, 1e4).at_limit, "it was given"


def test_margins_of_nothing_but_zeros_say_nothing_about_flips() -> None:
    assert noise.fit_flip_rate(np.zeros(10))[:3] == (noise.FLIP_LIMITS[1], *noise.FLIP_LIMITS)


@given(arrays(np.float64, st.integers(2, 40), elements=st.floats(-5, 5)), rates)
def test_the_fitted_factor_is_a_maximum(d: np.ndarray, e: float) -> None:
    a = noise.fit_factor(d, e)
    assert a > 0

    def likelihood(x: float) -> float:
        return float(np.log((1 - e) * expit(x * d) + e * expit(-x * d)).sum())

    size = np.sqrt(np.mean(np.square(d)))
    if size > 1e-6 and 2e-3 < a * size < 9:
        assert likelihood(a) >= max(likelihood(a * 1.01), likelihood(a / 1.01)) - 1e-6
