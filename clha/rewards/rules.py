"""The weighting rules of `rescore.noise`: from settings and all rewards to a rule for prompts of one size."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clha import noise
from clha.errors import UserError
from clha.rewards.weighing import Ranked, RewardTable, Rule, Totals, Weighed, ranked_prompts
from clha.settings import Noise

Floats = NDArray[np.float64]

# Prompts that are looked at together in passes over all rewards.
_CHUNK = 65_536


@dataclass(frozen=True)
class LabelTrust:
    """What turns rewards into probabilities: a factor for each member, and the flip rate of labels (None: unknown)."""

    factors: Floats
    flip_rate: float | None
    facts: dict[str, Any] = field(default_factory=dict)

    def order_probability(self, members: Floats) -> Floats:
        """P(k better than j) for all pairs, [p, n, n], from members [p, n, M]."""
        return noise.pair_probability(members[:, :, None, :] - members[:, None, :, :], self.factors)

    def probability(self, r: Ranked, rank_by: str) -> Floats:
        """P(the order of each pair is right), [p, n, n]; where an annotator ordered it, with the flip rate."""
        p = self.order_probability(r.members)
        if rank_by == "label" and self.flip_rate is not None:
            labelled = noise.labelled_pairs(r.labels)
            p = np.where(labelled, noise.label_probability(p, self.flip_rate), p)
        return p


def labelled_margins(table: RewardTable) -> Floats:
    """Member differences, chosen minus rejected, of all dataset pairs: [N, M]."""
    found = []
    for *_, r in all_ranked(table, "label"):
        pairs = noise.labelled_pairs(r.labels)
        if pairs.any():
            found.append((r.members[:, :, None, :] - r.members[:, None, :, :])[pairs])
    return np.concatenate(found) if found else np.empty((0, table.members.shape[1]))


def label_trust(table: RewardTable, settings: Noise) -> LabelTrust:
    """Calibration factors and flip rate as the settings say, fitted on the dataset pairs where they ask for it.

    Raises UserError when they ask for it and there are no such pairs.
    """
    margins = labelled_margins(table) if table.label.any() else np.empty((0, table.members.shape[1]))
    if settings.calibration == "labels" and not len(margins):
        raise UserError(
            "weigh: rescore.noise.calibration is labels, but no prompt has a chosen and a rejected candidate; set "
            "generate.include to [chosen, rejected], or calibration to reward_model or a number"
        )
    if settings.calibration == "labels":
        factors = np.array([_label_factor(m, settings.flip_rate) for m in margins.T])
    else:
        factor = 1.0 if settings.calibration == "reward_model" else settings.calibration
        factors = np.full(table.members.shape[1], factor)
    facts: dict[str, Any] = {"calibration_factors": factors.tolist(), "labelled_pairs": len(margins)}
    flip_rate: float | None = None
    if len(margins):
        p = noise.pair_probability(margins, factors)
        logits = np.log(p) - np.log1p(-p)
        fitted = noise.fit_flip_rate(np.clip(logits, -50, 50), factor=1.0)
        facts["flip_rate"] = {"estimate": fitted.estimate, "interval": [fitted.low, fitted.high]}
        flip_rate = fitted.estimate if settings.flip_rate == "fit" else settings.flip_rate
        facts["flip_rate"]["used"] = flip_rate
    return LabelTrust(factors, flip_rate, facts)


def _label_factor(margins: Floats, flip_rate: float | str) -> float:
    """The factor of one member from labels that may be flipped: together with their flip rate, or at a given one."""
    return noise.fit_flip_rate(margins).factor if flip_rate == "fit" else noise.fit_factor(margins, float(flip_rate))


def make_rule(
    table: RewardTable, settings: Noise, rank_by: str, threshold: float, trust: LabelTrust
) -> tuple[Rule, dict[str, Any]]:
    """The rule that `settings` describe, and the facts that it rests on.

    `threshold`: of the SFT part; `trust`: see `label_trust`.
    """
    if settings.method == "none":
        return _all_ones(rank_by), {"gap": None}
    if settings.method in ("reference", "quantile"):
        gap = settings.gap if settings.method == "reference" else _observed_gap(table, rank_by, settings.quantile)
        return _by_gap(rank_by, gap, threshold), {"gap": gap}
    if settings.method == "from_column":
        assert settings.file is not None
        given = GivenWeights.read(Path(settings.file), settings.column, table)
        return _as_given(given, threshold), {"gap": None, "weights_given": len(given.weights)}
    soft = settings.method == "soft_label"
    rule = _calibrated(rank_by, threshold, trust, settings.labels, soft)
    if soft:  # a pair and its reverse weigh 1 together
        return rule, {"gap": None}
    totals = Totals()
    for *_, ranked in all_ranked(table, rank_by):
        totals.add(rule(ranked))
    scale = noise.mean_one_scale(totals.weight, sum(totals.kept.values()))
    return _scaled(rule, scale), {"gap": None, "weight_scale": scale}


def all_ranked(table: RewardTable, rank_by: str) -> Iterator[tuple[Any, Any, Ranked]]:
    """Everything, some tens of thousands of prompts at a time; see `ranked_prompts`."""
    for start in range(0, table.prompts, _CHUNK):
        yield from ranked_prompts(table, range(start, min(start + _CHUNK, table.prompts)), rank_by)


def _observed_gap(table: RewardTable, rank_by: str, quantile: float) -> float:
    gaps = [noise.pair_gaps(r.rewards) for *_, r in all_ranked(table, rank_by)]
    return noise.quantile_gap(np.concatenate(gaps) if gaps else np.empty(0), quantile)


def _pairs(r: Ranked, rank_by: str) -> NDArray[np.bool_] | None:
    """The pairs that can count: all, or those that a label orders."""
    return noise.labelled_pairs(r.labels) if rank_by == "label" else None


def _all_ones(rank_by: str) -> Rule:
    return lambda r: Weighed(noise.all_ones(r.rewards, _pairs(r, rank_by)), np.ones(len(r.rewards)))


def _by_gap(rank_by: str, gap: float, threshold: float) -> Rule:
    def rule(r: Ranked) -> Weighed:
        weights = noise.gap_weights(r.rewards, gap, _pairs(r, rank_by))
        return Weighed(weights, noise.threshold_lambda(r.rewards[:, 0], threshold), flags=_contradicted(r, rank_by))

    return rule


def _contradicted(r: Ranked, rank_by: str) -> dict[str, NDArray[np.bool_]]:
    """Flags the prompts in which the reward models rather believe the opposite of a label."""
    if rank_by != "label":
        return {}
    wrong = noise.labelled_pairs(r.labels) & (noise.differences(r.rewards) < 0)
    return _flag("label_contradicted", wrong)


def _flag(name: str, pairs: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """A flag for the prompts that have such a pair."""
    return {name: np.asarray(pairs.any(axis=(1, 2)))}


def _calibrated(rank_by: str, threshold: float, trust: LabelTrust, labels: str, soft: bool) -> Rule:
    def rule(r: Ranked) -> Weighed:
        p = trust.probability(r, rank_by)
        pairs = np.broadcast_to(noise.upper(r.rewards.shape[1]), p.shape)
        if rank_by == "label":
            pairs = pairs & noise.labelled_pairs(r.labels)
        weights = np.where(pairs, p if soft else noise.trust_weight(p), 0.0)
        reverse = np.where(pairs, 1 - p if soft else 0.0, 0.0)
        wrong = pairs & (p < 0.5)
        if rank_by == "label":
            if labels == "flip":
                reverse = np.where(wrong & (not soft), noise.trust_weight(1 - p), reverse)
            else:
                weights, reverse = np.where(wrong, 0.0, weights), np.where(wrong, 0.0, reverse)
                if labels == "drop" and not soft:
                    weights = np.where(pairs & ~wrong, 1.0, 0.0)
        best = _best(r, wrong & (rank_by == "label") & (labels == "flip"))
        members = np.take_along_axis(r.members, best[:, None, None], axis=1)[:, 0]
        lam = noise.trust_weight(noise.pair_probability(members - threshold, trust.factors))
        flags = _flag("label_contradicted", wrong) if rank_by == "label" else {}
        return Weighed(weights + reverse.transpose(0, 2, 1), lam, best, flags)

    return rule


def _best(r: Ranked, flipped: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The response that the SFT part raises: the first, or where its own label was flipped the one it lost to, [p]."""
    first = flipped[:, 0, :]
    winner = np.where(first, r.rewards, -np.inf).argmax(axis=1)
    return np.where(first.any(axis=1), winner, 0)


