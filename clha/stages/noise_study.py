"""The noise study: flipped labels, reward models that look for them, and short runs with and without weights.

In a process of its own: `python -m clha.stages.noise_study --home H --run R [--set noise_study.rates=[0.2]]`.

The features, each detection and each trained policy are artifacts of their own kinds, so a study that was
stopped goes on where it was, and another seed or rate adds its cells only.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clha.config import settings_from
from clha.digests import digest_of
from clha.errors import UserError
from clha.progress import Progress
from clha.runs import existing_run
from clha.stages.study_cells import JUDGED, CellProgress, Study, StudyInput, count_cells
from clha.store import Artifact, ArtifactWriter, Home, write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from clha.runs import Run
    from clha.settings import NoiseStudy, Settings
    from clha.settings_rewards import RewardFit
    from clha.study.detection import Detection, LabelledPairs


def study_of_run(home: Home, run: Run, settings: Settings, progress: Progress) -> dict[str, Any]:
    """The noise study on the prepared data of a run, with its policy and the reward model of its rescoring.

    The tables go to reports/<run>/noise-study.json and .md. Raises UserError when the run has not prepared its data
    or fits no reward model.
    """
    from clha.models import resolve_model

    prepare = home.find("prepare", run.nodes.get("prepare", ""))
    if prepare is None:
        raise UserError(f"noise study: run {run.name} has no finished prepare; run `clha run-stage prepare` first")
    if settings.fit_reward is None:
        raise UserError("noise study: the settings have no fit_reward, whose features it needs; add fit_reward.train")
    fit = settings.fit_reward.train
    policy, encoder = resolve_model(settings.policy.model, home), resolve_model(fit.encoder, home)
    digests = {"policy": policy.digest, "encoder": encoder.digest}
    given = StudyInput(prepare, policy.path, encoder.path, digests, settings.policy.chat_template)
    report = home.reports / run.name / "noise-study.json"
    return run_study(home, settings.noise_study, fit, given, progress, report)


def run_study(
    home: Home, settings: NoiseStudy, fit: RewardFit, given: StudyInput, progress: Progress, report: Path | None = None
) -> dict[str, Any]:
    """Run, or complete, a study.

    Returns {"detection": [...], "training": [...]} and writes it to `report` as JSON and, beside it, as Markdown
    tables. Raises UserError when there are too few pairs, before anything is computed.
    """
    from clha.study.tables import markdown, study_grids

    study = Study(home, settings, fit, given, CellProgress(progress, count_cells(settings)))
    rows = {role: _rows(study, split, limit) for role, split, limit in _roles(settings)}
    _check_dialogues(study, rows)
    pairs = _features(study, rows)
    _check_dialogues(study, rows)  # pairs whose features are not finite are gone
    detection = []
    for rate in settings.rates:
        for seed in settings.seeds:
            for arm in settings.arms:
                detection.append(_detection(study, pairs, rate, seed, arm).figures)
    training = [t for rate in settings.trained_rates for t in _training(study, rows, pairs, rate)]
    results = {"detection": detection, "training": training, "settings": settings.key_settings()}
    if report is not None:
        write_atomic(report, json.dumps(results, indent=1).encode())
        write_atomic(report.with_suffix(".md"), markdown(study_grids(results)).encode())
    return results


def _roles(settings: NoiseStudy) -> list[tuple[str, str, int]]:
    return [
        ("reward", "reward_train", settings.reward_pairs),
        ("train", "train", settings.train_pairs),
        ("test", "test", settings.test_pairs),
    ]


def _rows(study: Study, split: str, limit: int) -> list[dict[str, Any]]:
    """The first pair of each prompt of a split: id, group, messages, chosen, rejected; in the order of ids."""
    rows = []
    for r in study.given.prepare.rows("prompts"):
        if r["split"] == split and r["chosen"] and r["rejected"] and r["chosen"][0].strip() != r["rejected"][0].strip():
            group = next(m["content"] for m in r["messages"] if m["role"] == "user")
            rows.append(
                {"id": r["prompt_id"], "group": group, "messages": r["messages"]}
                | {"chosen": r["chosen"][0], "rejected": r["rejected"][0]}
            )
    if len(rows) < 20:
        raise UserError(f"noise study: {len(rows)} pairs in split {split}, at least 20 needed; see prepare.splits")
    return sorted(rows, key=lambda r: r["id"])[:limit]


def _check_dialogues(study: Study, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Raises UserError when reward models cannot be cross-validated on these pairs, or gains have no interval."""
    from clha.study.summary import ONE_DIALOGUE

    fitted_on = len({r["group"] for r in rows["reward"]})
    if fitted_on < study.fit.folds:
        raise UserError(
            f"noise study: pairs of {fitted_on} dialogues to fit reward models on, at least {study.fit.folds} needed "
            "(fit_reward.train.folds); raise noise_study.reward_pairs"
        )
    if study.settings.compares and len({r["group"] for r in rows["test"]}) < 2:
        raise UserError(ONE_DIALOGUE)


