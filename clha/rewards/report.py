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
from clha.settings import RewardFit

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
    accuracy = float(np.average(cv.margins > 0, weights=weights))
    count = len(set(groups))
    margins = _cross_calibrated(cv, weights, groups, fit)
    diagrams = {"reliability_before": reliability(cv.margins, weights), "reliability": reliability(margins, weights)}
    rewards = cv.rewards * fit_temperature(cv.margins, weights)
    chosen_point = next(p for p in cv.path if p.l2 == cv.l2)
    return {
        "accuracy": accuracy,
        "accuracy_interval": list(wilson_interval(accuracy, count)),
        "pairs": len(pairs),
        "l2": cv.l2,
        "agreement_between_halves": chosen_point.agreement,
        "l2_path": cv.path_rows(),
        "calibration": {
            "factor": fit_temperature(cv.margins, weights),
            "before": measure(cv.margins, weights).as_dict(),
            "after": measure(margins, weights).as_dict(),
            **{
                name: {"predicted": predicted.tolist(), "observed": observed.tolist(), "weight": mass.tolist()}
                for name, (predicted, observed, mass) in diagrams.items()
            },
        },
        "length_bias": length_bias(cv.margins, lengths[pairs], weights),
        "members": members.report(weights, count),
        "sft_threshold": threshold,
        "reward_std": float(rewards.std()),
        "metrics": _trainer_metrics(rewards, weights),
    }


def _cross_calibrated(cv: CrossValidation, weights: Floats, groups: Sequence[Hashable], fit: RewardFit) -> Floats:
    """Margins times a factor that was fitted without their own fold."""
    fold = assign_folds(groups, fit.folds, fit.seed)
    factors = np.array([fit_temperature(cv.margins[fold != k], weights[fold != k]) for k in range(fit.folds)])
    return cv.margins * factors[fold]


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
