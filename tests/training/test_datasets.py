"""Training without a pipeline: datasets in our form and in TRL's, and what the core does not import."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from clha.errors import UserError
from clha.training.datasets import as_ranked_prompts

MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


FORMS: dict[str, list[dict[str, Any]]] = {
    "plain, explicit prompt": [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}],
    "plain, implicit prompt": [{"chosen": "The sky is blue.", "rejected": "The sky is green."}],
    "conversational, explicit prompt": [{"prompt": MESSAGES, "chosen": said("It scatters."), "rejected": said("No.")}],
    "conversational, implicit prompt": [
        {"chosen": MESSAGES + said("It scatters."), "rejected": MESSAGES + said("No.")}
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_becomes_a_ranked_prompt_that_ends_in_eos(form: str, tokenizer: Any):
    prompts = as_ranked_prompts(Dataset.from_list(FORMS[form]), tokenizer)
    item = prompts[0]
    assert prompts.max_candidates == len(item) == 2
    chosen, rejected = (tokenizer.decode(r) for r in item.responses)
    eos = tokenizer.eos_token
    if "plain" in form:
        assert tokenizer.decode(item.prompt) == "The sky is"
        assert (chosen, rejected) == (f" blue.{eos}", f" green.{eos}")
    else:
        template = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(item.prompt) == template
        assert (chosen, rejected) == (f"It scatters.{eos}", f"No.{eos}")


@pytest.mark.parametrize("form", FORMS)
def test_a_tokenizer_without_eos_is_told_before_a_row_is_read(form: str, tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="dataset: responses end with the tokenizer's eos_token, and it has none"):
        as_ranked_prompts(Dataset.from_list(FORMS[form]), tokenizer)


def test_a_tokenizer_that_would_begin_with_a_token_it_does_not_have_begins_with_the_text(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    want = as_ranked_prompts(Dataset.from_list(FORMS["plain, explicit prompt"]), tokenizer)[0].prompt.tolist()
    tokenizer.bos_token, tokenizer.add_bos_token = None, True
    assert as_ranked_prompts(Dataset.from_list(FORMS["plain, explicit prompt"]), tokenizer)[0].prompt.tolist() == want


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("explicit", [False, True])
def test_messages_that_both_answers_begin_with_belong_to_the_prompt(explicit: bool, tokenizer: Any):
    """With an explicit prompt none of the messages after it is lost."""
    shared = said("Scattering.") + asked("And at dusk?")
    row = {"chosen": shared + said("It goes red."), "rejected": shared + said("No.")}
    if explicit:
        row |= {"prompt": MESSAGES}
    else:
        row = {name: MESSAGES + messages for name, messages in row.items()}
    item = as_ranked_prompts(Dataset.from_list([row]), tokenizer)[0]
    template = tokenizer.apply_chat_template(MESSAGES + shared, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(item.prompt) == template
    assert [tokenizer.decode(r) for r in item.responses] == [
        f"{t}{tokenizer.eos_token}" for t in ("It goes red.", "No.")
    ]


EARLIER = MESSAGES + said("Scattering.") + asked("And at dusk?") + said("It goes red.")
OTHER = MESSAGES + said("Paint.") + asked("And at dusk?") + said("Black paint.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": EARLIER, "rejected": OTHER},
            "after the 1 .*, chosen has assistant, user, assistant; wanted is one",
        ),
        (
            {"chosen": EARLIER[1:], "rejected": OTHER[1:], "prompt": MESSAGES},
            "after the 0 .*, chosen has assistant, user",
        ),
        ({"chosen": EARLIER, "rejected": EARLIER[:2]}, "after the 2 messages .*, chosen has user, assistant; wanted"),
        ({"chosen": EARLIER, "rejected": EARLIER}, "chosen has nothing; wanted is one message of the assistant"),
        ({"chosen": MESSAGES + asked("x"), "rejected": MESSAGES + said("y")}, "chosen has user; wanted"),
        ({"chosen": EARLIER, "rejected": EARLIER[:3] + said("x"), "prompt": MESSAGES}, "begin with the prompt again"),
        ({"chosen": said("x"), "rejected": said("y"), "prompt": "text"}, "prompt is no list of messages"),
        ({"chosen": [{"role": "assistant", "content": None}], "rejected": said("y")}, "chosen is no list of messages"),
    ],
)
def test_a_conversation_that_is_no_pair_of_answers_is_an_error_that_names_its_row(
    row: dict[str, Any], message: str, tokenizer: Any
):
    good = {"chosen": MESSAGES + said("a"), "rejected": MESSAGES + said("b")}
    if "prompt" in row:
        good = {"chosen": said("a"), "rejected": said("b"), "prompt": row["prompt"]}
    bad = 0 if row.get("prompt") == "text" else 1
    with pytest.raises(UserError, match=f"^dataset: row {bad} cannot be used: .*{message}.*; leave it out$"):
        as_ranked_prompts(Dataset.from_list([good, row]), tokenizer)[1]


def test_text_can_never_become_a_control_token(tokenizer: Any):
    row = {"prompt": "x", "chosen": f"good {tokenizer.eos_token} day", "rejected": "bad"}
    item = as_ranked_prompts(Dataset.from_list([row]), tokenizer)[0]
    assert item.responses[0].tolist().count(tokenizer.eos_token_id) == 1


def test_the_preferences_form_is_taken_as_it_is():
    row = {"prompt_token_ids": [5, 6], "response_token_ids": [[7], [8, 9], [3]], "rewards": [2.0, 1.0, 0.0]}
    weights = [[0, 1, 0.5], [0, 0, 1], [0, 0.25, 0]]
    prompts = as_ranked_prompts(Dataset.from_list([row | {"pair_weights": weights, "sft_lambda": 0.5}]), None)
    item = prompts[0]
    assert prompts.max_candidates == 3
    assert item.pair_weights.tolist() == weights and item.sft_lambda == 0.5
    assert [r.tolist() for r in item.responses] == [[7], [8, 9], [3]]


RANKED = {"prompt_token_ids": [5], "response_token_ids": [[7], [8], [9]]}


@pytest.mark.parametrize(
    ("rewards", "sft_index", "rule", "weights", "sft_lambda"),
    [
        # The paper's picture: 4.581 - 2.390 = 2.191 is noise, 2.390 + 0.612 = 3.002 and 5.193 are not.
        ([4.581, 2.390, -0.612], 0, {}, [[0, 0, 1], [0, 0, 1], [0, 0, 0]], 1),
        ([4.581, 2.390, -0.612], 2, {}, [[0, 0, 1], [0, 0, 1], [0, 0, 0]], 0),
        ([4.581, 2.390, -0.612], 0, {"reward_gap": 2.0}, [[0, 1, 1], [0, 0, 1], [0, 0, 0]], 1),
        ([4.581, 2.390, -0.612], 0, {"sft_threshold": 4.6}, [[0, 0, 1], [0, 0, 1], [0, 0, 0]], 0),
        # Exactly at the gap and at the threshold: noise, and no SFT.
        ([0.0, -3.0, -6.0], 0, {}, [[0, 0, 1], [0, 0, 0], [0, 0, 0]], 0),
    ],
)
def test_rewards_without_weights_get_those_of_the_papers_rule(
    rewards: list[float], sft_index: int, rule: dict[str, float], weights: list[list[float]], sft_lambda: float
):
    dataset = Dataset.from_list([RANKED | {"rewards": rewards, "sft_index": sft_index}])
    item = as_ranked_prompts(dataset, None, **rule)[0]
    assert item.pair_weights.tolist() == weights
    assert item.sft_lambda == sft_lambda


def test_training_on_rewards_alone_is_the_loss_that_takes_rewards_alone(tiny_model: Path, tmp_path: Path):
    """What the trainer reports before any step is `clha_loss` of the same log-probabilities, without weights."""
    import torch

    from clha import ClhaConfig, ClhaTrainer, losses
    from clha.training import policy
    from clha.training.batches import pack
    from clha.training.logprobs import sum_by_response

    rewards = [[4.0, 3.0, -1.0], [-0.5, -2.0, -9.0], [2.5, 2.0, 1.0]]
    rows = [RANKED | {"prompt_token_ids": [5, 6 + i], "rewards": own} for i, own in enumerate(rewards)]
    trainer = ClhaTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32"),
        args=ClhaConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
    )
    found = trainer.evaluate()
    batch = pack([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        logps = policy.response_logps(trainer.model.eval(), batch)
    sums = sum_by_response(logps, batch.target_cell, 3, 3)
    want = losses.clha_loss(sums, batch.response_lengths, torch.tensor(rewards))
    assert float(want.contrastive) > 0.1 and float(want.sft) > 0.1
    assert found["eval_loss/contrastive"] == pytest.approx(float(want.contrastive), rel=1e-5)
    assert found["eval_loss/sft"] == pytest.approx(float(want.sft), rel=1e-5)
    assert found["eval_noise/kept_fraction"] == pytest.approx(4 / 9)


def test_the_gap_and_the_threshold_of_the_rule_are_settings_of_the_trainer(tiny_model: Path, tmp_path: Path):
    from clha import ClhaConfig, ClhaTrainer

    rows = Dataset.from_list([RANKED | {"rewards": [0.9, 0.7, 0.2]}])  # gaps 0.2, 0.5 and 0.7
    args = ClhaConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, reward_gap=0.3, sft_threshold=0.9)
    trainer = ClhaTrainer(model=str(tiny_model), args=args, train_dataset=rows, eval_dataset={"dev": rows})
    for item in (trainer.train_dataset[0], trainer.eval_dataset["dev"][0]):
        assert item.pair_weights.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
        assert item.sft_lambda == 0


GOOD = {"prompt_token_ids": [5, 6], "response_token_ids": [[7], [8, 9]], "rewards": [9.0, 1.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [9.0, math.nan]}, "row 1: rewards holds NaN or infinity; mend it, or leave the row out"),
        ({"rewards": [math.inf, 1.0]}, "row 1: rewards holds NaN or infinity"),
        ({"rewards": [1.0, 9.0]}, "row 1: rewards must be sorted, best first, .*; sort the responses"),
        ({"rewards": [9.0, 1.0, 0.0]}, r"row 1: rewards must hold 2 numbers \(.*\), not 3"),
        ({"rewards": None}, "row 1: rewards must hold 2 numbers .*, not 0"),
        ({"prompt_token_ids": []}, "row 1: prompt_token_ids is empty; leave the row out"),
        ({"prompt_token_ids": None}, "row 1: prompt_token_ids is empty"),
        ({"response_token_ids": [[7], []]}, r"row 1: response_token_ids\[1\] is empty"),
        ({"response_token_ids": [[7], [-1]]}, r"row 1: response_token_ids\[1\] must be a list of token ids"),
        ({"response_token_ids": [[7], None]}, r"row 1: response_token_ids\[1\] must be a list of token ids"),
        ({"response_token_ids": [], "rewards": []}, "row 1: has no responses; leave it out"),
        ({"pair_weights": [[0.0, 1.0]]}, "row 1: pair_weights must hold 2 x 2 numbers .*, not 1 x 2"),
        ({"pair_weights": [[0.0, 1.0], [0.0]]}, "row 1: pair_weights is no array of numbers"),
        ({"pair_weights": [[0.0, math.nan], [0.0, 0.0]]}, "row 1: pair_weights holds NaN"),
        ({"pair_weights": [[0.0, -1.0], [0.0, 0.0]]}, "row 1: pair_weights hold a number below 0"),
        ({"sft_index": 2}, "row 1: sft_index is 2; it is the place of a response, 0 to 1"),
        ({"sft_index": -1}, "row 1: sft_index is -1"),
        ({"sft_lambda": math.nan}, "row 1: sft_lambda holds NaN"),
        ({"sft_lambda": 1.5}, "row 1: sft_lambda is 1.5; it must be between 0 and 1"),
    ],
)
def test_a_row_that_cannot_be_right_is_an_error_that_names_it(change: dict[str, Any], message: str):
    """Before the first step, whichever row it is; also of what is no `datasets.Dataset`, when the row is read."""
    rows = Dataset.from_list([dict.fromkeys(change) | GOOD, GOOD | change])
    with pytest.raises(UserError, match=f"^dataset: {message}") as caught:
        as_ranked_prompts(rows, None)
    assert "\n" not in str(caught.value)
    prompts = as_ranked_prompts(rows.with_transform(lambda batch: batch), None)
    assert prompts.max_candidates >= 2 and len(prompts[0]) == 2
    with pytest.raises(UserError, match=f"^dataset: {message}"):
        prompts[1]


def test_with_weights_of_its_own_a_row_may_stand_in_another_order_than_its_rewards():
    row = GOOD | {"rewards": [1.0, 9.0], "pair_weights": [[0, 0.5], [0.25, 0]], "sft_index": 1, "sft_lambda": 0.5}
    item = as_ranked_prompts(Dataset.from_list([row]), None)[0]
    assert item.pair_weights.tolist() == [[0, 0.5], [0.25, 0]]
    assert (item.sft_index, item.sft_lambda, item.rewards.tolist()) == (1, 0.5, [1.0, 9.0])


def test_other_columns_and_text_without_a_tokenizer_are_errors_in_one_line(tokenizer: Any):
    with pytest.raises(UserError, match="has columns instruction, output; wanted are"):
        as_ranked_prompts(Dataset.from_list([{"instruction": "a", "output": "b"}]), tokenizer)
    with pytest.raises(UserError, match="processing_class"):
        as_ranked_prompts(Dataset.from_list(FORMS["plain, implicit prompt"]), None)
    with pytest.raises(UserError, match="row 0 has no prompt"):
        as_ranked_prompts(Dataset.from_list([{"prompt": "", "chosen": "a", "rejected": "b"}]), tokenizer)[0]


def test_the_trainer_stands_alone(tiny_model: Path, tmp_path: Path, tokenizer: Any):
    from clha import ClhaConfig, ClhaTrainer

    rows = [{"prompt": f"{i} and", "chosen": f" {i + 1}", "rejected": " nothing at all"} for i in range(6)]
    trainer = ClhaTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=ClhaConfig(
            output_dir=str(tmp_path), num_train_epochs=1, report_to="none", use_cpu=True, save_strategy="no"
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]),
        processing_class=tokenizer,
    )
    assert trainer.train().global_step == 2
    assert 0 <= trainer.evaluate()["eval_rewards/accuracies"] <= 1
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").is_file()


@pytest.mark.parametrize("loss", ["dpo", "dpo_smoothed", "dpo_robust"])
def test_alone_the_reference_is_the_model_as_it_was_given(
    tiny_model: Path, tmp_path: Path, tokenizer: Any, loss: str, monkeypatch: pytest.MonkeyPatch
):
    """The first step's loss is -log sigmoid(0) = log 2; callbacks and `report_to` are those of any Trainer."""
    from transformers import TrainerCallback

    from clha import ClhaConfig, ClhaTrainer

    seen: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(state.global_step)

    rows = [{"prompt": f"{i} and", "chosen": f" {i + 1}", "rejected": " nothing at all"} for i in range(8)]
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    args = {"num_train_epochs": 1, "report_to": "tensorboard", "use_cpu": True, "save_strategy": "no"}
    trainer = ClhaTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32"),
        args=ClhaConfig(output_dir=str(tmp_path), loss=loss, learning_rate=1e-3, **args),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[1] < losses[0]
    assert seen == [1, 2] and list((tmp_path / "events").rglob("events.out.*"))


