"""A row that is handed on is usable; one that is not says why in a word."""

import pytest

from clha.digests import prompt_id
from clha.sources.rows import Place, Unusable, checked_row

PLACE = Place("pairs.jsonl", "line 3", "pairs")
USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi."}
SYSTEM = {"role": "system", "content": "Be kind."}


def reason(messages, chosen=None, rejected=None, subset=None) -> str:
    with pytest.raises(Unusable) as caught:
        checked_row(messages, chosen, rejected, subset, PLACE)
    return caught.value.reason


def test_text_stays_exactly_as_it_is():
    text = "  two spaces, <|im_end|>, <b>HTML</b>, \x00, e\u0301, trailing\t\n"
    row = checked_row([{"role": "user", "content": text, "name": "x"}], [text + "a"], text, "s", PLACE)
    assert row.messages == [{"role": "user", "content": text}]
    assert row.chosen == [text + "a"] and row.rejected == [text]
    assert (row.source, row.subset) == ("pairs.jsonl", "s")


def test_a_row_without_responses_or_subset_is_a_prompt():
    row = checked_row([SYSTEM, USER, ASSISTANT, USER], None, None, None, PLACE)
    assert (row.chosen, row.rejected, row.subset) == ([], [], "pairs")


def test_a_response_given_twice_counts_once():
    assert checked_row([USER], ["a", "b", "a"], None, None, PLACE).chosen == ["a", "b"]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (None, "missing_field"),
        ("Hello", "wrong_type"),
        ({"role": "user", "content": "Hello"}, "wrong_type"),
        ([], "empty_turn"),
        (["Hello"], "wrong_type"),
        ([{"role": "user"}], "missing_field"),
        ([{"content": "Hello"}], "missing_field"),
        ([{"role": "user", "content": None}], "missing_field"),
        ([{"role": "user", "content": 7}], "wrong_type"),
        ([{"role": 7, "content": "Hello"}], "wrong_type"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], "wrong_type"),
        ([{"role": "human", "content": "Hello"}], "unknown_role"),
        ([{"role": "user", "content": ""}], "empty_turn"),
        ([{"role": "user", "content": " \n\t"}], "empty_turn"),
        ([{"role": "user", "content": "half a pair: \ud83d"}], "invalid_unicode"),
        ([USER, ASSISTANT], "last_not_user"),
        ([SYSTEM], "last_not_user"),
        ([USER, USER], "role_order"),
        ([ASSISTANT, USER], "role_order"),
        ([USER, SYSTEM, USER], "role_order"),
        ([SYSTEM, SYSTEM, USER], "role_order"),
    ],
)
def test_messages_that_are_no_prompt_are_refused(messages, expected):
    assert reason(messages) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "subset", "expected"),
    [
        ("", "b", None, "empty_response"),
        ("a", ["b", "  "], None, "empty_response"),
        (7, "b", None, "wrong_type"),
        ("a", [None], None, "wrong_type"),
        ("a", {"text": "b"}, None, "wrong_type"),
        ("\udc80", "b", None, "invalid_unicode"),
        ("a", "a", None, "same_response"),
        ("a", " a\n", None, "same_response"),
        (["a", "b"], ["b"], None, "same_response"),
        ("a", "b", 7, "wrong_type"),
        ("a", "b", "\ud800", "invalid_unicode"),
    ],
)
def test_responses_that_say_nothing_are_refused(chosen, rejected, subset, expected):
    assert reason([USER], chosen, rejected, subset) == expected


def test_a_bad_row_names_its_place_and_its_prompt_where_there_is_one():
    with pytest.raises(Unusable) as caught:
        checked_row([USER], "a", "", None, PLACE)
    bad = caught.value.at(PLACE)
    assert bad.detail == "pairs.jsonl line 3: `rejected` is empty"
    assert bad.prompt_id == prompt_id([USER])
    with pytest.raises(Unusable) as caught:
        checked_row([USER, USER], "a", "b", None, PLACE)
    assert caught.value.at(PLACE).prompt_id is None


def test_a_detail_is_short_and_can_be_written_down():
    bad = Unusable("unknown_role", "\ud800" + "x" * 5000).at(PLACE)
    assert len(bad.detail) <= 300
    bad.detail.encode()
