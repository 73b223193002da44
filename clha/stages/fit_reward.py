"""Fits a reward model on the preference pairs of one split: `fit_reward.train` and `fit_reward.eval`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clha.digests import canonical_json, digest_of, file_sha256
from clha.errors import UserError
from clha.stages.features import Reader, features_of
from clha.store import Artifact

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from clha.rewards.texts import RewardInput
    from clha.settings_rewards import RewardFit
    from clha.stages.work import Work

CODE_VERSION = {"fit_reward": 6}


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
    """Fit the node's reward model. Raises UserError when there are too few pairs to hold some out."""
    from clha.rewards.adapters import scoring_device

    role = work.node.rsplit(".", 1)[-1]
    assert work.settings.fit_reward is not None
    fit: RewardFit = getattr(work.settings.fit_reward, role)
    split = f"reward_{role}"
    data = pairs_of([r for r in work.inputs["prepare"].rows("prompts") if r["split"] == split])
    rows_in = len(data.pairs) + len(data.quarantine)
    device = scoring_device()
    fitted = _fit_model(work, fit, data, device) if fit.method == "lora" else _fit_head(work, fit, data)
    pairs, report = fitted.pairs, fitted.report
    report = {"groups": len({p.group for p in pairs})} | report
    report |= {"split": split, "prompts": len({p.prompt_id for p in pairs}), "responses_truncated": fitted.truncated}
    work.writer.write_bytes("fit.json", (canonical_json(report) + "\n").encode())
    low, high = report["accuracy_interval"]
    l2 = f", l2 {report['l2']:g}" if "l2" in report else ""
    work.progress.log(
        f"{work.node}: {report['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {report['pairs']} held-out pairs right{l2}"
    )
    return work.finish(
        rows_in=rows_in,
        rows_out=len(pairs),
        seed=fit.seed,
        device=device,
        accuracy=report["accuracy"],
        accuracy_interval=report["accuracy_interval"],
        l2=report.get("l2"),
        features=fitted.features,
        weights_digest=fitted.digest,
    )


@dataclass(frozen=True)
class Fitted:
    """What became of the pairs: those that were used, the report (fit.json), cut responses, digest of the weights."""

    pairs: list[Pair]
    report: dict[str, Any]
    truncated: int
    digest: str
    features: str | None = None  # key of the artifact


def _fit_head(work: Work, fit: RewardFit, data: PairData) -> Fitted:
    """Method head: the files of a linear head go to `reward_model/`."""
    from clha.rewards.report import fit_pairs

    reader = Reader(work.models["encoder"], work.parts["models"]["encoder"], fit)
    features = features_of(work.home, work.inputs["prepare"], reader, data.responses, work.progress)
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(features.values).all(axis=1))
    pairs = _usable_pairs(work, fit, data, {int(i): "" for i in np.flatnonzero(~finite)}, "features not finite")
    head, report = fit_pairs(
        features.values,
        np.array([[p.chosen, p.rejected] for p in pairs]),
        weights=np.array([p.weight for p in pairs]),
        groups=[p.group for p in pairs],
        lengths=np.array([len(r.response) for r in data.responses]),
        fit=fit,
        config=_config(work, fit) | {"layer": fit.layer, "pooling": fit.pooling},
    )
    files = head.files()
    for name, content in files.items():
        work.writer.write_bytes(f"reward_model/{name}", content)
    digest = digest_of([content.hex() for content in files.values()])
    return Fitted(pairs, report, int(features.truncated.sum()), digest, features.key)


def _fit_model(work: Work, fit: RewardFit, data: PairData, device: str) -> Fitted:
    """Method lora: a whole sequence classifier, as a Hugging Face folder, goes to `reward_model/`."""
    from clha.rewards.texts import encode_all, text_encoder
    from clha.rewards.tuning import LabelledTexts, save_classifier, tune

    encoder = work.models["encoder"]
    texts = text_encoder(encoder, fit.max_tokens, closed=True)
    places, encoded, problems = encode_all(texts, data.responses)
    pairs = _usable_pairs(work, fit, data, problems, "unreadable")
    row = {place: i for i, place in enumerate(places)}
    labelled = LabelledTexts(
        encoded,
        np.array([[row[p.chosen], row[p.rejected]] for p in pairs]),
        np.array([p.weight for p in pairs]),
        [p.group for p in pairs],
        np.array([len(data.responses[place].response) for place in places]),
    )
    model, report = tune(encoder, labelled, texts.pad_id, fit, device, work.writer.scratch, work.progress)
    config = _config(work, fit) | {
        "layer": None,
        "threshold": report["sft_threshold"],
        "threshold_rule": f"quantile {fit.sft_quantile:g} of rewards of dataset_chosen responses of the held-out fold",
        "unit": "log-odds",
    }
    folder = work.writer.folder / "reward_model"
    save_classifier(model, encoder, texts.pad_id, folder, config)
    digest = digest_of([file_sha256(p) for p in sorted(folder.glob("*.safetensors"))])
    return Fitted(pairs, report, sum(e.truncated for e in encoded), digest)


def _config(work: Work, fit: RewardFit) -> dict[str, Any]:
    """What the reward model's own configuration says of where it comes from."""
    return {
        "encoder": work.parts["models"]["encoder"],
        "encoder_name": work.models["encoder"].name,
        "max_tokens": fit.max_tokens,
    }


def _usable_pairs(work: Work, fit: RewardFit, data: PairData, bad: Mapping[int, str], reason: str) -> list[Pair]:
    """The pairs whose responses can be used; the others go to quarantine.

    `bad`: {row of the responses: detail}. Raises UserError when too many are bad, or too few are left.
    """
    role = work.node.rsplit(".", 1)[-1]
    pairs, quarantine = [], list(data.quarantine)
    for p in data.pairs:
        found = next((i for i in (p.chosen, p.rejected) if i in bad), None)
        if found is None:
            pairs.append(p)
        else:
            quarantine.append({"prompt_id": p.prompt_id, "reason": reason, "detail": bad[found]})
    work.writer.write_quarantine(0, quarantine)
    rows_in = len(data.pairs) + len(data.quarantine)
    work.check_quarantine(rows_in, fit.max_quarantined, f"fit_reward.{role}.max_quarantined")
    groups = len({p.group for p in pairs})
    if groups < 2 * fit.folds:
        raise UserError(
            f"{work.node}: pairs of {groups} dialogues in split reward_{role}, at least {2 * fit.folds} needed "
            f"(2 for each of {fit.folds} folds); give more pairs, a larger prepare.splits.reward_{role} or fewer folds"
        )
    work.progress.log(f"{work.node}: fitting on {len(pairs)} pairs, {fit.folds} folds")
    return pairs


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
