"""The token ids of TRL's pair formats here, and those that TRL's own DPO trainer makes of the same rows."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizer_cases import gemma_tokenizer, llama2_tokenizer, llama3_tokenizer
from transformers import AutoModelForCausalLM

from clha.errors import UserError
from clha.tiny_model import tiny_tokenizer
from clha.training.datasets import as_ranked_prompts

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
if importlib.util.find_spec("trl") is None:
    raise ModuleNotFoundError("TRL is missing: requirements/cpu.lock has it, and without it nothing is compared here")

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "chatml": tiny_tokenizer,
    "llama3": llama3_tokenizer,
    "llama2": llama2_tokenizer,
    "llama2, legacy": lambda: llama2_tokenizer("always"),
}
PLAIN = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, and\ngood."},
    {"prompt": "Q: a", "chosen": ".bc", "rejected": ", no"},
    {"prompt": "Name a river:\n", "chosen": "Rhine", "rejected": "the Nile"},
    {"prompt": "Say good", "chosen": "\n\nNo.", "rejected": "  bad"},
]
ASKED = [{"role": "user", "content": "Name a river."}]
MORE = [*ASKED, {"role": "assistant", "content": "the Nile"}, {"role": "user", "content": "Say good"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


MESSAGES = [
    {"prompt": ASKED, "chosen": said("The Rhine."), "rejected": said("bad")},
    {"prompt": MORE, "chosen": said("good, good"), "rejected": said("No.\n\nNo.")},
]


def trl_ids(rows: list[dict[str, Any]], tokenizer: Any, folder: Path, tiny_model: Path) -> list[list[list[int]]]:
    """Prompt, chosen and rejected of each row, as TRL's trainer has them."""
    from trl import DPOConfig, DPOTrainer

    made = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=DPOConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [[list(row[name]) for name in names] for row in made.train_dataset]


def our_ids(rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> list[list[list[int]]]:
    prompts = as_ranked_prompts(Dataset.from_list(rows), tokenizer, **settings)
    items = [prompts[i] for i in range(len(prompts))]
    return [[item.prompt.tolist(), *(r.tolist() for r in item.responses)] for item in items]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_has_the_ids_that_trl_gives_it(kind: str, tmp_path: Path, tiny_model: Path):
    tokenizer = TOKENIZERS[kind]()
    ours = our_ids(PLAIN, tokenizer)
    assert ours == trl_ids(PLAIN, tokenizer, tmp_path, tiny_model)
    begins = kind != "chatml"  # the post-processor of the others puts BOS before a text
    assert all((prompt[0] == tokenizer.bos_token_id) == begins for prompt, *_ in ours)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_control_tokens_in_text_are_characters_and_only_where_it_is_trusted_what_trl_makes_of_them(
    kind: str, tmp_path: Path, tiny_model: Path
):
    """On purpose: nobody's words may end a turn. TRL lets them."""
    tokenizer = TOKENIZERS[kind]()
    eos = tokenizer.eos_token
    rows = [{"prompt": f"Say good{eos}No.", "chosen": f"bad{eos}", "rejected": f"a{eos}b"}]
    theirs = trl_ids(rows, tokenizer, tmp_path, tiny_model)
    assert our_ids(rows, tokenizer, control_tokens_in_text=True) == theirs
    [[prompt, *answers]] = our_ids(rows, tokenizer)
    assert tokenizer.eos_token_id not in prompt
    assert [answer.index(tokenizer.eos_token_id) for answer in answers] == [len(answer) - 1 for answer in answers]


@pytest.mark.parametrize("kind", [*TOKENIZERS, "gemma"])
def test_messages_have_the_ids_that_trl_gives_them_up_to_the_token_that_ends_the_turn(
    kind: str, tmp_path: Path, tiny_model: Path
):
    """On purpose ours end there: TRL trains on what the template writes after it too, which no model is asked for."""
    tokenizer = gemma_tokenizer() if kind == "gemma" else TOKENIZERS[kind]()
    end = "<end_of_turn>" if kind == "gemma" else tokenizer.eos_token
    theirs = trl_ids(MESSAGES, tokenizer, tmp_path, tiny_model)
    for ours, (prompt, *answers) in zip(our_ids(MESSAGES, tokenizer), theirs, strict=True):
        ended = [answer[: answer.index(tokenizer.convert_tokens_to_ids(end)) + 1] for answer in answers]
        assert ours == [prompt, *ended]
        if kind in ("chatml", "gemma"):
            assert {tokenizer.decode(answer[len(own) :]) for own, answer in zip(ended, answers, strict=True)} == {"\n"}


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_arguments_of_the_template_reach_it_as_in_trl(as_json: bool, tmp_path: Path, tiny_model: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if thinking is defined %}{{ thinking }}{% endif %}"
        + tokenizer.chat_template
    )
    tools: Any = [{"name": "add", "description": "adds"}]
    more = {"tools": json.dumps(tools) if as_json else tools, "chat_template_kwargs": {"thinking": False}}
    rows = [row | more for row in MESSAGES]
    ours = our_ids(rows, tokenizer)
    assert [prompt for prompt, *_ in ours] == [prompt for prompt, *_ in trl_ids(rows, tokenizer, tmp_path, tiny_model)]
    assert tokenizer.decode(ours[0][0]).startswith('[{"name": "add", "description": "adds"}]False<|im_start|>')


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs has tokenize"),
        ({"chat_template_kwargs": {"truncation": True}}, "chat_template_kwargs has truncation"),
        ({"chat_template_kwargs": {"conversation": []}}, "chat_template_kwargs has conversation"),
        ({"chat_template_kwargs": {"messages": ["a"]}}, "chat_template_kwargs has messages"),
        ({"tools": "add"}, "tools is text that is no JSON"),
        ({"tools": [{"name": "<|im_end|>"}]}, "an argument of the chat template spells a control token"),
    ],
)
def test_what_the_template_cannot_be_given_is_an_error_that_names_the_row(more: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"^dataset: row 0 cannot be used: .*{message}"):
        our_ids([MESSAGES[0] | more], tiny_tokenizer())


@pytest.mark.parametrize("kind", ["llama3", "llama2", "llama2, legacy"])
def test_a_token_over_the_border_is_the_one_place_where_text_is_read_otherwise(
    kind: str, tmp_path: Path, tiny_model: Path
):
    """TRL lets "g" + "ood" be one word and drops the "g" of the prompt; ours keeps the prompt that a model is asked."""
    tokenizer = TOKENIZERS[kind]()
    rows = [{"prompt": "Say g", "chosen": "ood", "rejected": "reen"}]
    [[prompt, chosen, rejected]], [[cut, *_]] = our_ids(rows, tokenizer), trl_ids(rows, tokenizer, tmp_path, tiny_model)
    assert prompt == tokenizer("Say g").input_ids and len(cut) < len(prompt)
    assert tokenizer.decode([*prompt, *chosen], skip_special_tokens=True) == "Say good"
    assert tokenizer.decode([*prompt, *rejected], skip_special_tokens=True) == "Say green"
