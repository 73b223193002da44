"""Fits a reward model on features and labelled pairs and says how good it is."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clha.rewards.calibration import fit_temperature, measure, reliability
from clha.rewards.fitting import (
    Members,
    Standardiser,
    assign_folds,
    bootstrap_members,
    cross_validate,
    cross_validate_members,
    fit_head,
    learning_curve,
    length_bias,
    wilson_interval,
)
from clha.rewards.head import Head
from clha.settings_rewards import RewardFit

Floats = NDArray[np.float64]


def fit_pairs(
    features: Floats,
    pairs: NDArray[np.int64],
    *,
    weights: Floats,
    groups: Sequence[Hashable],
    lengths: NDArray[np.int64],
    fit: RewardFit,
    config: dict[str, Any],
) -> tuple[Head, dict[str, Any]]:
    """Cross-validate, choose l2, fit the head on all pairs, calibrate it, set its SFT threshold.

    Args:
        features: [R, D], raw, of all responses.
        pairs: [N, 2], rows of `features`: chosen, rejected.
        weights: [N], weights of the pairs.
        groups: [N], pairs of one group (first user turn) stay in one fold.
        lengths: [R], characters of the responses.
        fit: its settings.
        config: what the head's file says besides (encoder, layer, ...).

    Returns the head and the report (fit.json). Accuracy, calibration, length bias and the threshold all come from
    out-of-fold rewards: judgements of heads that never saw the dialogue; with several members they are those of their
    mean, which is what rescoring uses.
    """
    used = np.unique(pairs)
    standardise = Standardiser.of(features[used])
    standardised = standardise(features)
    cv = cross_validate(standardised[pairs], weights, groups, fit.l2, fit.folds, fit.seed)
    if fit.members == 1:
        factor = fit_temperature(cv.margins, weights)
        whole = fit_head(standardised[pairs[:, 0]] - standardised[pairs[:, 1]], cv.l2, weights)
        members = Members(whole[None], np.array([factor]))
        judged, rewards = cv.rewards, cv.rewards * factor
        margins = cross_calibrated(cv.margins, weights, groups, fit.folds, fit.seed)
    else:
        members = bootstrap_members(standardised[pairs], weights, groups, cv.l2, fit.members, fit.seed)
        factor = float(members.factors.mean())
        judged, rewards = cross_validate_members(
            standardised[pairs], weights, groups, cv.l2, fit.members, fit.folds, fit.seed
        )
        margins = rewards[:, 0] - rewards[:, 1]
    threshold = float(np.quantile(_per_response(pairs[:, 0], rewards[:, 0]), fit.sft_quantile))
    head = Head(
        standardise,
        members.calibrated,
        config
        | {
            "calibration": {"factor": members.factors.tolist()},
            "threshold": threshold,
            "threshold_rule": f"quantile {fit.sft_quantile:g} of out-of-fold rewards of dataset_chosen responses",
            "l2": cv.l2,
            "unit": "log-odds",
        },
    )
    curve = learning_curve(standardised[pairs], weights, groups, cv.l2, fit.folds, fit.seed)
    return head, judgement(judged, rewards, margins, factor, weights, groups, lengths[pairs]) | {
        "l2": cv.l2,
        "agreement_between_halves": next(p.agreement for p in cv.path if p.l2 == cv.l2),
        "l2_path": cv.path_rows(),
        "members": {"count": fit.members},
        "sft_threshold": threshold,
        "learning_curve": [asdict(point) for point in curve],
    }


def _per_response(rows: NDArray[np.int64], rewards: Floats) -> Floats:
    """One reward for each distinct response."""
    _, first = np.unique(rows, return_index=True)
    return rewards[first]


def judgement(
    judged: Floats,
    rewards: Floats,
    calibrated: Floats,
    factor: float,
    weights: Floats,
    groups: Sequence[Hashable],
    lengths: NDArray[np.int64],
) -> dict[str, Any]:
    """What held-out pairs say of a reward model, whichever way it was fitted.

    Args:
        judged: [N, 2], rewards (chosen, rejected) by models that never saw the pair's group; uncalibrated.
        rewards: [N, 2], the same in log-odds.
        calibrated: [N], margins in log-odds, by factors that never saw the pair's group.
        factor: from `judged` to log-odds; of several members the mean of theirs.
        weights, groups: [N] of the pairs.
        lengths: [N, 2], characters.
    """
    margins = judged[:, 0] - judged[:, 1]
    accuracy = float(np.average(rewards[:, 0] > rewards[:, 1], weights=weights))
    diagrams = {"reliability_before": reliability(margins, weights), "reliability": reliability(calibrated, weights)}
    return {
        "accuracy": accuracy,
        "accuracy_interval": list(wilson_interval(accuracy, len(set(groups)))),
        "pairs": len(judged),
        "calibration": {
            "factor": factor,
            "before": measure(margins, weights).as_dict(),
            "after": measure(calibrated, weights).as_dict(),
            **{
                name: {"predicted": predicted.tolist(), "observed": observed.tolist(), "weight": mass.tolist()}
                for name, (predicted, observed, mass) in diagrams.items()
            },
        },
        "length_bias": length_bias(rewards[:, 0] - rewards[:, 1], lengths, weights),
        "reward_std": float(rewards.std()),
        "metrics": _trainer_metrics(rewards, weights),
    }


def cross_calibrated(margins: Floats, weights: Floats, groups: Sequence[Hashable], folds: int, seed: int) -> Floats:
    """Margins [N] times a factor that was fitted without their own fold."""
    fold = assign_folds(groups, folds, seed)
    factors = np.array([fit_temperature(margins[fold != k], weights[fold != k]) for k in range(folds)])
    return margins * factors[fold]


def _trainer_metrics(rewards: Floats, weights: Floats) -> dict[str, float]:
    """Out-of-fold figures under the names of TRL's RewardTrainer; rewards [N, 2] in log-odds."""
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "eval_loss": float(np.average(np.logaddexp(0, -margins), weights=weights)),
        "eval_accuracy": float(np.average(margins > 0, weights=weights)),
        "eval_margin": float(np.average(margins, weights=weights)),
        "eval_min_reward": float(rewards.min()),
        "eval_mean_reward": float(rewards.mean()),
        "eval_max_reward": float(rewards.max()),
    }