def _features(study: Study, rows: dict[str, list[dict[str, Any]]]) -> dict[str, LabelledPairs]:
    """Features of all responses, an artifact of their own."""
    import numpy as np

    from clha.rewards.texts import RewardInput
    from clha.stages.features import Reader, features_of
    from clha.study.detection import LabelledPairs

    wanted = [r for role in ("reward", "train") for r in rows[role]]
    items = [RewardInput(r["messages"], r[side]) for r in wanted for side in ("chosen", "rejected")]
    given = study.given
    study.progress.begin("features")
    reader = Reader(given.encoder, given.models["encoder"], study.fit)
    values = features_of(study.home, given.prepare, reader, items, study.progress).values
    values = values.reshape(len(wanted), 2, -1)
    out, start = {}, 0
    for role in ("reward", "train"):
        own = values[start : start + len(rows[role])]
        usable: NDArray[np.bool_] = np.asarray(np.isfinite(own).all(axis=(1, 2)))
        kept = [r for r, u in zip(rows[role], usable, strict=True) if u]
        start += len(rows[role])
        rows[role] = kept
        out[role] = LabelledPairs(
            [r["id"] for r in kept],
            [r["group"] for r in kept],
            own[usable],
            np.array([[len(r["chosen"]), len(r["rejected"])] for r in kept]),
        )
    return out


def _cell_settings(study: Study, rate: float, seed: int) -> dict[str, Any]:
    sizes = {"reward_pairs": study.settings.reward_pairs, "train_pairs": study.settings.train_pairs}
    return {"rate": rate, "seed": seed, **sizes, "fit": study.fit.key_settings()}


def _detection(study: Study, pairs: dict[str, LabelledPairs], rate: float, seed: int, arm: str) -> Detection:
    """How a reward model judges the labels; the table `labels` keeps the truth: prompt_id, flipped, p_right."""
    import pyarrow as pa

    from clha.study.detection import Detection, detect, flips

    def make(writer: ArtifactWriter) -> dict[str, Any]:
        found = detect(pairs["reward"], pairs["train"], rate, seed, arm, study.fit)
        ids = pairs["train"].ids
        columns = {"prompt_id": ids, "flipped": flips(ids, rate, seed), "p_right": found.p_right}
        writer.write_shard("labels", 0, pa.table(columns))
        writer.write_bytes("detection.json", json.dumps(found.figures).encode())
        auroc = found.figures["auroc"]
        told = "no label to find" if auroc is None else f"AUROC {auroc:.3f}"
        study.progress.log(f"flips {rate:.0%}, seed {seed}, {arm}: {told}")
        return {"rows": len(ids)}

    artifact = study.cell("noise_detection", _cell_settings(study, rate, seed) | {"arm": arm}, make)
    figures = json.loads((artifact.folder / "detection.json").read_text())
    return Detection(artifact.read("labels")["p_right"].to_numpy(), figures)


