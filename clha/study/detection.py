"""Finding flipped labels with a reward model that was fitted on other pairs, and how well that must work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clha import noise
from clha.digests import unit_of
from clha.rewards.calibration import fit_temperature
from clha.rewards.fitting import Standardiser, cross_validate, fit_head, wilson_interval
from clha.settings_rewards import RewardFit

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_RESAMPLES = 400


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs with their true labels: chosen first. `ids`, `groups` [N] (pairs of one first user turn share a group),
    `features` [N, 2, D], `lengths` [N, 2] in characters."""

    ids: list[str]
    groups: list[str]
    features: Floats
    lengths: NDArray[np.int64]


def flips(ids: Sequence[str], rate: float, seed: int) -> Bools:
    """Which labels are flipped, [N]: the share `rate` of them, exactly up to rounding, the same for the same ids."""
    order = sorted(range(len(ids)), key=lambda i: unit_of("flip", seed, ids[i]))
    out = np.zeros(len(ids), dtype=bool)
    out[order[: round(rate * len(ids))]] = True
    return out


def swapped(pairs: Floats, flipped: Bools) -> Floats:
    """[N, 2, ...] with the two responses of flipped pairs exchanged."""
    out = pairs.copy()
    out[flipped] = out[flipped][:, ::-1]
    return out


@dataclass(frozen=True)
class Detection:
    """p_right [N] for the (flipped) labels of the pairs that were looked at, and the figures."""

    p_right: Floats
    figures: dict[str, Any]


def detect(
    reward: LabelledPairs,
    looked_at: LabelledPairs,
    rate: float,
    seed: int,
    arm: str,
    fit: RewardFit,
    resamples: int = _RESAMPLES,
) -> Detection:
    """Fit a head on `reward`, flip the labels of `looked_at`, and judge them.

    In the arm "clean" the labels of `reward` are right: they calibrate the head, and the flip rate is fitted on the
    labels of `looked_at` alone. In the arm "flipped" they are flipped too, with the same rate, and no label can be
    trusted: factor and flip rate are fitted together on both, and the interval is that of the joint profile.

    Figures: AUROC and AUPRC of -margin against the truth (in the order of 1 - p_right, which can tie) with 95%
    bootstrap intervals over groups, null where no label was flipped; the theory value for the head's accuracy on
    these pairs; the estimated flip rate; and whether the factor ended at a limit (`noise.FACTOR_LIMITS`).
    """
    fitted_on = flips(reward.ids, rate if arm == "flipped" else 0.0, seed + 1)
    features = (reward.features, looked_at.features)
    return _judged(features, fitted_on, reward, looked_at, rate, seed, arm, fit, resamples)


def detect_by_length(
    reward: LabelledPairs, looked_at: LabelledPairs, rate: float, seed: int, fit: RewardFit
) -> Detection:
    """As `detect`, with a reward model that knows nothing but the logarithm of the length."""
    clean = np.zeros(len(reward.ids), dtype=bool)
    theirs, ours = (np.log1p(p.lengths.astype(float))[..., None] for p in (reward, looked_at))
    fit = fit.model_copy(update={"l2": 1e-3})
    return _judged((theirs, ours), clean, reward, looked_at, rate, seed, "length", fit, 0)


def _judged(
    features: tuple[Floats, Floats],
    fitted_on: Bools,
    reward: LabelledPairs,
    looked_at: LabelledPairs,
    rate: float,
    seed: int,
    arm: str,
    fit: RewardFit,
    resamples: int,
) -> Detection:
    theirs, ours = features
    standardise = Standardiser.of(theirs.reshape(-1, theirs.shape[-1]))
    pairs = swapped(standardise(theirs), fitted_on)
    ones = np.ones(len(pairs))
    cv = cross_validate(pairs, ones, reward.groups, fit.l2, fit.folds, fit.seed)
    head = fit_head(pairs[:, 0] - pairs[:, 1], cv.l2)
    flipped = flips(looked_at.ids, rate, seed)
    judged = standardise(ours)
    true_margins = (judged[:, 0] - judged[:, 1]) @ head
    margins = np.where(flipped, -true_margins, true_margins)
    if fitted_on.any():
        found = noise.fit_flip_rate(np.concatenate([cv.margins, margins]))
    else:
        found = noise.fit_flip_rate(margins, fit_temperature(cv.margins))
    p = noise.pair_probability(margins[:, None], np.array([found.factor]))
    p_right = noise.label_probability(p, found.estimate)
    accuracy = float((true_margins > 0).mean())
    figures = {
        "rate": rate,
        "seed": seed,
        "arm": arm,
        "pairs": len(margins),
        "reward_pairs": len(pairs),
        "l2": cv.l2,
        "factor": found.factor,
        "factor_at_limit": found.at_limit,
        "held_out_accuracy": float((cv.margins > 0).mean()),
        "accuracy": accuracy,
        "accuracy_interval": list(wilson_interval(accuracy, len(set(looked_at.groups)))),
        "theory_auroc": noise.theory_auroc(accuracy),
        "flip_rate": found.estimate,
        "flip_rate_interval": [found.low, found.high],
    }
    for name, measure in (("auroc", noise.auroc), ("auprc", noise.auprc)):
        some = bool(flipped.any())
        figures[name] = measure(-margins, flipped) if some else None
        interval = _interval(measure, -margins, flipped, looked_at.groups, resamples) if some and resamples else None
        figures[f"{name}_interval"] = interval
    return Detection(p_right, figures)


def _interval(
    measure: Callable[[Floats, Bools], float], scores: Floats, truth: Bools, groups: Sequence[str], resamples: int
) -> list[float]:
    """95% bootstrap interval of a measure; pairs of one group are drawn together."""
    draw = np.random.default_rng(0)
    _, group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group)
    rows, starts = np.argsort(group, kind="stable"), np.cumsum(sizes) - sizes
    values = []
    for _ in range(resamples):
        drawn = draw.integers(0, len(sizes), len(sizes))
        many = sizes[drawn]
        first = np.repeat(starts[drawn] - (np.cumsum(many) - many), many)
        sample = rows[first + np.arange(many.sum())]
        values.append(measure(scores[sample], truth[sample]))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return [float(low), float(high)]


def arm_weights(name: str, p_right: Floats | None, flipped: Bools, seed: int) -> Floats:
    """Weights of the labelled pairs [N] for one arm of training, with mean 1 over those that are kept.

    none: 1; oracle: 1 where the label was not flipped, 0 where it was; shuffled: the weights 2 p_right - 1 on other
    pairs; otherwise these weights, nothing below one half, `p_right` [N] being what the arm's judge says.
    """
    if p_right is None:
        weights = np.where(flipped, 0.0, 1.0) if name == "oracle" else np.ones(len(flipped))
    else:
        weights = noise.trust_weight(p_right)
    if name == "shuffled":
        weights = np.random.default_rng(seed).permutation(weights)
    return weights * noise.mean_one_scale(float(weights.sum()), int((weights > 0).sum()))
