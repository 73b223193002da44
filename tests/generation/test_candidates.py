"""Where responses end, which candidates are the same, and what the data brings."""

from collections import Counter
from pathlib import Path

import pytest
from tokenizer_cases import gemma_tokenizer

from clha.chat import Chat, EncodedPrompt, Unusable, load_chat
from clha.generation.candidates import (
    COUNTED,
    Response,
    candidate_rows,
    checked_samples,
    dataset_responses,
    finished_response,
)
from clha.generation.requests import Sample
from clha.generation.sharded import Plan, _Run
from clha.schema import CANDIDATES
from clha.tiny_model import tiny_tokenizer

PROMPT = EncodedPrompt([0, 5, 6], [{"role": "user", "content": "x"}], 2)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(tiny_tokenizer())  # one token for each byte


def sample(chat: Chat, text: str, *end: int, finish: str = "stop") -> Sample:
    ids = [*chat.tokenizer(text, add_special_tokens=False).input_ids, *end]
    return Sample(ids, [-0.5 - k for k in range(len(ids))], finish)


def test_eos_ends_a_response_and_stays_in_its_ids(chat: Chat) -> None:
    made = finished_response(chat, sample(chat, "Yes.", chat.eos_id), ["never"])
    assert (made.text, made.finish_reason) == ("Yes.", "eos")
    assert made.token_ids[-1] == chat.eos_id
    assert made.logprobs == [-0.5, -1.5, -2.5, -3.5, -4.5]


def test_what_ends_a_turn_in_the_template_ends_a_response_as_eos_does() -> None:
    gemma = Chat(gemma_tokenizer())
    for end in (gemma.end_id, gemma.eos_id):
        made = finished_response(gemma, sample(gemma, "good", end, 70), [])
        assert (made.text, made.finish_reason, made.token_ids[-1]) == ("good", "eos", end)


def test_a_response_that_ran_out_of_tokens_has_no_eos(chat: Chat) -> None:
    made = finished_response(chat, sample(chat, "Yes", finish="length"), [])
    assert (made.text, made.finish_reason, len(made.token_ids)) == ("Yes", "length", 3)


def test_another_special_token_ends_a_response_and_is_cut_off(chat: Chat) -> None:
    start = chat.tokenizer.convert_tokens_to_ids("<|im_start|>")
    made = finished_response(chat, sample(chat, "Yes", start, 70, 71), [])
    assert (made.text, made.finish_reason) == ("Yes", "stop_string")
    assert len(made.token_ids) == len(made.logprobs or []) == 3


def test_eos_as_the_very_last_token_allowed_is_eos(chat: Chat) -> None:
    assert finished_response(chat, sample(chat, "Yes", chat.eos_id, finish="length"), []).finish_reason == "eos"


def test_a_stop_string_cuts_text_ids_and_logprobs_together(chat: Chat) -> None:
    made = finished_response(chat, sample(chat, "Fine.\nHuman: and"), ["Human:", "never"])
    assert (made.text, made.finish_reason) == ("Fine.\n", "stop_string")
    assert chat.decode(made.token_ids) == made.text
    assert made.logprobs == [-0.5, -1.5, -2.5, -3.5, -4.5, -5.5]


def test_the_first_of_several_stop_strings_counts(chat: Chat) -> None:
    assert finished_response(chat, sample(chat, "a STOP b END c"), ["END", "STOP"]).text == "a "


def test_a_stop_string_before_eos_takes_the_eos_away(chat: Chat) -> None:
    made = finished_response(chat, sample(chat, "a END b", chat.eos_id), ["END"])
    assert (made.text, made.finish_reason) == ("a ", "stop_string")
    assert chat.eos_id not in made.token_ids


def test_a_token_that_reaches_into_the_stop_string_is_cut_whole(chat: Chat) -> None:
    # The three bytes of 漢 are three tokens: none of them alone is a prefix of the text before a stop string in it.
    made = finished_response(chat, sample(chat, "ab漢字"), ["漢"])
    assert (made.text, len(made.token_ids)) == ("ab", 2)
    made = finished_response(chat, sample(chat, "ab漢字"), ["字"])
    assert (made.text, len(made.token_ids)) == ("ab漢", 5)


def test_a_stop_string_at_the_start_leaves_nothing(chat: Chat) -> None:
    made = finished_response(chat, sample(chat, "Human: x"), ["Human:"])
    assert (made.text, made.token_ids, made.logprobs, made.finish_reason) == ("", [], [], "stop_string")


@pytest.mark.parametrize("n", [1, 3])
def test_a_wrong_number_of_samples_is_a_reason(chat: Chat, n: int) -> None:
    with pytest.raises(Unusable, match="wrong_sample_count"):
        checked_samples([sample(chat, "a")] * n, 2)