def _training(
    study: Study, rows: dict[str, list[dict[str, Any]]], pairs: dict[str, LabelledPairs], rate: float
) -> list[dict[str, Any]]:
    """One row for the policy as it was and one for each way of weighting, over all seeds."""
    import numpy as np

    from clha.study.summary import ONE_DIALOGUE, paired_gain

    right: dict[str, list[Any]] = {name: [] for name in ("before training", *study.settings.weights)}
    groups: list[str] = []
    seconds: dict[str, float] = {}
    for name, judged in right.items():
        for seed in study.settings.seeds[:1] if name == "before training" else study.settings.seeds:
            artifact = _policy(study, rows, pairs, rate, seed, name)
            table = artifact.read("judged")
            judged.append(table["margin"].to_numpy() > 0)
            groups = table["group"].to_pylist()
            if study.settings.compares and len(set(groups)) < 2:  # the policy as it was comes first: nothing is trained
                raise UserError(ONE_DIALOGUE)
            seconds[name] = max(seconds.get(name, 0.0), artifact.manifest["seconds"])
    out = []
    for name, judged in right.items():
        row: dict[str, Any] = {"rate": rate, "weights": name, "accuracy": float(np.mean(judged))}
        row |= {"seeds": len(judged), "seconds": seconds[name]}
        if name not in ("none", "before training") and "none" in right:
            row["gain"] = paired_gain(judged, right["none"], groups)
        out.append(row)
    return out


def _template(name: str) -> str:
    """What a key says of a chat template: the policy's own is in its digest, of a shipped one the content counts."""
    from clha.chat import shipped_template

    return name if name == "model" else digest_of(shipped_template(name))


def _policy(
    study: Study, rows: dict[str, list[dict[str, Any]]], pairs: dict[str, LabelledPairs], rate: float, seed: int,
    name: str,
) -> Artifact:  # fmt: skip
    """The held-out judgement of one trained policy, as table `judged`: group, margin (nats per token)."""
    settings = study.settings
    untrained = name == "before training"
    judged = _detection(study, pairs, rate, seed, settings.train_arm) if name in JUDGED else None

    def make(writer: ArtifactWriter) -> dict[str, Any]:
        import pyarrow as pa

        from clha.chat import load_chat
        from clha.loading import load_policy
        from clha.rewards.adapters import scoring_device
        from clha.study.detection import arm_weights, detect_by_length, flips
        from clha.study.policies import preference_margins, ranked_pair, train_policy

        began = time.monotonic()
        chat = load_chat(study.given.policy, study.given.chat_template)
        tested = [(r, ranked_pair(chat, r["messages"], r["chosen"], r["rejected"], settings)) for r in rows["test"]]
        usable = [(r, pair) for r, pair in tested if pair is not None]
        facts: dict[str, Any] = {}
        if untrained:
            model = load_policy(study.given.policy).to(scoring_device())
        else:
            p_right = judged.p_right if judged else None
            if name == "length":
                p_right = detect_by_length(pairs["reward"], pairs["train"], rate, seed, study.fit).p_right
            flipped = flips(pairs["train"].ids, rate, seed)
            weights = arm_weights(name, p_right, flipped, seed)
            trained = []
            for r, w, swap in zip(rows["train"], weights, flipped, strict=True):
                first, second = (r["rejected"], r["chosen"]) if swap else (r["chosen"], r["rejected"])
                trained.append(ranked_pair(chat, r["messages"], first, second, settings, float(w)))
            kept = [p for p in trained if p is not None]
            model = train_policy(study.given.policy, chat, kept, settings, seed, writer.scratch, study.progress)
            facts = {"trained_pairs": len(kept), "kept_pairs": int((weights > 0).sum())}
        margins = preference_margins(model, [pair for _, pair in usable])
        table = pa.table({"group": [r["group"] for r, _ in usable], "margin": margins})
        writer.write_shard("judged", 0, table)
        study.progress.log(
            f"flips {rate:.0%}, seed {seed}, {name}: {(margins > 0).mean():.3f} of {len(margins)} held-out pairs "
            f"right, {time.monotonic() - began:.0f} s"
        )
        return {"rows": len(margins), **facts}

    what = _cell_settings(study, rate, seed) | settings.key_settings("rates", "train_rates", "seeds", "arms", "weights")
    if untrained:
        what = {k: settings.key_settings()[k] for k in ("test_pairs", "max_tokens", "max_prompt_tokens")}
    what |= {"weights": name, "chat_template": _template(study.given.chat_template)}
    return study.cell("noise_training", what, make)


def main() -> None:
    """Conduct the study of a run as a child process."""
    from clha.process import child_main

    parser = argparse.ArgumentParser()
    parser.add_argument("--home", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    args = parser.parse_args()

    def work(progress: Progress) -> None:
        home = Home(Path(args.home))
        run = existing_run(home, args.run)
        study_of_run(home, run, settings_from(run.settings, args.overrides, where=f"run {run.name}"), progress)

    child_main(work)


if __name__ == "__main__":
    main()
