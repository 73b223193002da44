"""A whole encoder trained as a reward model: what it learns, what its report is worth, how it goes on after a kill."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reward_cases import (
    candidate_row,
    node_work,
    preference_rows,
    prompt_row,
    settings,
    write_bert,
    write_candidates,
    write_prompts,
)

from clha.errors import StageFailure, UserError
from clha.progress import Event
from clha.rewards import tuning
from clha.rewards.adapters import SequenceClassification, load_scorer
from clha.rewards.fitting import CurvePoint, assign_folds
from clha.rewards.texts import RewardInput
from clha.rewards.tuning import bradley_terry_loss
from clha.settings import Settings
from clha.stages import fit_reward, rescore
from clha.stages.work import Work
from clha.store import Artifact, Home

ROWS = 80
LORA = {"rank": 8, "dropout": 0.1, "learning_rate": 1e-2, "epochs": 3, "batch_pairs": 8}


def lora_settings(fit: dict[str, Any] | None = None, **lora: Any) -> Settings:
    own = {"encoder": "bundled:tiny-random", "max_tokens": 256, "folds": 4, "method": "lora", "lora": LORA | lora}
    return settings(fit_reward={"train": own | (fit or {}), "eval": own})


def fit_work(home: Home, model: Path, chain: Settings, rows: list[dict[str, Any]], events: list[Event]) -> Work:
    return node_work(
        home, chain, "fit_reward.train", {"prepare": write_prompts(home, rows)}, {"encoder": model}, events
    )


def fit_model(home: Home, model: Path, chain: Settings, rows: list[dict[str, Any]] | None = None) -> Artifact:
    return fit_reward.build(fit_work(home, model, chain, preference_rows(ROWS) if rows is None else rows, []))


class Killed(BaseException):
    pass


class Deadly(list[Event]):
    """Hears events until so many log lines have had `last` in them: what a fit that is killed there has said."""

    def __init__(self, last: str, times: int = 1) -> None:
        super().__init__()
        self._last, self._times = last, times

    def append(self, event: Event) -> None:
        self._times -= self._last in event.get("message", "")
        if not self._times:
            raise Killed
        super().append(event)


@pytest.fixture(scope="module")
def fitted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return fit_model(Home(tmp_path_factory.mktemp("lora")).create(), tiny_model, lora_settings())


@pytest.fixture(scope="module")
def report(fitted: Artifact) -> dict[str, Any]:
    return dict(json.loads((fitted.folder / "fit.json").read_text()))


def scored(fitted: Artifact, encoder: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    """[N, 2]: rewards of the chosen and the rejected response of each row, as rescoring loads the model."""
    scorer = load_scorer(lora_settings().rescore.reward, encoder, fitted.folder, "cpu")
    assert isinstance(scorer, SequenceClassification)
    items = [RewardInput(r["messages"], r[side][0]) for r in rows for side in ("chosen", "rejected")]
    return scorer.score(items).rewards.reshape(-1, 2)


def test_the_loss_of_two_pairs_worked_by_hand() -> None:
    """Rewards (1, 0) weigh 1, (0, 2) weigh 1/2: log(1 + e^-1) + log(1 + e^2) / 2 = 0.313262 + 1.063464."""
    loss = bradley_terry_loss(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 0.5]))
    assert float(loss) == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(2)) / 2)
    assert float(loss) == pytest.approx(1.376726, abs=1e-6)


def test_it_judges_pairs_that_it_never_saw(fitted: Artifact, report: dict[str, Any], tiny_model: Path) -> None:
    """The words of the two sides differ: above chance by the whole interval, and on other pairs too."""
    low, high = report["accuracy_interval"]
    assert 0.5 < low < report["accuracy"] <= high
    new = scored(fitted, tiny_model, preference_rows(40, seed=7))
    assert (new[:, 0] > new[:, 1]).mean() > 0.8
    assert report["losses"][-1] < report["losses"][0] and len(report["losses"]) == 3


def test_the_report_speaks_of_the_model_that_is_kept(
    fitted: Artifact, report: dict[str, Any], tiny_model: Path
) -> None:
    """Its figures come out again from the files, on the fold that was held out."""
    rows = preference_rows(ROWS)
    fold = assign_folds([r["messages"][0]["content"] for r in rows], 4, 0)
    held = [r for r, k in zip(rows, fold, strict=True) if k == 0]
    assert (report["pairs"], report["pairs_trained_on"], report["groups"]) == (20, 60, 20)
    rewards = scored(fitted, tiny_model, held)
    assert report["accuracy"] == (rewards[:, 0] > rewards[:, 1]).mean()
    names = {"loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"}
    assert report["metrics"].keys() == {f"eval_{name}" for name in names}
    assert report["metrics"]["eval_margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), abs=1e-4)
    assert report["sft_threshold"] == pytest.approx(np.quantile(rewards[:, 0], 0.25), abs=1e-4)


def test_what_is_kept_is_a_plain_classifier_with_its_facts_in_its_configuration(
    fitted: Artifact, report: dict[str, Any]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = fitted.folder / "reward_model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1 and not any("lora" in name for name, _ in model.named_parameters())
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert not [p for p in fitted.folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    own = json.loads((folder / "config.json").read_text())["clha"]
    assert (own["encoder_name"], own["max_tokens"]) == ("tiny-random", 256)
    assert own["threshold"] == report["sft_threshold"]
    assert fitted.manifest["features"] is None and fitted.manifest["l2"] is None
    assert fitted.manifest["rows_in"] == fitted.manifest["rows_out"] == ROWS


def test_a_killed_fit_goes_on_after_its_last_epoch_and_ends_with_the_same_files(
    home: Home, tiny_model: Path, fitted: Artifact
) -> None:
    with pytest.raises(Killed):
        fit_reward.build(fit_work(home, tiny_model, lora_settings(), preference_rows(ROWS), Deadly("epoch 2 of 3")))
    events: list[Event] = []
    resumed = fit_reward.build(fit_work(home, tiny_model, lora_settings(), preference_rows(ROWS), events))
    lines = [e["message"] for e in events if e["event"] == "log"]
    assert "goes on after epoch 2 of 3" in lines
    assert not any("epoch 1 of 3" in line or "epoch 2 of 3: loss" in line for line in lines)
    assert resumed.content == fitted.content
    assert not [p for p in home.work.rglob("*") if p.is_file()]


def test_a_checkpoint_brings_back_weights_and_moments_also_of_what_had_no_gradient(tmp_path: Path) -> None:
    """Two parameters, of which the loss sees one: the other has no moments before nor after."""

    def parts() -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
        parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
        return parameters, torch.optim.AdamW(parameters, lr=0.1)

    (seen, unseen), optimizer = parts()
    (seen * torch.tensor([1.0, 2.0])).sum().backward()
    optimizer.step()
    tuning._keep(tmp_path / "kept", [seen, unseen], optimizer, [0.5])
    again, fresh = parts()
    assert tuning._restore(tmp_path / "kept", again, fresh) == [0.5]
    assert torch.equal(again[0], seen) and torch.equal(again[1], unseen)
    assert torch.equal(fresh.state[again[0]]["exp_avg"], optimizer.state[seen]["exp_avg"])
    assert again[1] not in fresh.state


CURVE = {"curve": [0.25, 0.5]}


@pytest.fixture(scope="module")
def with_curve(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return fit_model(Home(tmp_path_factory.mktemp("curve")).create(), tiny_model, lora_settings(**CURVE))


def test_the_learning_curve_ends_with_the_model_that_is_kept_and_changes_nothing_else(
    with_curve: Artifact, fitted: Artifact, report: dict[str, Any]
) -> None:
    """A quarter, half and all of the 60 pairs that are not held out, as rows like those of heads."""
    measured = json.loads((with_curve.folder / "fit.json").read_text())
    curve = measured.pop("learning_curve")
    assert [row["pairs"] for row in curve] == [15, 30, 60]
    assert all(row.keys() == {f.name for f in fields(CurvePoint)} for row in curve)
    assert all(row["interval"][0] < row["accuracy"] < row["interval"][1] for row in curve)
    assert (curve[-1]["accuracy"], curve[-1]["interval"]) == (report["accuracy"], report["accuracy_interval"])
    assert curve[0]["accuracy"] < curve[-1]["accuracy"]
    assert measured == report and "learning_curve" not in report
    assert with_curve.manifest["weights_digest"] == fitted.manifest["weights_digest"]


def test_models_of_the_curve_train_on_nested_parts_and_never_on_the_held_out_fold(
    home: Home, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.01 is one dialogue of 60, too few; 0.505 is the same 30 as 0.5."""
    trained_on: list[set[int]] = []
    train = tuning._train

    def listening(model: Any, task: Any, rows: np.ndarray, *rest: Any) -> list[float]:
        trained_on.append(set(rows.tolist()))
        assert not task.held[rows].any()
        return train(model, task, rows, *rest)

    monkeypatch.setattr(tuning, "_train", listening)
    artifact = fit_model(home, tiny_model, lora_settings(epochs=1, curve=[0.01, 0.25, 0.5, 0.505]))
    quarter, half, whole = trained_on
    assert quarter < half < whole
    curve = json.loads((artifact.folder / "fit.json").read_text())["learning_curve"]
    assert [row["pairs"] for row in curve] == [len(quarter), len(half), len(whole)] == [15, 30, 60]