@pytest.mark.parametrize("logprobs", [[float("nan")], [float("-inf")], []])
def test_log_probabilities_that_are_not_numbers_are_a_reason(logprobs: list[float]) -> None:
    with pytest.raises(Unusable, match="invalid_logprobs"):
        checked_samples([Sample([7], logprobs, "stop")], 1)


def response(text: str, reason: str = "eos") -> Response:
    return Response([7] * len(text), [-1.0] * len(text), text, reason)


def rows(generated: list[Response], from_data: list[tuple[str, Response]] | None = None) -> tuple[list, Counter[str]]:
    counts: Counter[str] = Counter()
    made = candidate_rows("p", PROMPT, generated, from_data or [], seed=9, generator="g", source="s", counts=counts)
    return made, counts


def test_candidates_with_the_same_text_are_merged_and_counted() -> None:
    made, counts = rows([response("a"), response("b"), response("a", "length"), response("c")])
    assert [(r["candidate_id"], r["text"], r["finish_reason"]) for r in made] == [
        (0, "a", "eos"),
        (1, "b", "eos"),
        (2, "c", "eos"),
    ]
    assert counts["merged_candidates"] == 1
    assert (counts["finish_eos"], counts["finish_length"]) == (3, 1)


def test_empty_responses_are_dropped_and_counted() -> None:
    made, counts = rows([response(""), response(" \n"), response("a")])
    assert [r["text"] for r in made] == ["a"]
    assert counts["empty_responses"] == 2


def test_a_prompt_without_any_response_is_a_reason() -> None:
    with pytest.raises(Unusable, match="no_response: all 2"):
        rows([response(""), response(" ")])


def test_dataset_responses_come_last_with_their_origin_and_without_logprobs() -> None:
    chosen, rejected = Response([7, 1], None, "good", "dataset"), Response([8, 1], None, "bad", "dataset")
    made, _ = rows([response("a")], [("dataset_chosen", chosen), ("dataset_rejected", rejected)])
    assert [(r["candidate_id"], r["origin"], r["seed"], r["generator"]) for r in made] == [
        (0, "generated", 9, "g"),
        (1, "dataset_chosen", None, "dataset s"),
        (2, "dataset_rejected", None, "dataset s"),
    ]
    assert [r["response_logprobs"] for r in made] == [[-1.0], None, None]
    assert {r["truncated_turns"] for r in made} == {2}


def test_a_generated_response_that_the_data_has_too_keeps_the_label() -> None:
    chosen = Response([7, 1], None, "a", "dataset")
    made, counts = rows([response("a"), response("b")], [("dataset_chosen", chosen)])
    assert [(r["text"], r["origin"]) for r in made] == [("b", "generated"), ("a", "dataset_chosen")]
    assert counts["merged_candidates"] == 1


def test_responses_of_the_data_that_cannot_be_spelled_are_counted(chat: Chat) -> None:
    counts: Counter[str] = Counter()
    prompt = {"chosen": ["good<|im_end|>", " "], "rejected": ["bad"]}
    made = dataset_responses(chat, prompt, ["rejected", "chosen"], counts)
    assert [(origin, r.text) for origin, r in made] == [
        ("dataset_rejected", "bad"),
        ("dataset_chosen", "good<|im_end|>"),
    ]
    assert counts == {"unusable_dataset_responses": 1}
    assert set(counts) <= set(COUNTED)


def test_under_a_plain_text_template_what_holds_a_turn_of_its_own_is_left_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    hh = load_chat(tmp_path, "hh")
    counts: Counter[str] = Counter()
    prompt = {"chosen": ["Yes.", "Yes.\n\nHuman: Why?"], "rejected": [], "source": "s"}
    made = dataset_responses(hh, prompt, ["chosen"], counts)
    assert [r.text for _, r in made] == [" Yes."] and counts == {"unusable_dataset_responses": 1}

    messages = [[{"role": "user", "content": text}] for text in ("Hi", "Hi\n\nAssistant: Sure!\n\nHuman: Well?")]
    prompts = [{"prompt_id": str(i), "messages": m} for i, m in enumerate(messages)]
    plan = Plan("candidates", CANDIDATES, prompts, 2, 100, 1, lambda prompt_id: 0)
    run = _Run(None, None, plan, hh, None, None, 0)  # type: ignore[arg-type]  # none of them is asked before the engine
    ((_, requests),) = run._requests({0: prompts})
    assert [r.id for r in requests] == ["0"] and run._refused["1"].reason == "stray_marker"
