"""train: the joined tables of a small chain become a model that answers, with its metrics and card."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reward_cases import write_artifact, write_candidates
from train_cases import PROMPTS, distance, tables, work
from transformers import AutoModelForCausalLM, AutoTokenizer

from clha.errors import StageFailure, UserError
from clha.loading import load_policy
from clha.schema import WEIGHTS
from clha.stages import train
from clha.store import Home
from clha.training import export
from clha.training.callbacks import ReportProgress
from clha.training.checkpoints import is_complete


def test_the_result_is_a_plain_hugging_face_folder_with_metrics_events_and_a_card(home: Home, tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    events: list[dict[str, Any]] = []
    artifact = train.build(work(home, tiny_model, tables(home, tokenizer), events, save_dtype="bfloat16"))
    model = artifact.folder / "model"
    assert AutoModelForCausalLM.from_pretrained(model).dtype == torch.bfloat16
    saved = AutoTokenizer.from_pretrained(model)
    assert saved.chat_template == tokenizer.chat_template
    assert (model / "generation_config.json").is_file()
    assert str(home.root) not in (model / "config.json").read_text()
    assert "clha_shared_prompt" not in (model / "config.json").read_text()
    assert not [f for f in artifact.folder.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".pkl")], "pickled"
    card = (model / "README.md").read_text()
    assert card.startswith("---\n") and "| prompts trained on | 8 |" in card and "| learning_rate |" in card
    rows = artifact.rows("metrics")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # Without eval_steps, dev is measured once, at the end.
    assert [row["eval_rewards/accuracies"] is not None for row in rows] == [False, False, False, True]
    assert list((artifact.folder / "tensorboard").glob("events.out.*"))
    assert (artifact.manifest["rows_in"], artifact.manifest["rows_out"]) == (PROMPTS, PROMPTS)
    steps = [e for e in events if e["event"] == "metrics"]
    assert [e["step"] for e in steps][:4] == [1, 2, 3, 4]


def test_training_moves_the_better_responses_up(home: Home, tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    artifact = train.build(work(home, tiny_model, tables(home, tokenizer), epochs=15.0, eval_steps=20))
    rows = artifact.rows("metrics")
    assert rows[0]["step"] == 0 and rows[-1]["step"] == 60
    assert rows[-1]["rewards/margins"] > rows[1]["rewards/margins"]
    evaluated = [row["eval_rewards/margins"] for row in rows if row["eval_rewards/margins"] is not None]
    assert len(evaluated) == 4 and evaluated[-1] > evaluated[0]


@pytest.mark.parametrize("loss", ["clha", "sft", "dpo", "dpo_smoothed", "dpo_robust", "rrhf", "pro"])
def test_every_loss_is_one_setting_away(home: Home, tiny_model: Path, loss: str):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    artifact = train.build(work(home, tiny_model, inputs, loss=loss))
    assert AutoModelForCausalLM.from_pretrained(artifact.folder / "model") is not None
    rows = artifact.rows("metrics")
    assert len(rows) == 4 and all(np.isfinite(row["loss"]) for row in rows)
    assert f"- {loss}\n" in (artifact.folder / "model" / "README.md").read_text()
    if loss.startswith("dpo"):
        # Before the first step policy and reference are one: -log sigmoid(0) = log 2, smoothed and robust too
        # (with e = 0, as it is by default).
        assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_sft_part_by_mean_is_smaller_than_by_sum(home: Home, tiny_model: Path):
    """The first step, from the same weights: -S / T < -S for responses of several tokens."""
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    parts = [
        train.build(work(home, tiny_model, inputs, sft_by=by)).rows("metrics")[0]["loss/sft"] for by in ("sum", "mean")
    ]
    assert 0 < parts[1] < parts[0]


def base_and_trained(tiny_model: Path, trained: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(5, 17)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        return base.eval()(input_ids=ids).logits, trained.eval()(input_ids=ids).logits


@pytest.mark.parametrize("bf16", [False, True], ids=["", "bf16"])
def test_an_adapter_is_merged_into_a_model_that_loads_as_any_other(
    home: Home, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
):
    """In bfloat16 the weights under the adapter are rounded while it is trained, and are not where it is merged."""
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    lora = {"rank": 4, "target_modules": ["q_proj", "down_proj"]}
    tolerance = {"logprob_tolerance": 1.0} if bf16 else {}
    made = work(home, tiny_model, inputs, lora=lora, learning_rate=1e-2, bf16=bf16, **tolerance)
    loaded: list[torch.dtype] = []

    def load(*args: Any, **options: Any) -> Any:
        model = load_policy(*args, **options)
        loaded.append(model.dtype)
        return model

    monkeypatch.setattr("clha.loading.load_policy", load)
    model = train.build(made).folder / "model"
    assert loaded == ([torch.bfloat16, torch.float32] if bf16 else [torch.float32])
    assert not list(model.glob("adapter*"))
    before, after = base_and_trained(tiny_model, AutoModelForCausalLM.from_pretrained(model))
    assert not torch.allclose(before, after, atol=1e-3)
    old, new = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tiny_model, model))
    assert old.keys() == new.keys()
    changed = {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"q_proj", "down_proj"}


def test_an_adapter_that_is_not_merged_is_saved_alone(home: Home, tiny_model: Path):
    from peft import PeftModel

    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    made = work(home, tiny_model, inputs, lora={"rank": 4, "merge": False}, learning_rate=1e-2)
    model = train.build(made).folder / "model"
    assert (model / "adapter_config.json").is_file() and not (model / "model.safetensors").exists()
    assert str(home.root) not in (model / "adapter_config.json").read_text()
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before, after = base_and_trained(tiny_model, PeftModel.from_pretrained(base, model))
    assert not torch.allclose(before, after, atol=1e-3)


def test_an_adapter_for_matrices_that_the_model_does_not_have_is_one_line(home: Home, tiny_model: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    with pytest.raises(
        UserError, match="train.lora.target_modules: .*query_key_value.*the model has .*q_proj"
    ) as caught:
        train.build(work(home, tiny_model, inputs, lora={"target_modules": ["query_key_value"]}))
    assert "\n" not in str(caught.value)


def test_the_weights_that_were_best_on_dev_are_kept(home: Home, tiny_model: Path):
    """The first of the best evaluations is not the last of all; a run that ends with it has the same weights."""
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model), dev=4)
    changes = {"eval_steps": 1, "keep_best": True, "learning_rate": 0.03, "epochs": 6.0, "loss": "sft"}
    artifact = train.build(work(home, tiny_model, inputs, **changes))
    rows = [row for row in artifact.rows("metrics") if row["step"] > 0]
    best = max(rows, key=lambda row: (row["eval_rewards/accuracies"], -row["step"]))
    assert f"kept the weights of checkpoint-{int(best['step'])}" in artifact.manifest["notes"]
    assert best["step"] < rows[-1]["step"], "the case shows nothing"
    short = train.build(
        work(Home(home.root / "short").create(), tiny_model, inputs, **changes, max_steps=int(best["step"]))
    )
    ours, theirs = (AutoModelForCausalLM.from_pretrained(a.folder / "model") for a in (artifact, short))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_training_ends_early_when_dev_gets_no_better(home: Home, tiny_model: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    changes = {"eval_steps": 1, "keep_best": True, "patience": 2, "epochs": 5.0, "learning_rate": 1e-9}
    artifact = train.build(work(home, tiny_model, inputs, **changes))
    # The first evaluation is the best; two more are no better.
    assert [row["step"] for row in artifact.rows("metrics")] == [0, 1, 2, 3]


def test_the_best_weights_need_prompts_of_dev(home: Home, tiny_model: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model), dev=0)
    with pytest.raises(UserError, match="keep_best needs prompts of split dev"):
        train.build(work(home, tiny_model, inputs, eval_steps=1, keep_best=True))


def test_without_a_prompt_to_train_on_it_says_so(home: Home, tiny_model: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model), dev=PROMPTS)
    with pytest.raises(UserError, match="no prompt of split train"):
        train.build(work(home, tiny_model, inputs))


def test_weights_that_name_no_candidate_are_a_failure(home: Home, tiny_model: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    rows = inputs["weigh"].rows("weights")
    rows[3]["order"] = [7, 1, 0]
    inputs["weigh"] = write_artifact(home, "weigh", {"weights": (rows, WEIGHTS), "other": (rows, WEIGHTS)})
    with pytest.raises(StageFailure, match="name a candidate that is not in candidates"):
        train.build(work(home, tiny_model, inputs))


def test_candidates_of_another_policy_stop_before_the_first_step(home: Home, tiny_model: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    rows = [
        row | {"origin": "generated", "response_logprobs": [-1.0] * len(row["response_token_ids"])}
        for row in inputs["generate"].rows("candidates")
    ]
    inputs["generate"] = write_candidates(home, rows[:-1] + rows[-1:])
    with pytest.raises(UserError, match="not this policy's"):
        train.build(work(home, tiny_model, inputs))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "dpo", "lr_schedule": "cosine", "warmup_steps": 2},
        {"lora": {"rank": 4, "dropout": 0.1}},
        {"normalization": "reference", "micro_batch_prompts": 1},
        {"eval_steps": 1, "keep_best": True, "patience": 3},
    ],
    ids=["clha", "dpo", "lora", "reference", "keep_best"],
)
def test_a_second_attempt_goes_on_from_the_checkpoint_and_ends_with_the_same_weights(
    home: Home, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any]
):
    """Ended in the third step of eight: a checkpoint was made after the second."""
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    changes = {"checkpoint_steps": 2, "epochs": 2.0, **changes}
    events: list[dict[str, Any]] = []

    def killed(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ReportProgress, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            train.build(work(home, tiny_model, inputs, **changes))
    again = train.build(work(home, tiny_model, inputs, events, **changes))
    assert any("from checkpoint-2" in e.get("message", "") for e in events)
    whole = train.build(work(Home(tmp_path / "other").create(), tiny_model, inputs, **changes))
    digests = [
        {f["name"]: f["sha256"] for f in a.manifest["files"] if f["name"].endswith("safetensors")}
        for a in (again, whole)
    ]
    assert digests[0] == digests[1]
    timeless = [a.read("metrics") for a in (again, whole)]
    timeless = [t.select([n for n in t.column_names if "perf/" not in n and "_second" not in n]) for t in timeless]
    timeless = [t.select([n for n in t.column_names if not n.endswith("_runtime")]) for t in timeless]
    assert timeless[0].to_pylist() == timeless[1].to_pylist()
    assert again.manifest["steps"] == whole.manifest["steps"]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 3, "learning_rate": 1e-2}, 3),
        ({"epochs": 0.5, "learning_rate": 1e-2}, 2),
        ({"epochs": 5.0, "eval_steps": 1, "keep_best": True, "patience": 2, "learning_rate": 1e-9}, 3),
    ],
    ids=["max_steps", "half_an_epoch", "patience"],
)
def test_a_run_that_ended_while_its_model_was_written_trains_no_further(
    home: Home, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], steps: int
):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train.build(work(home, tiny_model, inputs, **changes))
    events: list[dict[str, Any]] = []
    again = train.build(work(home, tiny_model, inputs, events, **changes))
    assert any(f"from checkpoint-{steps}" in e.get("message", "") for e in events)
    whole = train.build(work(Home(tmp_path / "other").create(), tiny_model, inputs, **changes))
    assert again.manifest["steps"] == whole.manifest["steps"] == steps
    assert [row["step"] for row in again.rows("metrics")] == [row["step"] for row in whole.rows("metrics")]
    assert distance(again, whole) == 0


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_nothing(home: Home, tiny_model: Path):
    """Eight steps, two of them warm-up: 0, 1/2, then 6/6, 5/6, ... of the peak."""
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    changes = {"epochs": 2.0, "lr_schedule": "linear", "warmup_steps": 2, "learning_rate": 0.006}
    rates = [row["learning_rate"] for row in train.build(work(home, tiny_model, inputs, **changes)).rows("metrics")]
    assert rates == pytest.approx([0.0, 0.003, 0.006, 0.005, 0.004, 0.003, 0.002, 0.001])


def test_how_often_checkpoints_are_made_does_not_change_the_table_of_metrics(home: Home, tiny_model: Path):
    """Four steps, logged every two and at the first: a checkpoint every three steps is made every four."""
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    rows = train.build(work(home, tiny_model, inputs, logging_steps=2, checkpoint_steps=3)).rows("metrics")
    assert [row["step"] for row in rows] == [1, 2, 4]


def test_a_run_that_diverges_stops_and_leaves_the_last_good_checkpoint(home: Home, tiny_model: Path):
    """The first step of the warm-up changes nothing; at the rate of the second the weights overflow."""
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    made = work(home, tiny_model, inputs, learning_rate=1e38, lr_schedule="linear", warmup_steps=1, checkpoint_steps=1)
    with pytest.raises(StageFailure) as caught:
        train.build(made)
    ids = {row["prompt_id"] for row in inputs["prepare"].rows("prompts")}
    line = str(caught.value)
    assert "in step 2; prompts " in line and "last good checkpoint: checkpoint-1;" in line and "\n" not in line
    named = line.partition("prompts ")[2].partition(";")[0].split(", ")
    assert len(named) == 2 and set(named) <= ids
    assert is_complete(made.writer.scratch / "checkpoints" / "checkpoint-1")
    assert not (made.writer.scratch / "checkpoints" / "checkpoint-2").exists()
    assert not list(made.writer.folder.iterdir())
