"""Fits a reward model on the preference pairs of one split: `fit_reward.train` and `fit_reward.eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clha.digests import canonical_json, digest_of
from clha.errors import UserError
from clha.stages.features import Reader, features_of
from clha.store import Artifact

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from clha.rewards.texts import RewardInput
    from clha.settings import RewardFit
    from clha.stages.work import Work

CODE_VERSION = {"fit_reward": 3}


@dataclass(frozen=True)
class Pair:
    """A preference: rows of the list of responses, the group that must not be parted, and its weight."""

    prompt_id: str
    group: str
    chosen: int
    rejected: int
    weight: float


@dataclass(frozen=True)
class PairData:
    """All pairs of a split, the distinct responses they are made of, and what could not be used."""

    pairs: list[Pair]
    responses: list[RewardInput]
    quarantine: list[dict[str, Any]]


def build(work: Work) -> Artifact:
    """Fit the node's reward model. Raises UserError when there are too few pairs to cross-validate."""
    from clha.rewards.adapters import scoring_device
    from clha.rewards.report import fit_pairs

    role = work.node.rsplit(".", 1)[-1]
    assert work.settings.fit_reward is not None
    fit: RewardFit = getattr(work.settings.fit_reward, role)
    split = f"reward_{role}"
    rows = [r for r in work.inputs["prepare"].rows("prompts") if r["split"] == split]
    data = pairs_of(rows)
    rows_in = len(data.pairs) + len(data.quarantine)
    reader = Reader(work.models["encoder"], work.parts["models"]["encoder"], fit)
    features = features_of(work.home, work.inputs["prepare"], reader, data.responses, work.progress)
    pairs, bad = _finite(data.pairs, features.values)
    work.writer.write_quarantine(0, data.quarantine + bad)
    work.check_quarantine(rows_in, fit.max_quarantined, f"fit_reward.{role}.max_quarantined")
    groups = len({p.group for p in pairs})
    if groups < 2 * fit.folds:
        raise UserError(
            f"{work.node}: pairs of {groups} dialogues in split {split}, at least {2 * fit.folds} needed "
            f"(2 for each of {fit.folds} folds); give more pairs, a larger prepare.splits.{split} or fewer folds"
        )
    work.progress.log(f"{work.node}: fitting on {len(pairs)} pairs, {fit.folds} folds")
    lengths = np.array([len(r.response) for r in data.responses])
    head, report = fit_pairs(
        features.values,
        np.array([[p.chosen, p.rejected] for p in pairs]),
        weights=np.array([p.weight for p in pairs]),
        groups=[p.group for p in pairs],
        lengths=lengths,
        fit=fit,
        config={
            "encoder": work.parts["models"]["encoder"],
            "encoder_name": work.models["encoder"].name,
            "layer": fit.layer,
            "pooling": fit.pooling,
            "max_tokens": fit.max_tokens,
        },
    )
    report |= {"split": split, "prompts": len({p.prompt_id for p in pairs}), "groups": groups}
    report |= {"responses_truncated": int(features.truncated.sum())}
    for name, content in head.files().items():
        work.writer.write_bytes(f"reward_model/{name}", content)
    work.writer.write_bytes("fit.json", (canonical_json(report) + "\n").encode())
    low, high = report["accuracy_interval"]
    work.progress.log(
        f"{work.node}: {report['accuracy']:.1%} [{low:.1%}, {high:.1%}] of held-out pairs right, l2 {report['l2']:g}"
    )
    return work.finish(
        rows_in=rows_in,
        rows_out=len(pairs),
        seed=fit.seed,
        device=scoring_device(),
        accuracy=report["accuracy"],
        accuracy_interval=report["accuracy_interval"],
        l2=report["l2"],
        features=features.key,
        weights_digest=digest_of([content.hex() for content in head.files().values()]),
    )


def pairs_of(rows: list[dict[str, Any]]) -> PairData:
    """Every chosen response of a prompt against every rejected one; each prompt weighs 1 in all.

    Pairs with an empty response, or with the same text on both sides, go to quarantine.
    """
    from clha.rewards.texts import RewardInput

    pairs: list[Pair] = []
    responses: list[RewardInput] = []
    quarantine: list[dict[str, Any]] = []
    for row in rows:
        place: dict[str, int] = {}
        made = []
        for c, chosen in enumerate(row["chosen"]):
            for r, rejected in enumerate(row["rejected"]):
                reason = _unusable(chosen, rejected)
                if reason:
                    detail = f"chosen {c}, rejected {r}"
                    quarantine.append({"prompt_id": row["prompt_id"], "reason": reason, "detail": detail})
                    continue
                for text in (chosen, rejected):
                    if text not in place:
                        place[text] = len(responses)
                        responses.append(RewardInput(row["messages"], text))
                made.append((place[chosen], place[rejected]))
        group = next(m["content"] for m in row["messages"] if m["role"] == "user")
        pairs += [Pair(row["prompt_id"], group, c, r, 1 / len(made)) for c, r in made]
    return PairData(pairs, responses, quarantine)


def _unusable(chosen: str, rejected: str) -> str | None:
    if not chosen.strip() or not rejected.strip():
        return "empty response"
    return "identical responses" if chosen.strip() == rejected.strip() else None


def _finite(pairs: list[Pair], features: NDArray[np.float64]) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Pairs whose features are finite, and the quarantine rows of the others."""
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(features).all(axis=1))
    good = [p for p in pairs if finite[p.chosen] and finite[p.rejected]]
    bad = [
        {"prompt_id": p.prompt_id, "reason": "features not finite", "detail": ""}
        for p in pairs
        if not (finite[p.chosen] and finite[p.rejected])
    ]
    return good, bad