@pytest.mark.parametrize(
    ("killer", "finished", "epochs_left"),
    [
        (("learning curve: training on 30 pairs", 1), [15], 6),
        (("epoch 2 of 3", 2), [15], 4),
        (("epoch 2 of 3", 3), [15, 30], 1),
    ],
    ids=["between two models of the curve", "in the second one", "in the model that is kept"],
)
def test_a_fit_with_a_curve_goes_on_where_it_was_killed_and_ends_with_the_same_files(
    home: Home,
    tiny_model: Path,
    with_curve: Artifact,
    killer: tuple[str, int],
    finished: list[int],
    epochs_left: int,
) -> None:
    chain = lora_settings(**CURVE)
    with pytest.raises(Killed):
        fit_reward.build(fit_work(home, tiny_model, chain, preference_rows(ROWS), Deadly(*killer)))
    events: list[Event] = []
    resumed = fit_reward.build(fit_work(home, tiny_model, chain, preference_rows(ROWS), events))
    lines = [e["message"] for e in events if e["event"] == "log"]
    earlier = "learning curve: {} pairs were finished by an earlier attempt"
    assert [line for line in lines if "earlier attempt" in line] == [earlier.format(n) for n in finished]
    assert sum("of 3: loss" in line for line in lines) == epochs_left
    assert resumed.content == with_curve.content
    assert not [p for p in home.work.rglob("*") if p.is_file()]