def _scaled(rule: Rule, scale: float) -> Rule:
    def scaled(r: Ranked) -> Weighed:
        w = rule(r)
        return Weighed(w.pair_weights * scale, w.sft_lambda, w.sft_index, w.flags)

    return scaled


@dataclass(frozen=True)
class GivenWeights:
    """Weights of pairs (better, worse), found by prompt and candidates; pairs that are not named weigh 0."""

    keys: NDArray[np.int64]  # sorted
    weights: Floats
    prompts: int

    @classmethod
    def read(cls, path: Path, column: str, table: RewardTable) -> "GivenWeights":
        """Read a Parquet file: prompt_id, better, worse (candidate ids), `column` (a number of at least 0).

        Rows of prompts that the run does not have are left out. Raises UserError for anything else.
        """
        where = f"weigh: rescore.noise.file {path}"
        try:
            rows = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{where}: no readable Parquet file ({str(error).splitlines()[0]})") from None
        missing = [c for c in ("prompt_id", "better", "worse", column) if c not in rows.column_names]
        if missing:
            raise UserError(f"{where}: has no column `{missing[0]}`; it has {', '.join(rows.column_names)}")
        codes = pc.index_in(rows["prompt_id"], value_set=table.prompt_ids)
        rows = rows.filter(pc.is_valid(codes))
        weights = rows[column].to_numpy().astype(np.float64)
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise UserError(f"{where}: column `{column}` has a weight that is negative or not finite")
        code = codes.drop_null().to_numpy().astype(np.int64)
        keys = _pair_keys(code, rows["better"].to_numpy(), rows["worse"].to_numpy())
        order = np.argsort(keys, kind="stable")
        if len(np.unique(keys)) < len(keys):
            raise UserError(f"{where}: names a pair twice; one row for each pair (prompt_id, better, worse)")
        return cls(keys[order], weights[order], table.prompts)

    def of(self, prompt: NDArray[np.int64], candidates: NDArray[np.int32]) -> Floats:
        """[p, n, n] for prompts [p] with candidates [p, n]."""
        if not len(self.keys):
            return np.zeros((*candidates.shape, candidates.shape[1]))
        wanted = _pair_keys(prompt[:, None, None], candidates[:, :, None], candidates[:, None, :])
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[at] == wanted, self.weights[at], 0.0)


def _pair_keys(prompt: NDArray[Any], better: NDArray[Any], worse: NDArray[Any]) -> NDArray[np.int64]:
    keys = (prompt.astype(np.int64) << 32) | (better.astype(np.int64) << 16) | worse.astype(np.int64)
    return np.asarray(keys)


def _as_given(given: GivenWeights, threshold: float) -> Rule:
    def rule(r: Ranked) -> Weighed:
        weights = given.of(r.prompts, r.candidates)
        return Weighed(weights, noise.threshold_lambda(r.rewards[:, 0], threshold))

    return rule
