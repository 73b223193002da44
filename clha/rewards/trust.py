"""What rewards say as probabilities: calibration factors, the flip rate of labels, and how well both fit the labels."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clha import noise
from clha.errors import UserError
from clha.rewards.calibration import measure, reliability
from clha.rewards.weighing import RewardTable, all_ranked
from clha.settings import Noise

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# More labelled pairs than these tell no more (standard errors of the flip rate of some 0.003) and take long.
MOST_PAIRS = 100_000

# No probability is smaller: its logarithm must be finite.
_TINY = 1e-300


@dataclass(frozen=True)
class LabelTrust:
    """What turns rewards into probabilities: a factor for each member, and the flip rate of labels (None: unknown)."""

    factors: Floats
    flip_rate: float | None
    facts: dict[str, Any] = field(default_factory=dict)

    def calibrated(self, members: Floats) -> Floats:
        """The mean of the members' rewards in log-odds: [..., M] -> [...]."""
        return np.asarray((members * self.factors).mean(axis=-1))

    def order_probability(self, members: Floats) -> Floats:
        """P(k better than j) for all pairs, [p, n, n], from members [p, n, M]."""
        return noise.pair_probability(_differences(members), self.factors)

    def probability(self, members: Floats, labels: Ints, rank_by: str) -> Floats:
        """P(k stands rightly before j), [p, n, n]; where an annotator ordered the pair, with the flip rate.

        members [p, n, M] and labels [p, n] in rank order.
        """
        p = self.order_probability(members)
        if rank_by == "label" and self.flip_rate is not None:
            p = np.where(noise.labelled_pairs(labels), noise.label_probability(p, self.flip_rate), p)
        return p

    def log_odds(self, members: Floats, labels: Ints, rank_by: str) -> Floats:
        """The log-odds of `probability`: still apart where the probabilities are all 1."""
        odds = pair_log_odds(_differences(members), self.factors)
        if rank_by == "label" and self.flip_rate is not None:
            prior = np.log1p(-self.flip_rate) - np.log(self.flip_rate)
            odds = np.where(noise.labelled_pairs(labels), odds + prior, odds)
        return odds


def _differences(members: Floats) -> Floats:
    return members[:, :, None, :] - members[:, None, :, :]


def pair_log_odds(member_differences: Floats, factors: Floats) -> Floats:
    """The log-odds of `noise.pair_probability`: [..., M] -> [...].

    The two orders are asked for separately, for 1 - p would be 0 from log-odds of 37 on.
    """
    first = noise.pair_probability(member_differences, factors)
    second = noise.pair_probability(-member_differences, factors)
    return np.asarray(np.log(np.maximum(first, _TINY)) - np.log(np.maximum(second, _TINY)))


def labelled_margins(table: RewardTable) -> tuple[Floats, Ints]:
    """Member differences, chosen minus rejected, of all dataset pairs, [N, M], and their prompts' places [N]."""
    margins = [np.empty((0, table.members.shape[1]))]
    prompts = [np.empty(0, dtype=np.int64)]
    if table.label.any():
        for *_, r in all_ranked(table, "label"):
            prompt, chosen, rejected = np.nonzero(noise.labelled_pairs(r.labels))
            margins.append(r.members[prompt, chosen] - r.members[prompt, rejected])
            prompts.append(r.prompts[prompt])
    return np.concatenate(margins), np.concatenate(prompts)


