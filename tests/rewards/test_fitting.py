"""The Bradley-Terry head: convex fit, honest cross-validation."""

import numpy as np
import pytest
from scipy.special import expit

from clha.rewards.fitting import (
    L2_PATH,
    Standardiser,
    assign_folds,
    bootstrap_members,
    cross_validate,
    cross_validate_members,
    curve_part,
    curve_places,
    fit_head,
    learning_curve,
    length_bias,
    wilson_interval,
)


def pairs(count: int, width: int, seed: int, strength: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 2, D] whose first is preferred with the odds of a true direction [D]."""
    draw = np.random.default_rng(seed)
    direction = draw.normal(size=width)
    direction *= strength / np.linalg.norm(direction)
    features = draw.normal(size=(count, 2, width))
    margin = (features[:, 0] - features[:, 1]) @ direction
    swap = draw.random(count) > expit(margin)
    features[swap] = features[swap][:, ::-1]
    return features, direction


def test_a_head_of_one_feature_worked_by_hand() -> None:
    """Differences 1, 1, 1, -1 without l2: sigmoid(w) = 3/4, so w = log 3."""
    w = fit_head(np.array([[1.0], [1.0], [1.0], [-1.0]]), 1e-12)
    assert w == pytest.approx([np.log(3)], rel=1e-5)


def test_a_weight_of_two_is_the_same_pair_twice() -> None:
    d = np.array([[1.0, 0.3], [-0.5, 1.0], [0.2, -1.0]])
    twice = fit_head(np.concatenate([d, d[:1]]), 0.1)
    assert fit_head(d, 0.1, np.array([2.0, 1.0, 1.0])) == pytest.approx(twice, abs=1e-6)


def test_the_gradient_vanishes_at_the_solution() -> None:
    """d/dw: mean of -(1 - sigmoid(w.d)) d, plus 2 l2 w."""
    features, _ = pairs(200, 10, seed=0)
    d = features[:, 0] - features[:, 1]
    w = fit_head(d, 0.01)
    gradient = -(expit(-(d @ w))[:, None] * d).mean(axis=0) + 0.02 * w
    assert np.abs(gradient).max() < 1e-6


def test_the_true_direction_is_found() -> None:
    features, direction = pairs(4000, 5, seed=1)
    w = fit_head(features[:, 0] - features[:, 1], 1e-6)
    assert w == pytest.approx(direction, abs=0.15)


def test_standardised_features_have_unit_length_on_average() -> None:
    x = np.random.default_rng(0).normal(3, 5, (1000, 7))
    x[:, 2] = 4.0  # never changes: no division by zero
    z = Standardiser.of(x)(x)
    assert np.isfinite(z).all()
    assert np.square(z).sum(axis=1).mean() == pytest.approx(6 / 7, rel=1e-6)


def test_groups_are_never_parted_and_folds_are_even() -> None:
    groups = [f"g{i // 3}" for i in range(60)]
    folds = assign_folds(groups, 5, seed=0)
    assert all(len({f for f, g in zip(folds, groups, strict=True) if g == name}) == 1 for name in set(groups))
    assert np.bincount(folds).tolist() == [12] * 5
    assert (folds != assign_folds(groups, 5, seed=1)).any()


def test_too_few_groups_for_the_folds_are_refused() -> None:
    with pytest.raises(ValueError, match="2 groups of pairs, 5 folds"):
        assign_folds(["a", "b", "a"], 5, seed=0)


def test_cross_validation_sees_only_other_groups() -> None:
    """Features that are noise but the same within a group: a head that saw the group would be right every time."""
    draw = np.random.default_rng(0)
    base = draw.normal(size=(100, 2, 300))
    features = np.repeat(base, 2, axis=0)
    groups = [i // 2 for i in range(200)]
    cv = cross_validate(features, np.ones(200), groups, 1e-3, 5, seed=0)
    assert 0.3 < (cv.margins > 0).mean() < 0.7
    leaky = cross_validate(features, np.ones(200), list(range(200)), 1e-3, 5, seed=0)
    assert (leaky.margins > 0).mean() > 0.9


def test_auto_is_no_worse_than_the_best_by_more_than_its_error_and_agrees_more() -> None:
    features, _ = pairs(300, 100, seed=2)
    cv = cross_validate(features / 10, np.ones(300), list(range(300)), "auto", 5, seed=0)
    chosen = next(p for p in cv.path if p.l2 == cv.l2)
    assert [p.l2 for p in cv.path] == list(L2_PATH)
    assert chosen.behind <= 2 * chosen.behind_error
    assert chosen.agreement >= max(p.agreement for p in cv.path if p.behind <= 2 * p.behind_error)
    assert (cv.margins > 0).mean() == pytest.approx(chosen.accuracy)


def test_bootstrap_members_differ_but_judge_alike() -> None:
    features, _ = pairs(400, 10, seed=3)
    groups = [f"g{i // 2}" for i in range(400)]
    members = bootstrap_members(features / np.sqrt(10), np.ones(400), groups, 1e-3, 5, seed=0)
    assert members.heads.shape == (5, 10)
    cosines = np.corrcoef(members.heads)[np.triu_indices(5, 1)]
    assert ((cosines > 0.8) & (cosines < 0.9999)).all()
    _, rewards = cross_validate_members(features / np.sqrt(10), np.ones(400), groups, 1e-3, 5, 5, seed=0)
    assert (rewards[:, 0] > rewards[:, 1]).mean() > 0.75
    again = bootstrap_members(features / np.sqrt(10), np.ones(400), groups, 1e-3, 5, seed=0)
    assert (again.heads == members.heads).all()


def test_members_are_calibrated_on_pairs_that_they_did_not_see() -> None:
    """Labels are right with sigmoid(d . direction): margins in log-odds have slope 1."""
    features, direction = pairs(3000, 5, seed=4)
    members = bootstrap_members(features, np.ones(3000), list(range(3000)), 1e-4, 3, seed=0)
    for head, factor in zip(members.heads, members.factors, strict=True):
        assert head * factor == pytest.approx(direction, abs=0.25)


def test_what_is_reported_of_members_is_their_mean_drawn_without_the_pairs_own_fold() -> None:
    features, _ = pairs(120, 6, seed=6)
    groups = [f"g{i // 2}" for i in range(120)]
    plain, calibrated = cross_validate_members(features, np.ones(120), groups, 1e-2, 4, 3, seed=0)
    fold = assign_folds(groups, 3, 0)
    rest = np.flatnonzero(fold != 1)
    made = bootstrap_members(features[rest], np.ones(len(rest)), [groups[i] for i in rest], 1e-2, 4, 0)
    by_member = np.stack([features[fold == 1] @ head for head in made.heads])  # [4, N, 2]
    assert plain[fold == 1] == pytest.approx(by_member.mean(axis=0))
    assert calibrated[fold == 1] == pytest.approx((by_member * made.factors[:, None, None]).mean(axis=0))


def test_members_are_judged_on_groups_that_none_of_them_saw() -> None:
    """Features that are noise but the same within a group, as above: with the group in sight nearly all are right."""
    base = np.random.default_rng(0).normal(size=(100, 2, 300))
    features, groups = np.repeat(base, 2, axis=0), [i // 2 for i in range(200)]
    _, rewards = cross_validate_members(features, np.ones(200), groups, 1e-3, 3, 5, seed=0)
    assert 0.3 < (rewards[:, 0] > rewards[:, 1]).mean() < 0.7


def test_wilson_worked_by_hand() -> None:
    """8 of 10: 0.490 to 0.943, as tables have it; 10 of 10 does not reach down to 1."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_a_judge_of_length_is_found_out() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(10, 300, (400, 2))
    margins = (lengths[:, 0] - lengths[:, 1]).astype(float)
    bias = length_bias(margins, lengths, np.ones(400))
    assert bias["correlation"] == pytest.approx(1)
    assert bias["prefers_longer"] == bias["accuracy_chosen_longer"] == 1
    assert bias["accuracy_chosen_shorter"] == 0
    fair = length_bias(draw.normal(1, 1, 400), lengths, np.ones(400))
    assert abs(fair["correlation"]) < 0.15


