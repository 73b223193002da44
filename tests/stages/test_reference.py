"""reference: the frozen policy's log-probabilities, which the DPO losses compare with."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from reward_cases import node_work, settings, write_artifact
from train_cases import PROMPTS, tables, work
from transformers import AutoModelForCausalLM, AutoTokenizer

from clha.errors import StageFailure
from clha.schema import CANDIDATES, REFERENCE
from clha.stages import train
from clha.stages.work import Work
from clha.store import Artifact, ArtifactWriter, Home


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
