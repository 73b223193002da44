"""Finding flipped labels with a reward model that was fitted on other pairs, and how well that must work."""

from collections.abc import Sequence
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

# Arms: the reward model's own pairs are clean, or flipped as often as those that it looks at.

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

    In the arm "flipped" the labels of `reward` are flipped too, with the same rate, and calibration allows for it:
    factor and flip rate are fitted together. Figures: AUROC and AUPRC of 1 - p_right against the truth with 95%
    bootstrap intervals, the theory value for the head's accuracy on these pairs, and the estimated flip rate.
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
    factor = noise.fit_flip_rate(cv.margins).factor if fitted_on.any() else fit_temperature(cv.margins)
    flipped = flips(looked_at.ids, rate, seed)
    judged = standardise(ours)
    true_margins = (judged[:, 0] - judged[:, 1]) @ head * factor
    margins = np.where(flipped, -true_margins, true_margins)
    found = noise.fit_flip_rate(margins, factor=1.0)
    p = noise.pair_probability(margins[:, None], np.ones(1))
    p_right = noise.label_probability(p, found.estimate)
    accuracy = float((true_margins > 0).mean())
    doubt = 1 - p_right
    figures = {
        "rate": rate,
        "seed": seed,
        "arm": arm,
        "pairs": len(margins),
        "reward_pairs": len(pairs),
        "l2": cv.l2,
        "factor": factor,
        "held_out_accuracy": float((cv.margins > 0).mean()),
        "accuracy": accuracy,
        "accuracy_interval": list(wilson_interval(accuracy, len(set(looked_at.groups)))),
        "theory_auroc": noise.theory_auroc(accuracy),
        "flip_rate": found.estimate,
        "flip_rate_interval": [found.low, found.high],
    }
    if flipped.any():
        figures |= {
            "auroc": noise.auroc(doubt, flipped),
            "auprc": noise.auprc(doubt, flipped),
        }
    if flipped.any() and resamples:
        figures["auroc_interval"] = _interval(noise.auroc, doubt, flipped, resamples)
        figures["auprc_interval"] = _interval(noise.auprc, doubt, flipped, resamples)
    return Detection(p_right, figures)


def _interval(measure: Any, scores: Floats, truth: Bools, resamples: int) -> list[float]:
    """95% bootstrap interval of a measure over pairs."""
    draw = np.random.default_rng(0)
    values = []
    for _ in range(resamples):
        rows = draw.integers(0, len(scores), len(scores))
        values.append(measure(scores[rows], truth[rows]))
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
