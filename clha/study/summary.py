"""What a noise study comes to: detection against theory, and what weights do for the trained policy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]

# Effect that a two-sided test at 5% finds with 80% power, in standard errors.
_POWER = 2.8
_RESAMPLES = 10_000


def paired_gain(arm: Sequence[Bools], baseline: Sequence[Bools], groups: Sequence[str]) -> dict[str, Any]:
    """Held-out accuracy of one arm minus that of another: one array [N] of right judgements for each seed.

    The difference of a pair is its mean over seeds; the interval comes from 10,000 bootstrap samples of the groups
    of pairs. `smallest_effect` is the gain that such a sample would show with 80% power.
    """
    difference = np.mean([a.astype(float) - b for a, b in zip(arm, baseline, strict=True)], axis=0)
    names = sorted(set(groups))
    place = {g: i for i, g in enumerate(names)}
    of_pair = np.array([place[g] for g in groups])
    sums, counts = np.bincount(of_pair, difference), np.bincount(of_pair)
    drawn = np.random.default_rng(0).integers(0, len(names), (_RESAMPLES, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "gain": float(difference.mean()),
        "interval": [float(low), float(high)],
        "smallest_effect": float(_POWER * means.std()),
        "pairs": len(difference),
        "seeds": len(arm),
    }


def study_tables(results: Mapping[str, Any]) -> str:
    """The results as Markdown: one table of detection, one of training."""
    lines = [
        "| flips | reward model's pairs | accuracy | AUROC | theory | AUPRC | estimated flips |",
        "|---|---|---|---|---|---|---|",
    ]
    for d in results["detection"]:
        lines.append(
            f"| {d['rate']:.0%} (seed {d['seed']}) | {d['arm']} | {_with(d['accuracy'], d['accuracy_interval'])} "
            f"| {_with(d.get('auroc'), d.get('auroc_interval'))} | {d['theory_auroc']:.3f} "
            f"| {_with(d.get('auprc'), d.get('auprc_interval'))} "
            f"| {_with(d['flip_rate'], d['flip_rate_interval'])} |"
        )
    if results["training"]:
        lines += [
            "",
            "| flips | weights | held-out accuracy | gain over no weights | smallest effect it could show |",
            "|---|---|---|---|---|",
        ]
    for t in results["training"]:
        gain = t.get("gain")
        lines.append(
            f"| {t['rate']:.0%} | {t['weights']} | {t['accuracy']:.3f} "
            f"| {_with(gain['gain'], gain['interval'], sign=True) if gain else ''} "
            f"| {format(gain['smallest_effect'], '.3f') if gain else ''} |"
        )
    return "\n".join(lines) + "\n"


def _with(value: float | None, interval: Sequence[float] | None, sign: bool = False) -> str:
    if value is None or interval is None:
        return ""
    form = "+.3f" if sign else ".3f"
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"
