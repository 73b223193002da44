"""Fits a reward model on features and labelled pairs and says how good it is."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clha.rewards.calibration import fit_temperature, measure, reliability
from clha.rewards.fitting import (
    CrossValidation,
    Members,
    Standardiser,
    assign_folds,
    bootstrap_members,
    cross_validate,
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
    out-of-fold rewards: judgements of heads that never saw the dialogue.
    """
    used = np.unique(pairs)
    standardise = Standardiser.of(features[used])
    standardised = standardise(features)
    cv = cross_validate(standardised[pairs], weights, groups, fit.l2, fit.folds, fit.seed)
    if fit.members == 1:
        factor = fit_temperature(cv.margins, weights)
        whole = fit_head(standardised[pairs[:, 0]] - standardised[pairs[:, 1]], cv.l2, weights)
        members = Members(whole[None], np.array([factor]), cv.rewards * factor)
    else:
        members = bootstrap_members(standardised[pairs], weights, groups, cv.l2, fit.members, fit.seed)
    chosen = _per_response(pairs[:, 0], members.rewards[:, 0])
    threshold = float(np.quantile(chosen[np.isfinite(chosen)], fit.sft_quantile))
    head = Head(
        standardise,
        members.heads * members.factors[:, None],
        config
        | {
            "calibration": {"factor": members.factors.tolist()},
            "threshold": threshold,
            "threshold_rule": f"quantile {fit.sft_quantile:g} of out-of-fold rewards of dataset_chosen responses",
            "l2": cv.l2,
            "unit": "log-odds",
        },
    )
    report = _report(cv, members, threshold, pairs, weights, groups, lengths, fit)
    curve = learning_curve(standardised[pairs], weights, groups, cv.l2, fit.folds, fit.seed)
    return head, report | {"learning_curve": [asdict(point) for point in curve]}


def _per_response(rows: NDArray[np.int64], rewards: Floats) -> Floats:
    """One reward for each distinct response."""
    _, first = np.unique(rows, return_index=True)
    return rewards[first]


def _report(
    cv: CrossValidation,
    members: Members,
    threshold: float,
    pairs: NDArray[np.int64],
    weights: Floats,
    groups: Sequence[Hashable],
    lengths: NDArray[np.int64],
    fit: RewardFit,
) -> dict[str, Any]:
    count = len(set(groups))
    margins = cross_calibrated(cv.margins, weights, groups, fit.folds, fit.seed)
    chosen_point = next(p for p in cv.path if p.l2 == cv.l2)
    factor = fit_temperature(cv.margins, weights)
    return judgement(cv.rewards, margins, factor, weights, groups, lengths[pairs]) | {
        "l2": cv.l2,
        "agreement_between_halves": chosen_point.agreement,
        "l2_path": cv.path_rows(),
        "members": members.report(weights, count),
        "sft_threshold": threshold,
    }


def judgement(
    judged: Floats,
    calibrated: Floats,
    factor: float,
    weights: Floats,
    groups: Sequence[Hashable],
    lengths: NDArray[np.int64],
) -> dict[str, Any]:
    """What held-out pairs say of a reward model, whichever way it was fitted.

    Args:
        judged: [N, 2], rewards (chosen, rejected) by models that never saw the pair's group; uncalibrated.
        calibrated: [N], margins in log-odds, by factors that never saw the pair's group.
        factor: from `judged` to log-odds.
        weights, groups: [N] of the pairs.
        lengths: [N, 2], characters.
    """
    margins = judged[:, 0] - judged[:, 1]
    accuracy = float(np.average(margins > 0, weights=weights))
    diagrams = {"reliability_before": reliability(margins, weights), "reliability": reliability(calibrated, weights)}
    rewards = judged * factor
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
        "length_bias": length_bias(margins, lengths, weights),
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