def test_progress_counts_the_steps_of_all_models_of_a_fit(home: Home, tiny_model: Path) -> None:
    """Steps of 8 pairs, three epochs, on 15, 30 and 60 pairs: 3 * (2 + 4 + 8)."""
    events: list[Event] = []
    fit_reward.build(fit_work(home, tiny_model, lora_settings(**CURVE), preference_rows(ROWS), events))
    steps = [(e["done"], e["total"]) for e in events if e["event"] == "progress" and e["unit"] == "steps"]
    assert steps == [(done, 42) for done in range(1, 43)]


def test_micro_batches_and_checkpointing_change_memory_and_not_results(home: Home, tiny_model: Path) -> None:
    def losses(home: Home, **lora: Any) -> list[float]:
        artifact = fit_model(home, tiny_model, lora_settings(dropout=0.0, epochs=1, learning_rate=1e-3, **lora))
        return list(json.loads((artifact.folder / "fit.json").read_text())["losses"])

    whole = losses(Home(home.root / "whole").create())
    parts = losses(Home(home.root / "parts").create(), tokens_per_micro_batch=600, gradient_checkpointing=True)
    assert parts == pytest.approx(whole, abs=1e-4)


def test_rescoring_ranks_candidates_with_it_and_takes_its_threshold(
    home: Home, tiny_model: Path, fitted: Artifact, report: dict[str, Any]
) -> None:
    prompts = [prompt_row([{"role": "user", "content": f"Question {i}?"}], "train") for i in range(4)]
    texts = ["gladly warm clear kind exact", "whatever nope dunno boring vague"]
    candidates = [candidate_row(p, i, t) for p in prompts for i, t in enumerate(texts)]
    chain = lora_settings().model_copy(update={"rescore": settings(rescore={"sft_threshold": "fitted"}).rescore})
    inputs = {
        "prepare": write_prompts(home, prompts),
        "generate": write_candidates(home, candidates),
        "fit_reward.train": fitted,
    }
    score = rescore.build(node_work(home, chain, "score", inputs, {"rescore.reward": tiny_model}))
    weigh = rescore.build(node_work(home, chain, "weigh", inputs | {"score": score}))
    assert [r["order"] for r in weigh.rows("weights")] == [[0, 1]] * 4
    assert weigh.manifest["sft_threshold"] == report["sft_threshold"]


