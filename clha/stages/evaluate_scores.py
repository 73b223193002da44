"""The `evaluate` node: both reward models score both policies' answers, and the figures that follow from it."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clha.digests import digest_of
from clha.errors import StageFailure, UserError
from clha.evaluation.comparison import Sampling, Scored, compare
from clha.models import resolve_model
from clha.rewards.adapters import load_scorer, model_folders, scoring_device
from clha.rewards.scoring import report_to
from clha.rewards.texts import RewardInput, without_oldest_turns
from clha.schema import SCORES
from clha.store import Artifact, read_parquet, write_parquet_atomic

if TYPE_CHECKING:
    from clha.settings_rewards import RewardModel
    from clha.stages.work import Work

POLICIES = ("base", "trained")

# Rows that are scored between two saves; of no influence on what comes out.
_SHARD_ROWS = 256

Row = dict[str, Any]


def build_scores(work: "Work") -> Artifact:
    """Build the artifact of an `evaluate` node: table `scores` and `metrics.json`.

    rows_in are the test prompts that at least one policy answered. Raises StageFailure for an answer to a prompt
    outside the split, UserError when too many prompts are lost or a reward model is constant.
    """
    columns = ["prompt_id", "subset", "split", "messages", "chosen"]
    split = work.settings.evaluate.split
    prompts = {r["prompt_id"]: r for r in work.inputs["prepare"].rows("prompts", columns) if r["split"] == split}
    answers = {p: {r["prompt_id"]: r for r in work.inputs[f"answers.{p}"].rows("answers")} for p in POLICIES}
    ids = sorted(set(answers["base"]) | set(answers["trained"]))
    strangers = [i for i in ids if i not in prompts]
    if strangers:
        raise StageFailure(
            f"{work.node}: {len(strangers)} answered prompts are not in the {split} split: {strangers[0]}"
        )
    if not ids:
        raise UserError(
            f"{work.node}: no {split} prompt was answered; raise prepare.splits.{split} or give more prompts"
        )
    pending = [(policy, i) for i in ids for policy in POLICIES if i in answers[policy]]
    rows = [_scored_row(prompts[i], answers[policy][i], policy) for policy, i in pending]
    # The same answer of both policies is scored once: a tie is then a tie, to the last digit.
    labels = [(i, answers[policy][i].get("truncated_turns") or 0, answers[policy][i]["text"]) for policy, i in pending]
    distinct = list(dict.fromkeys(labels))
    inputs = [RewardInput(without_oldest_turns(prompts[i]["messages"], turns), text) for i, turns, text in distinct]

    ours, theirs = _models(work, "evaluate"), _models(work, "rescore")
    seen = bool(set(ours) & set(theirs))
    settings = work.settings
    same = ours == theirs and settings.evaluate.reward.key_settings() == settings.rescore.reward.key_settings()
    for role, column in (("evaluate", "reward"), ("rescore", "training_reward")):
        if role == "evaluate" or not same:
            scored = dict(zip(distinct, _score(work, role, inputs, distinct), strict=True))
            _check_varied(work, role, inputs, [r for r, _, _ in scored.values()])
        for row, label in zip(rows, labels, strict=True):
            row[column], truncated, problem = scored[label]
            row["truncated"] = row["truncated"] or truncated or label[1] > 0
            row["problem"] = row["problem"] or problem

    kept, quarantined, silent = _reconcile(ids, rows, answers)
    work.writer.write_quarantine(0, quarantined)
    work.writer.write_shard("scores", 0, [r for pair in kept.values() for r in pair.values()], SCORES)
    work.check_quarantine(len(ids), work.settings.evaluate.max_quarantined, "evaluate.max_quarantined")
    if not kept:
        raise UserError(f"{work.node}: no prompt has two answers that can be scored; see {work.writer.folder}")
    figures = _figures(work, kept, prompts, answers, seen=seen, silent=silent | {"prompts": len(ids)})
    work.writer.write_bytes("metrics.json", json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False).encode())
    work.progress.log(figures["verdict"]["sentence"])
    return work.finish(
        rows_in=len(ids),
        rows_out=len(kept),
        seed=work.settings.evaluate.seed,
        device=scoring_device(),
        answers_scored=len(distinct),
        verdict=figures["verdict"]["outcome"],
    )


def _scored_row(prompt: Row, answer: Row, policy: str) -> Row:
    return {
        "prompt_id": prompt["prompt_id"],
        "policy": policy,
        "reward": None,
        "length": len(answer["response_token_ids"]),
        "training_reward": None,
        "truncated": False,
        "problem": "",  # for the quarantine; no column of the table
    }


def _models(work: "Work", user: str) -> list[str]:
    """Digest of the folder of each model of `rescore.reward` or `evaluate.reward`, whatever type it is loaded by."""
    reward: RewardModel = getattr(work.settings, user).reward
    fitted = "fit_reward.eval" if user == "evaluate" else "fit_reward.train"
    digests = []
    for role, part in reward.parts(f"{user}.reward").items():
        if part.type == "fitted":
            folder = work.inputs[fitted].folder / "reward_model"
            digests.append(resolve_model(str(folder), work.home).digest)
        else:
            digests.append(work.parts["models"][role])
    return digests


def _score(work: "Work", role: str, inputs: list[RewardInput], labels: Sequence[Any]) -> list[tuple[float, bool, str]]:
    """(reward, truncated, why it could not be read) of each input, with one reward model in memory at a time.

    Saved every few hundred rows: a later attempt takes up from there.
    """
    settings: RewardModel = getattr(work.settings, role).reward
    fitted = work.inputs.get("fit_reward.eval" if role == "evaluate" else "fit_reward.train")
    scorer = None
    out: list[tuple[float, bool, str]] = []
    done, name = 0, "unseen reward model" if role == "evaluate" else "training reward model"
    with ExitStack() as opened:
        for start in range(0, len(inputs), _SHARD_ROWS):
            chunk = slice(start, start + _SHARD_ROWS)
            path = work.writer.scratch / f"{role}-{digest_of(labels[chunk])[:24]}.parquet"
            if not path.is_file():
                if scorer is None:
                    folders = model_folders(work.models, f"{role}.reward")
                    loaded = load_scorer(settings, folders, fitted.folder if fitted else None)
                    scorer = opened.enter_context(closing(loaded))
                scored = scorer.score(inputs[chunk], report_to(work.progress, len(inputs), f"answers, {name}", done))
                problems = [scored.problems.get(i, "") for i in range(len(scored.rewards))]
                columns = {"reward": scored.rewards, "truncated": scored.truncated, "problem": problems}
                write_parquet_atomic(path, pa.table(columns))
            table = read_parquet(path)
            out += zip(*(table[c].to_pylist() for c in ("reward", "truncated", "problem")), strict=True)
            done += table.num_rows
            work.progress.update(done, len(inputs), f"answers, {name}")
    return out


def _check_varied(work: "Work", role: str, inputs: list[RewardInput], rewards: list[float]) -> None:
    """Raises UserError for a reward model that gives unlike answers the same reward."""
    finite = np.asarray([r for r in rewards if np.isfinite(r)])
    if len(finite) > 1 and float(np.ptp(finite)) == 0.0 and len({i.response for i in inputs}) > 1:
        raise UserError(
            f"{work.node}: {role}.reward gives all {len(finite)} answers the reward {finite[0]:g}; a constant reward "
            "model judges nothing, choose another"
        )


def _reconcile(
    ids: list[str], rows: list[Row], answers: Mapping[str, Mapping[str, Row]]
) -> tuple[dict[str, dict[str, Row]], list[Row], dict[str, int]]:
    """Prompts with two finite scores, {prompt_id: {policy: row}}, the quarantine of the others, and per policy how
    many empty answers sent a prompt there.
    """
    by_prompt: dict[str, dict[str, Row]] = {i: {} for i in ids}
    for row in rows:
        by_prompt[row["prompt_id"]][row["policy"]] = row
    kept: dict[str, dict[str, Row]] = {}
    quarantined = []
    silent = dict.fromkeys(POLICIES, 0)
    for i, pair in by_prompt.items():
        missing = [p for p in POLICIES if p not in pair]
        empty = [p for p, r in pair.items() if not answers[p][i]["text"].strip() and not _finite(r)]
        unscored = [p for p, r in pair.items() if not _finite(r)]
        if missing:
            quarantined.append({"prompt_id": i, "reason": "answer missing", "detail": f"no answer of {missing[0]}"})
        elif empty:
            for p in empty:
                silent[p] += 1
            quarantined.append({"prompt_id": i, "reason": "empty answer", "detail": f"of {' and '.join(empty)}"})
        elif unscored:
            detail = "; ".join(f"answer of {p}: {pair[p]['problem'] or 'NaN or infinite'}" for p in unscored)
            quarantined.append({"prompt_id": i, "reason": "reward not finite", "detail": detail})
        else:
            kept[i] = pair
    return kept, quarantined, silent


def _finite(row: Row) -> bool:
    return bool(np.isfinite(row["reward"]) and np.isfinite(row["training_reward"]))


def _figures(
    work: "Work",
    kept: Mapping[str, Mapping[str, Row]],
    prompts: Mapping[str, Row],
    answers: Mapping[str, Mapping[str, Row]],
    *,
    seen: bool,
    silent: Mapping[str, int],
) -> dict[str, Any]:
    settings = work.settings.evaluate
    sides = {
        policy: Scored(
            np.asarray([kept[i][policy]["reward"] for i in kept]),
            np.asarray([kept[i][policy]["training_reward"] for i in kept]),
            [answers[policy][i]["text"] for i in kept],
            [answers[policy][i]["response_token_ids"] for i in kept],
            [answers[policy][i]["finish_reason"] for i in kept],
        )
        for policy in POLICIES
    }
    return compare(
        sides["base"],
        sides["trained"],
        split=settings.split,
        subsets=[prompts[i]["subset"] or "" for i in kept],
        references=[(prompts[i]["chosen"] or [None])[0] for i in kept],
        judge={"kind": settings.reward.type, "unseen": not seen, "held_out_accuracy": _held_out(work)},
        silent=silent,
        sampling=Sampling(settings.resamples, settings.seed, settings.tie),
    )


def _held_out(work: "Work") -> dict[str, Any] | None:
    """How often the judge is right on pairs that it was not fitted on, where that was measured."""
    fitted = work.inputs.get("fit_reward.eval")
    path = fitted.folder / "fit.json" if fitted else None
    if path is None or not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    return {"value": report["accuracy"], "interval": report["accuracy_interval"], "pairs": report["pairs"]}