def test_a_model_can_be_named_by_its_folder(tiny_model: Path, tmp_path: Path, tokenizer: Any):
    from clha import ClhaConfig, ClhaTrainer

    args = ClhaConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert ClhaTrainer(model=str(tiny_model), args=args).abilities.shares_prompts


BLOCK = """
import sys
# A module that is None here cannot be imported, and counts as not installed.
sys.modules.update(dict.fromkeys(("prefect", "vllm", "datasets", "pydantic", "trl", "scipy")))
import clha.losses, clha.training.trainer, clha.training.preferences, clha.training.export, clha.training.reference
from pathlib import Path
from clha import ClhaConfig, ClhaTrainer
sys.path.append(sys.argv[1])
from training_cases import trainer
made = trainer(Path(sys.argv[2]), max_steps=1, save_strategy="steps", save_steps=1)
made.train()
made.evaluate()
print("trained", ClhaTrainer.__name__, ClhaConfig.__name__, made.state.global_step)
"""


def test_the_core_works_where_prefect_vllm_datasets_and_pydantic_cannot_be_imported(root: Path, tmp_path: Path):
    command = [sys.executable, "-c", BLOCK, str(root / "tests"), str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("trained ClhaTrainer ClhaConfig 1"), done.stderr[-2000:]
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def test_losses_logprobs_and_batches_import_nothing_of_ours_but_each_other(root: Path):
    import ast

    allowed = {"torch", "numpy", "typing", "collections", "dataclasses", "math", "contextlib", "types"}
    # How gradients are added; how wide padded rows are.
    own = {"training/logprobs.py": {"clha.training.layers"}, "training/batches.py": {"clha.padding"}}
    for name in ("losses.py", "training/logprobs.py", "training/batches.py", "training/layers.py"):
        tree = ast.parse((root / "clha" / name).read_text())
        found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert {module.split(".")[0] for module in found - own.get(name, set())} <= allowed
