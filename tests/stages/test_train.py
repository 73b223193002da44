"""train: the joined tables of a small chain become a model that answers, with its metrics and card."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from reward_cases import node_work, prompt_row, settings, write_artifact, write_candidates, write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from clha.errors import StageFailure, UserError
from clha.schema import REWARDS, WEIGHTS
from clha.stages import train
from clha.stages.work import Work
from clha.store import Artifact, Home

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
    given = {"batch_prompts": 2, "learning_rate": 1e-3, "margin": 0.3} | changes
    return node_work(home, settings(train=given), "train", inputs, {"policy": model}, events)


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
    card = (model / "README.md").read_text()
    assert card.startswith("---\n") and "| prompts trained on | 8 |" in card and "| learning_rate |" in card
    rows = artifact.rows("metrics")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
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


def test_a_second_attempt_goes_on_from_the_checkpoint_and_ends_with_the_same_weights(
    home: Home, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from clha.training import export

    inputs = tables(home, AutoTokenizer.from_pretrained(tiny_model))
    events: list[dict[str, Any]] = []

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train.build(work(home, tiny_model, inputs, checkpoint_steps=2))
    again = train.build(work(home, tiny_model, inputs, events, checkpoint_steps=2))
    assert any("checkpoint-4" in e.get("message", "") for e in events)
    other = Home(tmp_path / "other").create()
    whole = train.build(work(other, tiny_model, inputs, checkpoint_steps=2))
    digests = [
        {f["name"]: f["sha256"] for f in a.manifest["files"] if f["name"].endswith("safetensors")}
        for a in (again, whole)
    ]
    assert digests[0] == digests[1]
    steps = pq.read_table(again.folder / "metrics-00000.parquet")["step"].to_pylist()
    assert steps == [1, 2, 3, 4]
    assert json.loads((again.folder / "manifest.json").read_text())["steps"] == 4
