"""The figures that compare two policies' answers to the same prompts: what `metrics.json` holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clha.evaluation import metrics as text
from clha.evaluation import statistics as stats
from clha.evaluation.verdict import doubts, verdict


@dataclass(frozen=True)
class Scored:
    """One policy's answers to P prompts, with the rewards that both reward models give them."""

    rewards: stats.Floats  # [P], by the judge
    training_rewards: stats.Floats  # [P], by the reward model that rescoring used
    texts: Sequence[str]
    token_ids: Sequence[Sequence[int]]
    finish_reasons: Sequence[str]

    @property
    def lengths(self) -> stats.Floats:
        """Tokens of each answer, its end token included: [P]."""
        return np.asarray([len(ids) for ids in self.token_ids], dtype=np.float64)

    def take(self, rows: Sequence[int]) -> "Scored":
        """The answers to some of the prompts."""
        at = list(rows)
        return Scored(
            self.rewards[at],
            self.training_rewards[at],
            [self.texts[i] for i in at],
            [self.token_ids[i] for i in at],
            [self.finish_reasons[i] for i in at],
        )


@dataclass(frozen=True)
class Sampling:
    """How uncertainty is worked out."""

    resamples: int
    seed: int
    tie: float


def compare(
    base: Scored,
    trained: Scored,
    *,
    split: str,
    subsets: Sequence[str],
    references: Sequence[str | None],
    judge: dict[str, Any],
    silent: Mapping[str, int],
    sampling: Sampling,
) -> dict[str, Any]:
    """All figures of an evaluation, as plain JSON values.

    `base`, `trained`: answers to the same P prompts, all of one `split`, in the same order. `subsets` [P];
    `references` [P]: the dataset's chosen response where the prompt has one. `judge`: what is known of the unseen
    reward model (`kind`, ...), kept beside the agreement found here. `silent`: how many of
    `prompts` asked are missing here because an answer of `base` or `trained` was empty. Raises ValueError without
    prompts, or when the lengths differ.
    """
    prompts = len(base.rewards)
    if not prompts or {len(trained.rewards), len(subsets), len(references)} != {prompts}:
        raise ValueError("base, trained, subsets and references must hold the same prompts, at least one")
    out: dict[str, Any] = {"split": split} | _core(base, trained, judge, sampling)
    lengths = trained.lengths - base.lengths
    adjusted = stats.length_adjusted_gain(trained.rewards - base.rewards, lengths, sampling.resamples, sampling.seed)
    out["length_adjusted"] = (
        {"gain": adjusted.gain.value, "interval": [adjusted.gain.low, adjusted.gain.high], "per_token": adjusted.slope}
        if adjusted
        else None
    )
    out["repetition"] = {name: _repetition(side) for name, side in (("base", base), ("trained", trained))}
    out["overlap"] = _overlap(base, trained, references)
    out["silent"] = dict(silent)
    out["subsets"] = {}
    for name in sorted(set(subsets)):
        rows = [i for i, s in enumerate(subsets) if s == name]
        out["subsets"][name] = _core(base.take(rows), trained.take(rows), {"kind": judge["kind"]}, sampling)
    said = verdict(out)
    out["verdict"] = {"outcome": said.outcome, "sentence": said.sentence, "caution": said.caution}
    out["doubts"] = doubts(out)
    return out


def _core(base: Scored, trained: Scored, judge: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
    """The figures that make sense for any set of prompts."""
    outcome = stats.win_tie_loss(trained.rewards - base.rewards, sampling.tie)
    agree = stats.agreement(trained.rewards - base.rewards, trained.training_rewards - base.training_rewards)
    lengths = stats.paired_gain(base.lengths, trained.lengths, sampling.resamples, sampling.seed)
    return {
        "reward": _reward(base.rewards, trained.rewards, sampling),
        "wins": outcome.wins,
        "ties": outcome.ties,
        "losses": outcome.losses,
        "judge": {
            **judge,
            "agreement": agree.share.value if agree.share else None,
            "agreement_interval": [agree.share.low, agree.share.high] if agree.share else None,
            "compared": agree.compared,
            "undecided": agree.undecided,
            "correlation": agree.correlation,
            "rank_correlation": agree.rank_correlation,
        },
        "training_reward": _reward(base.training_rewards, trained.training_rewards, sampling) | {"seen": True},
        "lengths": {
            "base": text.length_summary(base.lengths),
            "trained": text.length_summary(trained.lengths),
            "gain": lengths.value,
            "interval": [lengths.low, lengths.high],
        },
        "finish": {
            name: text.finish_rates(side.finish_reasons) | {"empty_rate": _share_empty(side)}
            for name, side in (("base", base), ("trained", trained))
        },
    }


def _reward(base: stats.Floats, trained: stats.Floats, sampling: Sampling) -> dict[str, Any]:
    gain = stats.paired_gain(base, trained, sampling.resamples, sampling.seed)
    in_sd = stats.standardised_gain(base, trained, sampling.resamples, sampling.seed)
    squashed = _sigmoid(base), _sigmoid(trained)
    sigmoid = stats.paired_gain(*squashed, sampling.resamples, sampling.seed)
    return {
        "base": float(base.mean()),
        "trained": float(trained.mean()),
        "gain": gain.value,
        "interval": [gain.low, gain.high],
        "resamples": sampling.resamples,
        "prompts": len(base),
        "p_value": stats.sign_flip_p(trained - base, sampling.resamples, sampling.seed),
        "gain_in_sd": {"gain": in_sd.value, "interval": [in_sd.low, in_sd.high]} if in_sd else None,
        "sigmoid": {
            "base": float(squashed[0].mean()),
            "trained": float(squashed[1].mean()),
            "gain": sigmoid.value,
            "interval": [sigmoid.low, sigmoid.high],
        },
    }


def _sigmoid(x: stats.Floats) -> stats.Floats:
    return np.exp(-np.logaddexp(0.0, -x))


def _share_empty(side: Scored) -> float:
    return sum(not t.strip() for t in side.texts) / len(side.texts)


def _repetition(side: Scored) -> dict[str, float | None]:
    return {
        "repetition_4": text.repetition_rate(side.token_ids, 4),
        "distinct_1": text.distinct_n(side.token_ids, 1),
        "distinct_2": text.distinct_n(side.token_ids, 2),
    }


def _overlap(base: Scored, trained: Scored, references: Sequence[str | None]) -> dict[str, Any]:
    """BLEU against the chosen response, where there is one."""
    rows = [i for i, r in enumerate(references) if r is not None]
    wanted = [r for r in references if r is not None]
    out: dict[str, Any] = {"prompts": len(rows), "bleu_char_legacy": None, "sacrebleu": None}
    if rows:
        said = {"base": [base.texts[i] for i in rows], "trained": [trained.texts[i] for i in rows]}
        out["bleu_char_legacy"] = {name: text.bleu_char_legacy(texts, wanted) for name, texts in said.items()}
        scores = {name: text.sacrebleu_score(texts, wanted) for name, texts in said.items()}
        out["sacrebleu"] = {name: s["score"] for name, s in scores.items()}
        out["sacrebleu"]["signature"] = scores["base"]["signature"]
    return out
