"""What is told of a dataset before the first step, what when a row is read, and datasets of the wrong kind."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Array2D, Dataset, DatasetDict, List, Value
from tokenizer_cases import llama2_tokenizer, metaspace_tokenizer
from torch.utils.data import DataLoader
from training_cases import small_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from clha import ClhaConfig, ClhaTrainer
from clha.chat import Chat
from clha.errors import UserError
from clha.tiny_model import tiny_tokenizer
from clha.training.datasets import as_ranked_prompts
from clha.training.limits import Limits, limits_of
from clha.training.pairs import Conversation, PlainText
from clha.training.row_checks import look_at_preferences

PAIR = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
ASKED = [{"role": "user", "content": "Why is the sky blue?"}]
ROW = {"prompt_token_ids": [5, 6], "response_token_ids": [[7], [8, 9]], "rewards": [9.0, 1.0]}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TALK = {"prompt": ASKED, "chosen": said("It scatters."), "rejected": said("No.")}


def make(folder: Path, rows: Any, model: Any = None, evaluation: Any = None, **settings: Any) -> ClhaTrainer:
    settings = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True} | settings
    return ClhaTrainer(
        model=small_llama() if model is None else model,
        args=ClhaConfig(output_dir=str(folder), num_train_epochs=1, **settings),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer(),
    )


# Control tokens in plain text.


def test_text_that_spells_control_tokens_is_told_once_and_stays_text(tmp_path: Path, tiny_model: Path):
    rows = [PAIR, PAIR | {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}, PAIR]
    made = make(tmp_path, rows, AutoModelForCausalLM.from_pretrained(tiny_model), Dataset.from_list(rows))
    (told,) = made.notes
    assert "<|im_start|> in row 1; 1 of the first 3 rows" in told and "\n" not in told
    assert "give messages" in told and "control_tokens_in_text=True" in told
    assert not {0, 1} & set(made.train_dataset[1].prompt.tolist())
    assert as_ranked_prompts(Dataset.from_list([PAIR]), tiny_tokenizer()).notes == []


def test_trusted_text_that_had_the_chat_template_applied_has_the_ids_of_its_messages():
    tokenizer = tiny_tokenizer()
    messages = as_ranked_prompts(Dataset.from_list([TALK]), tokenizer)[0]
    prompt = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    row = {"prompt": prompt, "chosen": "It scatters.<|im_end|>", "rejected": "No."}
    text = as_ranked_prompts(Dataset.from_list([row]), tokenizer, control_tokens_in_text=True)
    assert text[0].prompt.tolist() == messages.prompt.tolist() and text.notes == []
    assert [r.tolist() for r in text[0].responses] == [r.tolist() for r in messages.responses]


def test_trusted_text_that_begins_with_bos_has_one():
    tokenizer = llama2_tokenizer()
    row = {"prompt": "<s>Q: a", "chosen": ".bc</s>", "rejected": ", no"}
    item = as_ranked_prompts(Dataset.from_list([row]), tokenizer, control_tokens_in_text=True)[0]
    assert item.prompt.tolist().count(tokenizer.bos_token_id) == 1
    assert item.responses[0].tolist().count(tokenizer.eos_token_id) == 1


def test_text_cannot_spell_tokens_of_the_template_that_are_not_special_either():
    tokenizer = metaspace_tokenizer()
    row = {"prompt": "a [INST] b", "chosen": "c [/INST]", "rejected": "d"}
    item = as_ranked_prompts(Dataset.from_list([row]), tokenizer)[0]
    ids = [*item.prompt.tolist(), *item.responses[0].tolist()]
    assert not set(tokenizer.convert_tokens_to_ids(["[INST]", "[/INST]"])) & set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a [INST] bc [/INST]"


def test_text_full_of_such_tokens_is_read_in_order_and_in_a_moment():
    tokenizer = metaspace_tokenizer()
    row = {"prompt": "a [INST] b" * 3 + "[INST[INST]]", "chosen": "c [/INST]" * 2000, "rejected": "d"}
    start = time.process_time()
    item = as_ranked_prompts(Dataset.from_list([row]), tokenizer)[0]
    assert time.process_time() - start < 20
    ids = [*item.prompt.tolist(), *item.responses[0].tolist()]
    assert not set(tokenizer.convert_tokens_to_ids(["[INST]", "[/INST]"])) & set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == row["prompt"] + row["chosen"]


def test_trusted_text_is_not_searched_for_control_tokens():
    def rows() -> Any:
        raise AssertionError("a row was read")
        yield

    assert PlainText(tiny_tokenizer(), control_tokens=True).told(rows()) is None


def test_a_chat_is_kept_for_the_arguments_of_rows_that_come_again(monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []
    with_arguments = Chat.with_arguments
    monkeypatch.setattr(Chat, "with_arguments", lambda self, own: made.append(own) or with_arguments(self, own))
    chats = Conversation(tiny_tokenizer())
    for i in [0, 1, 2] * 3:
        chats.encode(TALK | {"tools": [{"name": f"tool{i}"}]})
    assert len(made) == 3
    for i in range(100):
        chats.encode(TALK | {"tools": [{"name": f"other{i}"}]})
    chats.encode(TALK | {"tools": [{"name": "other99"}]})
    assert len(made) == 103 and len(chats._own) == 64


# Lengths and token ids.


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2))


def test_a_row_that_the_model_cannot_take_is_told_before_the_first_step(tmp_path: Path):
    """64 positions take 62 tokens and 3 of a response, whose last is no input; not one more."""
    fits = {"prompt_token_ids": [3] * 62, "response_token_ids": [[7, 7, 7], [8]], "rewards": [9.0, 1.0]}
    long = fits | {"prompt_token_ids": [3] * 63}
    make(tmp_path, [fits], gpt2()).train()
    with pytest.raises(UserError, match=r"^dataset: row 1: has 66 tokens \(prompt 63\), .* takes 64; .*max_length=64"):
        make(tmp_path, [fits, long], gpt2())
    for at in ("prompt_token_ids", "response_token_ids"):
        strange = ROW | {at: [[7], [300]] if at == "response_token_ids" else [300]}
        with pytest.raises(UserError, match=r"^dataset: row 1: has token id 300, .* ends at 299; .*tokenizer"):
            make(tmp_path, [ROW, strange], gpt2())


def test_a_max_length_beyond_the_models_positions_is_refused_when_the_trainer_is_made(tmp_path: Path):
    with pytest.raises(UserError, match=r"^max_length=65: the model takes 64 tokens; set no more than that$"):
        make(tmp_path, [ROW], gpt2(), max_length=65)
    assert len(make(tmp_path, [ROW], gpt2(), max_length=64).train_dataset) == 1


def test_text_that_is_too_long_or_of_another_tokenizer_is_told_when_it_is_read(tmp_path: Path):
    rows = as_ranked_prompts(
        Dataset.from_list([PAIR, PAIR | {"prompt": "x" * 99}]), tiny_tokenizer(), limits=Limits(positions=60)
    )
    with pytest.raises(UserError, match=r"^dataset: row 1: has 107 tokens"):
        rows[1]
    with pytest.raises(UserError, match=r"^dataset: row 0: has token id \d+, .* ends at 9"):
        as_ranked_prompts(Dataset.from_list([PAIR]), tiny_tokenizer(), limits=Limits(vocabulary=10))


def test_positions_that_are_stretched_have_no_limit():
    def limit(**settings: Any) -> int | None:
        sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config = LlamaConfig(**sizes, num_attention_heads=1, max_position_embeddings=64, **settings)
        return limits_of(LlamaForCausalLM(config)).positions

    assert limit() == 64
    assert limit(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}) is None


def test_max_length_cuts_the_beginning_of_prompts_and_keeps_bos():
    row = {"prompt": "abcdefghij", "chosen": "xyz", "rejected": "w"}
    for tokenizer, first in ((tiny_tokenizer(), ""), (llama2_tokenizer(), "<s>")):
        whole = as_ranked_prompts(Dataset.from_list([row]), tokenizer)[0]
        size = len(whole.prompt) + len(whole.responses[0])
        cut = as_ranked_prompts(Dataset.from_list([row]), tokenizer, max_length=size - 2)[0]
        bos = 1 if first else 0
        assert cut.prompt.tolist() == whole.prompt[:bos].tolist() + whole.prompt[bos + 2 :].tolist()
        assert [r.tolist() for r in cut.responses] == [r.tolist() for r in whole.responses]


def test_max_length_drops_the_oldest_turns_of_messages_and_the_end_of_long_responses():
    tokenizer = tiny_tokenizer()
    old = [{"role": "user", "content": "o" * 50}, {"role": "assistant", "content": "p" * 50}]
    row = {"prompt": old + ASKED, "chosen": said("y" * 200), "rejected": said("n")}
    item = as_ranked_prompts(Dataset.from_list([row]), tokenizer, max_length=150)[0]
    asked = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(item.prompt) == asked
    assert len(item.prompt) + len(item.responses[0]) == 150
    ranked = as_ranked_prompts(Dataset.from_list([ROW | {"prompt_token_ids": list(range(9))}]), None, max_length=5)[0]
    assert ranked.prompt.tolist() == [6, 7, 8] and [r.tolist() for r in ranked.responses] == [[7], [8, 9]]


@pytest.mark.parametrize("make_tokenizer", [tiny_tokenizer, llama2_tokenizer])
def test_a_last_turn_that_is_too_long_alone_loses_its_beginning_behind_bos(make_tokenizer: Any):
    tokenizer = make_tokenizer()
    row = TALK | {"prompt": [*ASKED, *said("z"), {"role": "user", "content": "x" * 300 + "end?"}]}
    item = as_ranked_prompts(Dataset.from_list([row]), tokenizer, max_length=60)[0]
    asked = tokenizer.apply_chat_template(row["prompt"][-1:], add_generation_prompt=True, return_dict=False)
    size = 60 - max(map(len, item.responses))
    assert item.prompt.tolist() == [tokenizer.bos_token_id, *asked[1 - size :]]
    assert tokenizer.decode(item.responses[0], skip_special_tokens=True).strip() == "It scatters."


# Rows.


@pytest.mark.parametrize("name", ["chosen", "rejected"])
@pytest.mark.parametrize(("pair", "empty"), [(PAIR, ""), (PAIR, None), (TALK, None), (TALK, [])])
def test_a_pair_without_one_of_its_answers_is_told_before_the_first_step(pair: dict, empty: Any, name: str):
    with pytest.raises(UserError, match=r"^dataset: row 7 "):
        as_ranked_prompts(Dataset.from_list([pair] * 7 + [pair | {name: empty}]), tiny_tokenizer())


def test_messages_of_which_one_answer_has_more_than_the_other_are_told_before_the_first_step():
    row = TALK | {"chosen": [*said("a"), *ASKED, *said("b")]}
    with pytest.raises(UserError, match=r"^dataset: row 7 .*chosen has assistant, user, assistant; wanted is one"):
        as_ranked_prompts(Dataset.from_list([TALK] * 7 + [row]), tiny_tokenizer())


def test_a_bad_row_is_one_line_with_workers_too(tmp_path: Path, tiny_model: Path):
    several = {name: [*said(name), *ASKED, *said("b")] for name in ("chosen", "rejected")}
    rows = [TALK, TALK | several]
    made = make(tmp_path, rows, AutoModelForCausalLM.from_pretrained(tiny_model), dataloader_num_workers=1)
    with pytest.raises(UserError) as caught:
        made.train()
    assert str(caught.value).startswith("dataset: row 1 cannot be used: after the 0 messages")
    assert "\n" not in str(caught.value)


def test_messages_without_a_chat_template_are_told_once_with_what_to_do(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(
        UserError, match=r"^dataset: rows are messages, .* set tokenizer.chat_template, or give"
    ) as told:
        as_ranked_prompts(Dataset.from_list([TALK]), tokenizer)
    assert "policy" not in str(told.value)
    assert len(as_ranked_prompts(Dataset.from_list([PAIR]), tokenizer)[0]) == 2


def test_many_rows_are_looked_at_in_a_moment():
    """Two hundred thousand rows took six seconds in Python."""
    draw, rows = np.random.default_rng(0), 200_000
    columns = {
        "prompt_token_ids": [[1, 2, 3]] * rows,
        "response_token_ids": [[[4, 5], [6]], [[4], [5], [6, 7]]] * (rows // 2),
        "rewards": [[2.0, 1.0], [3.0, 2.0, 1.0]] * (rows // 2),
    }
    data = Dataset.from_dict(columns)
    as_ranked_prompts(data.select(range(9)), None)
    start = time.process_time()
    prompts = as_ranked_prompts(data, None, limits=Limits(64, 99))
    assert time.process_time() - start < 1.5
    assert prompts.max_candidates == 3
    order = draw.permutation(rows)[:10_000].tolist()
    found = look_at_preferences(data.select(order), Limits(4, 7), None)
    assert found is not None
    want = [i for i, place in enumerate(order) if place % 2]  # their last response has token 7, and is one too long
    assert found.doubtful == want


def test_what_is_seen_of_rows_does_not_depend_on_their_format():
    data = Dataset.from_list([ROW, ROW | {"rewards": [1.0, 9.0]}, ROW])
    for given in (data, data.with_format("torch"), data.with_format("numpy"), data.select([0, 1, 2])):
        with pytest.raises(UserError, match="row 1: rewards must be sorted"):
            as_ranked_prompts(given, None)
    assert as_ranked_prompts(data.select([2, 0]), None).max_candidates == 2


WEIGHTS: dict[str, Any] = {
    "lists": List(List(Value("float32"))),
    "lists of a fixed size": List(List(Value("float32"), length=2), length=2),
    "Array2D": Array2D((2, 2), "float32"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_pair_weights_of_a_fixed_size_are_looked_at_like_others(kind: str):
    def rows(*weights: Any) -> Dataset:
        data = Dataset.from_list([ROW] * len(weights))
        return data.add_column("pair_weights", list(weights), feature=WEIGHTS[kind])

    good, bad, none = [[0.0, 1.0], [0.0, 0.0]], [[0.0, -1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]
    found = look_at_preferences(rows(good, good, bad), Limits(), None)
    assert found is not None and found.doubtful == [2] and found.weighed
    with pytest.raises(UserError, match="row 2: pair_weights hold a number below 0"):
        as_ranked_prompts(rows(good, good, bad), None)
    assert as_ranked_prompts(rows(none), None).notes == ["dataset: no pair counts: pair_weights are all 0"]


def test_weights_of_a_kind_that_cannot_be_looked_at_are_told_of_when_their_row_is_read():
    rows = Dataset.from_list([ROW | {"pair_weights": None}] + [ROW | {"pair_weights": "0 1 0 0"}] * 2)
    found = look_at_preferences(rows, Limits(), None)
    assert found is not None and found.doubtful == []
    prompts = as_ranked_prompts(rows, None)
    with pytest.raises(UserError, match="row 1: pair_weights is no array of numbers"):
        prompts[1]


# Kinds of datasets.


def test_datasets_of_the_wrong_kind_are_one_line_each(tmp_path: Path):
    rows = Dataset.from_list([ROW])
    for wrong, message in (
        (
            DatasetDict({"train": rows}),
            r"^train_dataset is a dict of datasets \(train\); give one, as data\['train'\]$",
        ),
        (rows.to_iterable_dataset(), r"^train_dataset is a stream, .*from_list\(list\(stream\)\)"),
        (({"a": 1},), r"^train_dataset is a list; give datasets.Dataset.from_list\(rows\)$"),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path, wrong, max_steps=1)
    with pytest.raises(UserError, match=r"^eval_dataset is a stream"):
        make(tmp_path, rows, evaluation=rows.to_iterable_dataset())
    with pytest.raises(UserError, match=r"^eval_dataset\['dev'\] is a stream"):
        make(tmp_path, rows, evaluation={"dev": rows.to_iterable_dataset()})


def test_nothing_to_evaluate_on_is_an_error_not_a_loss_of_0(tmp_path: Path):
    rows = Dataset.from_list([ROW])
    with pytest.raises(UserError, match=r"^eval_dataset has no rows"):
        make(tmp_path, rows, evaluation=rows.select([]))
    made = make(tmp_path, rows)
    with pytest.raises(UserError, match=r"^eval_dataset has no rows"):
        made.evaluate(rows.select([]))
    with pytest.raises(UserError, match=r"^evaluate: there is no eval_dataset 'nope'; there are none"):
        made.evaluate("nope")


@pytest.mark.parametrize("loss", ["clha", "dpo"])
def test_the_trainers_datasets_answer_for_what_callbacks_ask(loss: str, tmp_path: Path):
    rows = Dataset.from_list([ROW | {"prompt_id": str(i)} for i in range(5)])
    made = make(tmp_path, rows, evaluation={"dev": rows}, loss=loss, per_device_eval_batch_size=2)
    given = made.train_dataset
    assert given.column_names == rows.column_names and given.features == rows.features
    assert given.select([3])[0]["prompt_id"] == "3"
    assert [item.prompt_id for item in given[1:4:2]] == ["1", "3"] and given[-1].prompt_id == "4"
    assert len(list(given)) == 5
    loader = made.get_eval_dataloader("dev")
    assert isinstance(loader, DataLoader)
    assert [[item.prompt_id for item in batch] for batch in loader] == [["0", "1"], ["2", "3"], ["4"]]
    assert made.evaluate()["eval_dev_loss"] > 0
    if loss == "clha":
        assert made.evaluate(rows)["eval_loss"] == pytest.approx(made.evaluate()["eval_dev_loss"])


def test_a_dataset_without_a_pair_that_counts_is_told(tmp_path: Path):
    narrow = [ROW | {"rewards": [0.9, 0.2]}, ROW | {"rewards": [0.5, 0.4]}]
    (told,) = make(tmp_path, narrow, evaluation=Dataset.from_list(narrow)).notes
    assert "no pair counts: rewards of a row are at most 0.7 apart" in told and "set reward_gap" in told
    assert make(tmp_path, narrow, reward_gap=0.5).notes == []
    for loss in ("sft", "rrhf", "pro"):  # they do not read the weights of pairs
        assert make(tmp_path, narrow, loss=loss).notes == []
    assert len(make(tmp_path, narrow, loss="dpo").notes) == 1
    single = [{"prompt_token_ids": [5], "response_token_ids": [[7]], "rewards": [9.0]}]
    assert make(tmp_path, single).notes == [
        "dataset: no pair counts: every row has one response, which only the SFT part learns from"
    ]
    zero = [ROW | {"pair_weights": [[0.0, 0.0], [0.0, 0.0]]}]
    assert make(tmp_path, zero).notes == ["dataset: no pair counts: pair_weights are all 0"]
