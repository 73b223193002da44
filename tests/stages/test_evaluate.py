"""The evaluate node: answers judged by real (small) reward models, rows reconciled, figures that follow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reward_cases import node_work, preference_rows, prompt_row, settings, write_artifact, write_prompts

from clha.errors import StageFailure, UserError
from clha.models import resolve_model
from clha.rewards.head import Head
from clha.rewards.scoring import Padding
from clha.schema import ANSWERS
from clha.stages import evaluate
from clha.stages.work import Work
from clha.store import Artifact, ArtifactWriter, Home

TESTS = preference_rows(8, split="test")


def answers(texts: dict[str, str], policy: str) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": i,
            "text": text,
            "prompt_token_ids": [1],
            "response_token_ids": list(range(5, 5 + len(text))),
            "finish_reason": "eos",
            "truncated_turns": 0,
            "policy": policy,
        }
        for i, text in texts.items()
    ]


def write_head(home: Home, role: str, members: np.ndarray, width: int = 64) -> Artifact:
    """A fit_reward artifact with given weights."""
    config = {"layer": 1, "pooling": "response_mean", "max_tokens": 256, "threshold": 0.0}
    from clha.rewards.fitting import Standardiser

    head = Head(Standardiser(np.zeros(width), np.ones(width)), members, config)
    writer = ArtifactWriter(home, "fit_reward", role.ljust(20, "0"))
    for name, content in head.files().items():
        writer.write_bytes(f"reward_model/{name}", content)
    report = {"accuracy": 0.8, "accuracy_interval": [0.7, 0.87], "pairs": 90}
    writer.write_bytes("fit.json", json.dumps(report).encode())
    return writer.finish(rows_in=0, rows_out=0, facts={})


def make_work(
    home: Home,
    model: Path,
    base: dict[str, str],
    trained: dict[str, str],
    *,
    prompts: list[dict[str, Any]] = TESTS,
    weights: np.ndarray | None = None,
    events: list[Any] | None = None,
    **changes: Any,
) -> Work:
    rng = np.random.default_rng(0)
    heads = {
        role: write_head(home, role, rng.normal(size=(1, 64)) if weights is None else weights)
        for role in ("train", "eval")
    }
    inputs = {
        "prepare": write_prompts(home, prompts),
        "answers.base": write_artifact(home, "answers", {"answers": (answers(base, "base"), ANSWERS)}),
        "fit_reward.train": heads["train"],
        "fit_reward.eval": heads["eval"],
    }
    trained_writer = ArtifactWriter(home, "answers", "b" * 20)
    trained_writer.write_shard("answers", 0, answers(trained, "trained"), ANSWERS)
    inputs["answers.trained"] = trained_writer.finish(rows_in=len(trained), rows_out=len(trained), facts={})
    models = {"rescore.reward": model, "evaluate.reward": model}
    tree = settings(evaluate={"resamples": 500, "max_quarantined": 1.0} | changes)
    return node_work(home, tree, "evaluate", inputs, models, events)


def texts(suffix: str, rows: list[dict[str, Any]] = TESTS) -> dict[str, str]:
    return {r["prompt_id"]: f"{suffix} {n}" for n, r in enumerate(rows)}


def test_both_policies_are_scored_on_every_prompt_and_the_figures_follow_from_the_scores(
    home: Home, tiny_model: Path
) -> None:
    events: list[Any] = []
    built = evaluate.build(make_work(home, tiny_model, texts("plain"), texts("a longer one"), events=events))
    rows = built.rows("scores")
    assert len(rows) == 16
    reward = {p: {r["prompt_id"]: r["reward"] for r in rows if r["policy"] == p} for p in ("base", "trained")}
    assert reward["base"].keys() == reward["trained"].keys() == {r["prompt_id"] for r in TESTS}
    assert {r["length"] for r in rows if r["policy"] == "base"} == {len("plain 0")}
    assert all(np.isfinite(r["training_reward"]) for r in rows)
    metrics = json.loads((built.folder / "metrics.json").read_text())
    differences = np.array([reward["trained"][i] - reward["base"][i] for i in reward["base"]])
    assert metrics["reward"]["gain"] == pytest.approx(differences.mean(), abs=1e-9)
    low, high = np.quantile(differences[np.random.default_rng(9).integers(0, 8, (4000, 8))].mean(1), [0.025, 0.975])
    assert metrics["reward"]["interval"] == pytest.approx([low, high], abs=0.1 * (high - low))
    assert metrics["wins"] + metrics["ties"] + metrics["losses"] == 8
    assert metrics["judge"]["kind"] == "fitted"
    assert metrics["judge"]["unseen"] is True
    assert metrics["judge"]["held_out_accuracy"] == {"value": 0.8, "interval": [0.7, 0.87], "pairs": 90}
    assert (built.manifest["rows_in"], built.manifest["rows_out"]) == (8, 8)
    assert any(e.get("message") == metrics["verdict"]["sentence"] for e in events)


def test_the_same_answers_are_not_told_apart(home: Home, tiny_model: Path) -> None:
    built = evaluate.build(make_work(home, tiny_model, texts("one"), texts("one")))
    metrics = json.loads((built.folder / "metrics.json").read_text())
    assert metrics["reward"]["gain"] == 0
    assert metrics["verdict"]["outcome"] == "not told apart"
    assert (metrics["wins"], metrics["ties"], metrics["losses"]) == (0, 8, 0)


def test_a_prompt_that_one_policy_did_not_answer_is_quarantined(home: Home, tiny_model: Path) -> None:
    base, trained = texts("one"), texts("another")
    first, second, *_ = base
    del base[first], trained[second]
    built = evaluate.build(make_work(home, tiny_model, base, trained))
    assert (built.manifest["rows_in"], built.manifest["rows_out"]) == (8, 6)
    lost = {r["prompt_id"]: (r["reason"], r["detail"]) for r in built.rows("quarantine")}
    assert lost == {first: ("answer missing", "no answer of base"), second: ("answer missing", "no answer of trained")}
    assert {r["prompt_id"] for r in built.rows("scores")} == set(base) - {second}


def test_an_answer_without_a_finite_reward_is_quarantined_with_both_of_its_prompt(home: Home, tiny_model: Path) -> None:
    base, trained = texts("one"), texts("another")
    first = next(iter(base))
    trained[first] = ""  # no response token, hence no features: NaN
    built = evaluate.build(make_work(home, tiny_model, base, trained))
    assert built.manifest["quarantined"] == {"empty answer": 1}
    assert len(built.rows("scores")) == 14
    figures = json.loads((built.folder / "metrics.json").read_text())
    assert figures["silent"] == {"base": 0, "trained": 1, "prompts": 8}
    assert "empty answer to 1 of 8 prompts" in figures["verdict"]["sentence"] + " ".join(figures["doubts"])


def test_too_many_lost_prompts_are_an_error(home: Home, tiny_model: Path) -> None:
    base, trained = texts("one"), texts("another")
    del trained[next(iter(base))]
    with pytest.raises(UserError, match="1 of 8 rows are bad .*evaluate.max_quarantined = 0.1"):
        evaluate.build(make_work(home, tiny_model, base, trained, max_quarantined=0.1))


def test_no_answers_are_an_error_that_says_what_to_do(home: Home, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="no test prompt was answered"):
        evaluate.build(make_work(home, tiny_model, {}, {}))


def test_the_head_that_training_used_is_no_unseen_judge_under_another_name(home: Home, tiny_model: Path) -> None:
    work = make_work(home, tiny_model, texts("one"), texts("another"))
    head = work.inputs["fit_reward.train"].folder / "reward_model"
    given = {"type": "encoder_head", "model": str(head), "encoder": str(tiny_model)}
    tree = settings(evaluate={"reward": given, "resamples": 100})
    folders = {"rescore.reward": tiny_model, "evaluate.reward": head, "evaluate.reward.encoder": tiny_model}
    work = node_work(home, tree, "evaluate", work.inputs, folders)
    work.parts["models"]["evaluate.reward"] = resolve_model(str(head), home).digest
    metrics = json.loads((evaluate.build(work).folder / "metrics.json").read_text())
    assert metrics["judge"]["unseen"] is False


def test_an_answer_to_a_prompt_outside_the_test_split_stops_the_stage(home: Home, tiny_model: Path) -> None:
    stray = prompt_row([{"role": "user", "content": "trained on"}], "train")
    extra = {stray["prompt_id"]: "seen"}
    with pytest.raises(StageFailure, match="not in the test split"):
        evaluate.build(make_work(home, tiny_model, texts("one") | extra, texts("two") | extra, prompts=[*TESTS, stray]))


def test_a_constant_reward_model_is_an_error_that_says_so(home: Home, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate.reward gives all 16 answers the reward 0; a constant"):
        evaluate.build(make_work(home, tiny_model, texts("one"), texts("two"), weights=np.zeros((1, 64))))


def test_a_killed_scoring_takes_up_the_rewards_that_it_has(
    home: Home, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clha.rewards.adapters import EncoderHead
    from clha.stages import evaluate_scores as scoring

    monkeypatch.setattr(scoring, "_SHARD_ROWS", 4)
    calls: list[int] = []
    true_score = EncoderHead.score

    def dies_in_the_third(self: EncoderHead, inputs: Any, progress: Any = None) -> Any:
        calls.append(len(inputs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true_score(self, inputs, progress)

    work = make_work(home, tiny_model, texts("one"), texts("another"))
    monkeypatch.setattr(EncoderHead, "score", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate.build(work)
    assert len(list(work.writer.scratch.glob("evaluate-*.parquet"))) == 2
    built = evaluate.build(work)
    # Four shards for each of two reward models, one of them tried twice.
    assert len(calls) == 9
    assert len(built.rows("scores")) == 16
    assert not work.writer.scratch.exists()


def test_a_judge_that_is_the_training_reward_model_is_scored_once_and_named(home: Home, tiny_model: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = home.root / "classifier"
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=1, tie_word_embeddings=False)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    one = {"type": "sequence_classification", "model": str(folder), "max_tokens": 256}
    work = make_work(home, folder, texts("one"), texts("another"), reward=one)
    tree = settings(rescore={"reward": one}, evaluate={"reward": one, "resamples": 100})
    inputs = {k: v for k, v in work.inputs.items() if not k.startswith("fit_reward")}
    models = {"rescore.reward": folder, "evaluate.reward": folder}
    built = evaluate.build(node_work(home, tree, "evaluate", inputs, models))
    metrics = json.loads((built.folder / "metrics.json").read_text())
    assert metrics["judge"]["unseen"] is False
    assert metrics["doubts"][0].startswith("The judge is the reward model that training used")
    assert all(r["reward"] == r["training_reward"] for r in built.rows("scores"))


def test_the_judge_reads_the_turns_that_the_policy_read(
    home: Home, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clha.stages import evaluate_scores as scoring

    long = [
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": "older"},
        {"role": "user", "content": "new"},
    ]
    row = prompt_row(long, "test")
    seen: list[Any] = []

    closed: list[bool] = []

    class Recorder:
        padding = Padding()

        def close(self) -> None:
            closed.append(True)

        def score(self, inputs: Any, progress: Any = None) -> Any:
            from clha.rewards.adapters import Scored

            seen.extend(inputs)
            rewards = np.arange(len(inputs), dtype=float)
            return Scored(rewards, rewards[:, None], np.zeros(len(inputs), dtype=bool))

    monkeypatch.setattr(scoring, "load_scorer", lambda *a, **k: Recorder())
    work = make_work(home, tiny_model, {row["prompt_id"]: "a"}, {row["prompt_id"]: "b"}, prompts=[row])
    cut = answers({row["prompt_id"]: "a"}, "base")
    cut[0]["truncated_turns"] = 2
    writer = ArtifactWriter(home, "answers", "c" * 20)
    writer.write_shard("answers", 0, cut, ANSWERS)
    work.inputs["answers.base"] = writer.finish(rows_in=1, rows_out=1, facts={})  # type: ignore[index]
    evaluate.build(work)
    assert [len(i.messages) for i in seen[:2]] == [1, 3]
    assert len(closed) == 2, "both reward models"