def test_an_encoder_that_sees_both_ways_is_trained_too(home: Home, tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "tiny-bert")
    fitted = fit_model(home, folder, lora_settings())
    losses = json.loads((fitted.folder / "fit.json").read_text())["losses"]
    assert losses[-1] < losses[0]
    new = scored(fitted, folder, preference_rows(40, seed=7))
    assert (new[:, 0] > new[:, 1]).mean() > 0.7


def test_a_response_that_the_model_cannot_read_is_quarantined(home: Home, tiny_model: Path) -> None:
    rows = preference_rows(40)
    rows[3]["messages"] = [{"role": "user", "content": " "}]
    artifact = fit_model(home, tiny_model, lora_settings(epochs=1), rows)
    assert artifact.manifest["quarantined"] == {"unreadable": 1}
    assert artifact.manifest["rows_out"] == 39


def test_matrices_that_the_model_lacks_are_a_clear_error(home: Home, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="lora.target_modules is c_attn, which does not fit tiny-random"):
        fit_model(home, tiny_model, lora_settings(target_modules=["c_attn"]))
    with pytest.raises(UserError, match="lora.target_modules is empty"):
        fit_model(home, tiny_model, lora_settings(target_modules=[]))


def test_a_model_with_several_outputs_is_a_clear_error(home: Home, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path / "three-labels"
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    with pytest.raises(UserError, match=r"three-labels: its score.weight has shape \[3, 64\], \[1, 64\] is"):
        fit_model(home, folder, lora_settings())


def test_a_loss_that_diverges_ends_the_fit_and_leaves_no_checkpoint(home: Home, tiny_model: Path) -> None:
    with pytest.raises(
        StageFailure, match="loss is not finite at step .* of .*; lower fit_reward's lora.learning_rate"
    ):
        fit_model(home, tiny_model, lora_settings(learning_rate=1e30, epochs=1, batch_pairs=4))
    assert not [p for p in home.work.rglob("adapter*") if p.is_file()]


def test_too_few_dialogues_are_a_clear_error(home: Home, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="pairs of 6 dialogues in split reward_train, at least 8 needed"):
        fit_model(home, tiny_model, lora_settings(), preference_rows(6))


def test_memory_that_runs_out_names_the_settings_that_help(
    home: Home, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "classifier_logits", full)
    with pytest.raises(StageFailure, match="tokens_per_micro_batch"):
        fit_model(home, tiny_model, lora_settings())


def test_settings_of_a_head_are_none_of_its_own() -> None:
    """A fit of one method keeps its key when settings of the other one change."""
    from clha.stages.chain import nodes

    def key(chain: Settings) -> dict[str, Any]:
        return next(n for n in nodes(chain) if n.name == "fit_reward.train").settings

    assert key(lora_settings()) == key(lora_settings({"layer": 1, "l2": 0.3, "pooling": "mean"}))
    assert key(lora_settings()) != key(lora_settings(rank=4))
    assert key(lora_settings()) == key(lora_settings(gradient_checkpointing=True))
    assert key(lora_settings()) != key(lora_settings(curve=[0.5]))


def test_the_key_of_a_model_without_a_learning_curve_does_not_know_of_curves() -> None:
    """Models that were trained when there was none stay what they are."""
    from clha.stages.chain import nodes

    node = next(n for n in nodes(lora_settings(curve=[])) if n.name == "fit_reward.train")
    assert "curve" not in node.settings["lora"]


def test_the_key_of_a_head_knows_of_no_other_method() -> None:
    """Heads that were fitted when there was none stay what they are."""
    from clha.stages.chain import nodes

    node = next(n for n in nodes(settings()) if n.name == "fit_reward.train")
    assert not {"method", "lora"} & set(node.settings) and node.packages == ("torch", "transformers")
    tuned = next(n for n in nodes(lora_settings()) if n.name == "fit_reward.train")
    assert tuned.settings["method"] == "lora" and "peft" in tuned.packages
