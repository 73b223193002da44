"""train: the joined tables of a small chain become a model that answers, with its metrics and card."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from reward_cases import node_work, prompt_row, settings, write_artifact, write_candidates, write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from clha.errors import StageFailure, TransientFailure, UserError
from clha.schema import CANDIDATES, REFERENCE, REWARDS, WEIGHTS
from clha.stages import train
from clha.stages.work import Work
from clha.store import Artifact, ArtifactWriter, Home
from clha.training import export
from clha.training.callbacks import ReportProgress
from clha.training.checkpoints import is_complete

PROMPTS = 10


def tables(home: Home, tokenizer: Any, dev: int = 2) -> dict[str, Artifact]:
    """Artifacts of prepare, generate, score and weigh: three responses a prompt, the longest is the best."""
    prompts, candidates, rewards, weights = [], [], [], []
    for i in range(PROMPTS):
        split = "dev" if i < dev else "train"
        prompt = prompt_row([{"role": "user", "content": f"Question {i}?"}], split)
        prompts.append(prompt)
        ids = tokenizer(f"Question {i}?")["input_ids"]
        for number in range(3):
            answer = tokenizer(f"answer {i} " * (number + 1))["input_ids"]
            row = {"prompt_token_ids": ids, "response_token_ids": [*answer, tokenizer.eos_token_id]}
            row |= {"prompt_id": prompt["prompt_id"], "candidate_id": number, "origin": "external", "text": "x"}
            row |= {"response_logprobs": None, "finish_reason": "eos", "truncated_turns": 0, "seed": 0}
            candidates.append(row | {"generator": "test"})
            score = {"prompt_id": prompt["prompt_id"], "candidate_id": number, "reward": float(number)}
            rewards.append(score | {"member_rewards": [float(number)], "truncated": False})
        weights.append(
            {
                "prompt_id": prompt["prompt_id"],
                "order": [2, 1, 0],
                "pair_weights": np.triu(np.ones((3, 3)), 1).tolist(),
                "sft_index": 0,
                "sft_lambda": 1.0,
                "flags": [],
            }
        )
    return {
        "prepare": write_prompts(home, prompts),
        "generate": write_candidates(home, candidates),
        "score": write_artifact(home, "score", {"rewards": (rewards, REWARDS)}),
        "weigh": write_artifact(home, "weigh", {"weights": (weights, WEIGHTS)}),
    }


def work(home: Home, model: Path, inputs: dict[str, Artifact], events: list | None = None, **changes: Any) -> Work:
    given = settings(train={"batch_prompts": 2, "learning_rate": 1e-3, "margin": 0.3} | changes)
    if given.train.needs_reference and "reference" not in inputs:
        made = node_work(home, given, "reference", {"generate": inputs["generate"]}, {"policy": model})
        inputs = {**inputs, "reference": train.build(made)}
    return node_work(home, given, "train", inputs, {"policy": model}, events)


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


def test_an_adapter_is_merged_into_a_model_that_loads_as_any_other(home: Home, tiny_model: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    lora = {"rank": 4, "target_modules": ["q_proj", "down_proj"]}
    made = work(home, tiny_model, inputs, lora=lora, learning_rate=1e-2)
    model = train.build(made).folder / "model"
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


# -- reference ---------------------------------------------------------------------------------------------------


def reference_work(home: Home, model: Path, inputs: dict[str, Artifact], **changes: Any) -> Work:
    given = settings(train={"loss": "dpo", **changes})
    return node_work(home, given, "reference", {"generate": inputs["generate"]}, {"policy": model})


def test_the_reference_is_the_policys_own_log_probability_of_every_candidate(home: Home, tiny_model: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    artifact = train.build(reference_work(home, tiny_model, inputs))
    assert (artifact.manifest["rows_in"], artifact.manifest["rows_out"]) == (3 * PROMPTS, 3 * PROMPTS)
    rows = {(r["prompt_id"], r["candidate_id"]): r["logp"] for r in artifact.rows("reference")}
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for candidate in inputs["generate"].rows("candidates"):
        prompt, response = candidate["prompt_token_ids"], candidate["response_token_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        own = sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(response))
        assert rows[candidate["prompt_id"], candidate["candidate_id"]] == pytest.approx(own, abs=1e-4)


def test_finished_shards_of_the_reference_are_kept(home: Home, tiny_model: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    rows = inputs["generate"].rows("candidates")
    writer = ArtifactWriter(home, "generate", "two0shards")
    for index, part in enumerate((rows[:12], rows[12:])):
        writer.write_shard("candidates", index, part, CANDIDATES)
    inputs["generate"] = writer.finish(rows_in=30, rows_out=30, facts={})
    whole = train.build(reference_work(Home(home.root / "other").create(), tiny_model, inputs))
    again = reference_work(home, tiny_model, inputs)
    marked = whole.read("reference").slice(0, 12).set_column(2, "logp", pa.array([-1.5] * 12))
    again.writer.write_shard("reference", 0, marked)
    made = train.build(again).rows("reference")
    assert [row["logp"] for row in made[:12]] == [-1.5] * 12
    assert made[12:] == whole.rows("reference")[12:]


def test_a_reference_that_lacks_a_candidate_is_a_failure(home: Home, tiny_model: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    whole = train.build(reference_work(home, tiny_model, inputs)).rows("reference")
    inputs["reference"] = write_artifact(home, "reference", {"reference": (whole[:-1], REFERENCE)})
    with pytest.raises(StageFailure, match="no reference log-probability"):
        train.build(work(home, tiny_model, inputs, loss="dpo"))


def test_a_policy_that_gives_nan_is_a_failure_that_names_the_prompt(home: Home, tiny_model: Path, tmp_path: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[:] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    first = inputs["generate"].rows("candidates")[0]["prompt_id"]
    with pytest.raises(StageFailure, match=f"reference: the policy gives prompt {first} a log-probability"):
        train.build(reference_work(home, tmp_path / "nan", inputs))


# -- several processes -------------------------------------------------------------------------------------------


def distance(a: Artifact, b: Artifact) -> float:
    """How far the weights of two trained models are apart, relative to their size.

    Not weight by weight: AdamW divides by the gradient's size, so that where it is almost zero rounding moves a weight
    by a visible share of the rate.
    """
    ours, theirs = (
        torch.cat([v.flatten() for v in AutoModelForCausalLM.from_pretrained(x.folder / "model").state_dict().values()])
        for x in (a, b)
    )
    return float((ours - theirs).norm() / theirs.norm())


def was_sharded(events: list[dict[str, Any]]) -> bool:
    """Whether a run of two processes says that each held half of the weights."""
    said = [e["message"] for e in events if "the weights were sharded over 2 processes" in e.get("message", "")]
    return len(said) == 1 and said[0].endswith(("held 50% of them", "held 51% of them"))


@pytest.mark.parametrize("sharding", ["none", pytest.param("full_shard", marks=pytest.mark.slow)])
def test_two_processes_end_with_the_weights_of_one(home: Home, tiny_model: Path, tmp_path: Path, sharding: str):
    """Eight prompts, four a step, over two epochs."""
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    changes = {"batch_prompts": 4, "epochs": 2.0, "eval_steps": 2, "checkpoint_steps": 3, "tokens_per_micro_batch": 60}
    events: list[dict[str, Any]] = []
    two = train.build(work(home, tiny_model, inputs, events, **changes, processes=2, sharding=sharding))
    one = train.build(work(Home(tmp_path / "one").create(), tiny_model, inputs, **changes))
    assert two.manifest["key"] == one.manifest["key"]
    assert was_sharded(events) is (sharding == "full_shard")
    assert distance(two, one) < 1e-5
    for mine, other in zip(two.rows("metrics"), one.rows("metrics"), strict=True):
        for name in ("step", "loss", "grad_norm", "rewards/margins", "num_tokens", "eval_loss"):
            assert (mine[name] is None) == (other[name] is None), name
            assert other[name] is None or mine[name] == pytest.approx(other[name], rel=1e-4), name
    steps = [e["step"] for e in events if e["event"] == "metrics" and "loss" in e["values"]]
    assert steps == [1, 2, 3, 4], "one process alone reports"
    assert two.manifest["device"].startswith("2 x cpu")


@pytest.mark.slow
@pytest.mark.parametrize("micro", [2, None])
def test_the_reference_normalisation_is_the_same_in_two_processes(
    home: Home, tiny_model: Path, tmp_path: Path, micro: int | None
):
    """Seven prompts, four a step, two a micro-batch: the last step has micro-batches of two prompts and of one.

    Without a number all prompts of a step are one micro-batch, in both processes together too.
    """
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model), dev=3)
    changes = {"batch_prompts": 4, "normalization": "reference", "micro_batch_prompts": micro, "learning_rate": 1e-2}
    two = train.build(work(home, tiny_model, inputs, **changes, processes=2))
    one = train.build(work(Home(tmp_path / "one").create(), tiny_model, inputs, **changes))
    assert distance(two, one) < 1e-5


def ranks() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [p for p in mine if "clha.stages.train_process" in " ".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full_shard"])
def test_a_killed_process_ends_all_with_one_line_and_a_second_attempt_goes_on(
    home: Home, tiny_model: Path, tmp_path: Path, sharding: str
):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    changes = {"epochs": 5.0, "checkpoint_steps": 2, "processes": 2, "sharding": sharding}
    scratch = work(home, tiny_model, inputs, **changes).writer.scratch
    killed: list[int] = []

    def kill() -> None:
        while not any(is_complete(p) for p in scratch.glob("checkpoints*/checkpoint-*")):
            time.sleep(0.01)
        found = [p for p in ranks() if p.environ()["RANK"] == "1"]
        killed.extend(p.pid for p in ranks())
        found[0].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(TransientFailure, match="train: process 2 of 2 was killed by signal 9, the others") as caught:
        train.build(work(home, tiny_model, inputs, **changes))
    assert "\n" not in str(caught.value)
    assert len(killed) == 2 and not any(psutil.pid_exists(pid) for pid in killed) and not ranks()
    events: list[dict[str, Any]] = []
    again = train.build(work(home, tiny_model, inputs, events, **changes))
    assert any("prompts from checkpoint-" in e.get("message", "") for e in events)
    assert was_sharded(events) is (sharding == "full_shard")
    whole = train.build(work(Home(tmp_path / "whole").create(), tiny_model, inputs, **changes))
    assert [row["step"] for row in again.rows("metrics")] == list(range(1, 21))
    for name, value in AutoModelForCausalLM.from_pretrained(whole.folder / "model").state_dict().items():
        mine = AutoModelForCausalLM.from_pretrained(again.folder / "model").state_dict()[name]
        torch.testing.assert_close(mine, value, atol=1e-6, rtol=1e-5)


def test_an_error_in_one_process_is_the_line_of_the_stage(home: Home, tiny_model: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    with pytest.raises(UserError, match="train.lora.target_modules"):
        train.build(work(home, tiny_model, inputs, processes=2, lora={"target_modules": ["nothing"]}))
    assert not ranks()


@pytest.mark.slow
def test_an_adapter_trains_in_two_processes_as_in_one(home: Home, tiny_model: Path, tmp_path: Path):
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    changes = {"lora": {"rank": 4}, "epochs": 1.0}
    events: list[dict[str, Any]] = []
    made = [
        train.build(work(Home(tmp_path / name).create(), tiny_model, inputs, events, **changes, **more))
        for name, more in (
            ("one", {}),
            ("two", {"processes": 2}),
            ("sharded", {"processes": 2, "sharding": "full_shard"}),
        )
    ]
    assert distance(made[1], made[0]) < 1e-5
    assert distance(made[2], made[0]) < 1e-5 and was_sharded(events)


@pytest.mark.slow
def test_sharded_with_gradient_checkpointing_the_best_weights_are_kept_as_in_one_process(
    home: Home, tiny_model: Path, tmp_path: Path
):
    """What the profile hh-7b asks for, but for bfloat16. Early evaluations are the best, so that they are loaded."""
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model), dev=4)
    changes = {"eval_steps": 1, "keep_best": True, "learning_rate": 0.03, "epochs": 3.0, "loss": "sft"}
    changes["gradient_checkpointing"] = True
    events: list[dict[str, Any]] = []
    one = train.build(work(Home(tmp_path / "one").create(), tiny_model, inputs, **changes))
    two = train.build(work(home, tiny_model, inputs, events, **changes, processes=2, sharding="full_shard"))
    assert was_sharded(events)
    assert one.manifest["notes"][-1] == two.manifest["notes"][-1]
    assert one.manifest["notes"][-1] != f"kept the weights of checkpoint-{one.manifest['steps']}"
    assert distance(two, one) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["clha", "dpo"])
def test_in_bfloat16_sharded_weights_train_as_in_one_process(home: Home, tiny_model: Path, tmp_path: Path, loss: str):
    """bfloat16 has 8 bits: losses agree to 2 %; the weights that are kept are float32 and moved nearly alike."""
    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    changes = {"loss": loss, "bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-4}
    events: list[dict[str, Any]] = []
    one = train.build(work(Home(tmp_path / "one").create(), tiny_model, inputs, **changes))
    two = train.build(work(home, tiny_model, inputs, events, **changes, processes=2, sharding="full_shard"))
    assert was_sharded(events)
    assert AutoModelForCausalLM.from_pretrained(two.folder / "model").dtype == torch.float32
    losses = [[row["loss"] for row in made.rows("metrics")] for made in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert distance(two, one) < 1e-3