def label_trust(table: RewardTable, settings: Noise) -> LabelTrust:
    """Calibration factors and flip rate as the settings say, fitted on the dataset pairs where they ask for it.

    Of more than `MOST_PAIRS` pairs those are taken whose prompts have the smallest digests: the same ones whatever
    the order of the rows. With calibration `labels` a weak model shows in a wide interval of the flip rate: it is
    that of the likelihood over rate and factor together.

    Raises UserError when the settings ask for dataset pairs and there are none.
    """
    margins, prompts = labelled_margins(table)
    by_labels = settings.calibration == "labels"
    if by_labels and not len(margins):
        raise UserError(
            "weigh: rescore.noise.calibration is labels, but no prompt has a chosen and a rejected candidate; set "
            "generate.include to [chosen, rejected], or calibration to reward_model or a number"
        )
    facts: dict[str, Any] = {"labelled_pairs": len(margins)}
    if len(margins) > MOST_PAIRS:
        margins = margins[_smallest_digests(table.prompt_ids, prompts, MOST_PAIRS)]
    fitted: noise.FlipRate | None = None
    if settings.calibration == "labels":
        factors, fitted = _fit_both(margins, settings.flip_rate)
    else:
        known = 1.0 if settings.calibration == "reward_model" else settings.calibration
        factors = np.full(table.members.shape[1], known)
        if len(margins):
            fitted = noise.fit_flip_rate(_bounded(margins, factors), factor=1.0)
    facts["calibration_factors"] = factors.tolist()
    if fitted is None:
        return LabelTrust(factors, None, facts)
    used = fitted.estimate if settings.flip_rate == "fit" else float(settings.flip_rate)
    facts["flip_rate"] = {
        "estimate": fitted.estimate,
        "interval": [fitted.low, fitted.high],
        "used": used,
        "pairs": len(margins),
        "factor_at_limit": fitted.at_limit,
    }
    if by_labels:
        facts["calibration"] = label_calibration(margins, factors, used)
    return LabelTrust(factors, used, facts)


def _fit_both(margins: Floats, flip_rate: float | str) -> tuple[Floats, noise.FlipRate]:
    """A factor for each member [M] from labels that may be flipped, and their flip rate with its joint interval.

    Each member gets the factor that is likeliest with the rate, or at the rate that is given. The rate of an
    ensemble is fitted on the log-odds of all together, whose common factor is left free.
    """
    alone = [noise.fit_flip_rate(m) for m in margins.T] if flip_rate == "fit" else []
    factors = [f.factor for f in alone] or [noise.fit_factor(m, float(flip_rate)) for m in margins.T]
    if len(alone) == 1:
        return np.array(factors), alone[0]
    together = margins[:, 0] if margins.shape[1] == 1 else _bounded(margins, np.array(factors))
    return np.array(factors), noise.fit_flip_rate(together)


def _bounded(margins: Floats, factors: Floats) -> Floats:
    """Log-odds of the labels by all members together; beyond 50 nothing changes but rounding."""
    return np.clip(pair_log_odds(margins, factors), -50, 50)


def label_calibration(margins: Floats, factors: Floats, flip_rate: float) -> dict[str, Any]:
    """How well the rewards foretell the labels as they stand, before and after calibration on them.

    Before: rewards taken for log-odds, labels for right. After: by the factors, and with a share of the labels
    flipped: P(label) = (1-e) p + e (1-p). Measured on the pairs that the M + 1 numbers were fitted on.
    """
    before = _bounded(margins, np.ones_like(factors))
    p = noise.pair_probability(margins, factors)
    stated = (1 - flip_rate) * p + flip_rate * (1 - p)
    after = np.log(stated) - np.log1p(-stated)
    diagrams = {"reliability_before": reliability(before), "reliability": reliability(after)}
    return {
        "pairs": len(margins),
        "before": measure(before).as_dict(),
        "after": measure(after).as_dict(),
        **{
            name: {"predicted": predicted.tolist(), "observed": observed.tolist(), "weight": mass.tolist()}
            for name, (predicted, observed, mass) in diagrams.items()
        },
    }


def _smallest_digests(prompt_ids: pa.Array, prompts: Ints, count: int) -> Ints:
    """Which `count` pairs belong to the prompts with the smallest digests; in the order of the pairs."""
    digests = np.empty(len(prompts), dtype=np.uint64)
    for start in range(0, len(prompts), 65_536):
        ids = prompt_ids.take(pa.array(prompts[start : start + 65_536])).to_pylist()
        digests[start : start + len(ids)] = [
            int.from_bytes(hashlib.sha256(i.encode()).digest()[:8], "big") for i in ids
        ]
    return np.sort(np.argsort(digests, kind="stable")[:count])