def test_pairs_of_equal_length_say_nothing_about_length() -> None:
    bias = length_bias(np.array([1.0, -1.0]), np.full((2, 2), 7), np.ones(2))
    assert bias["correlation"] == 0
    assert bias["prefers_longer"] is None


def test_the_learning_curve_rises_with_the_pairs_and_ends_at_the_cross_validated_accuracy() -> None:
    features, _ = pairs(400, 40, seed=3, strength=1.5)
    groups = [f"g{i}" for i in range(400)]
    curve = learning_curve(features, np.ones(400), groups, 1e-3, 5, 0)
    assert [p.pairs for p in curve] == pytest.approx([40, 80, 160, 320], abs=1)
    assert curve[0].accuracy + 0.05 < curve[-1].accuracy
    whole = cross_validate(features, np.ones(400), groups, 1e-3, 5, 0)
    assert curve[-1].accuracy == pytest.approx((whole.margins > 0).mean())
    assert all(p.interval[0] < p.accuracy < p.interval[1] for p in curve)


def test_parts_of_the_curve_are_nested_and_of_whole_groups() -> None:
    """Three pairs in each of 40 groups; every fourth pair is not among those that are parted."""
    groups = [f"g{i // 3}" for i in range(120)]
    among = np.array([i for i in range(120) if i // 3 % 4])
    places = curve_places(groups, 0)
    parts = [set(curve_part(places, among, share).tolist()) for share in (0.1, 0.3, 0.5, 1.0)]
    assert parts[0] < parts[1] < parts[2] < parts[3] == set(among.tolist())
    for part in parts:
        of_groups = {groups[i] for i in part}
        assert part == {i for i in range(120) if groups[i] in of_groups}
    assert [len(part) / 90 for part in parts] == pytest.approx([0.1, 0.3, 0.5, 1.0], abs=1 / 30)
    assert set(curve_part(curve_places(groups, 1), among, 0.5).tolist()) != parts[2]
    assert len(curve_part(places, among, 0.01)) == 0  # one group


def test_parts_of_too_few_groups_are_left_out_of_the_curve() -> None:
    features, _ = pairs(8, 3, seed=4)
    curve = learning_curve(features, np.ones(8), list("aabbccdd"), 0.1, 2, 0)
    assert [p.pairs for p in curve] == [4]
