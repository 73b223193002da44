"""The preference formats of TRL: one row each, and what is wrong with those that are none."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clha.settings import Prepare
from clha.sources.lines import Meter
from clha.sources.reading import read_source
from clha.sources.rows import Place, Row, Unusable
from clha.sources.trl import trl_row

PLACE = Place("pairs.jsonl", "line 1", "pairs")
SKY = "What colour is the sky?"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def parts(**fields):
    row = trl_row(fields, PLACE)
    return row.messages, row.chosen, row.rejected


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": SKY, "chosen": "Blue.", "rejected": "Green."},
        {"prompt": [user(SKY)], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
        {"chosen": [user(SKY), assistant("Blue.")], "rejected": [user(SKY), assistant("Green.")]},
        {"prompt": SKY, "chosen": [user(SKY), assistant("Blue.")], "rejected": [user(SKY), assistant("Green.")]},
        {"prompt": [user(SKY)], "chosen": "Blue.", "rejected": "Green."},
        {"prompt": SKY, "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
        {"chosen": f"\n\nHuman: {SKY}\n\nAssistant: Blue.", "rejected": f"\n\nHuman: {SKY}\n\nAssistant: Green."},
        {"prompt": f"\n\nHuman: {SKY}\n\nAssistant:", "chosen": "Blue.", "rejected": "Green."},
    ],
    ids=[
        "explicit text", "explicit conversation", "implicit conversation", "prompt and whole conversations",
        "prompt messages, text responses", "prompt text, response messages", "implicit HH text", "explicit HH text",
    ],
)  # fmt: skip
def test_every_format_says_the_same(fields):
    assert parts(**fields) == ([user(SKY)], ["Blue."], ["Green."])


def test_an_implicit_text_prompt_is_the_words_in_common():
    assert parts(chosen="The sky is blue.", rejected="The sky is green.") == (
        [user("The sky is")],
        [" blue."],
        [" green."],
    )


def test_an_implicit_text_prompt_ends_with_a_whole_word_on_both_sides():
    # "The sky is b|lue" and "The sky is b|lack" part inside a word; "The sky" ends where "The sky is" goes on.
    assert parts(chosen="The sky is blue.", rejected="The sky is black.")[0] == [user("The sky is")]
    assert parts(chosen="The sky", rejected="The sky is green.") == ([user("The")], [" sky"], [" sky is green."])


@given(st.text(), st.text())
def test_an_implicit_text_prompt_loses_nothing(chosen: str, rejected: str):
    try:
        messages, (better,), (worse,) = parts(chosen=chosen, rejected=rejected)
    except Unusable:
        return
    assert messages[0]["content"] + better == chosen
    assert messages[0]["content"] + worse == rejected


def test_prompts_alone_and_one_sided_rows_are_prompts_too():
    assert parts(prompt=[user(SKY)]) == ([user(SKY)], [], [])
    assert parts(prompt=SKY, chosen="Blue.") == ([user(SKY)], ["Blue."], [])
    assert parts(prompt=SKY, rejected=[assistant("Green.")]) == ([user(SKY)], [], ["Green."])
    assert parts(chosen=[user(SKY), assistant("Blue.")]) == ([user(SKY)], ["Blue."], [])


def test_longer_conversations_keep_their_turns():
    before = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello."), user(SKY)]
    given_ = {"chosen": [*before, assistant("Blue.")], "rejected": [*before, assistant("Green.")]}
    assert parts(**given_) == (before, ["Blue."], ["Green."])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "missing_field"),
        ({"question": SKY}, "missing_field"),
        ({"prompt": 7}, "wrong_type"),
        ({"prompt": [user(SKY), assistant("Blue.")]}, "last_not_user"),
        ({"prompt": SKY, "chosen": [assistant("Blue.")], "rejected": "Green."}, "wrong_type"),
        ({"prompt": SKY, "chosen": "", "rejected": "Green."}, "empty_response"),
        ({"chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]}, "no_prompt"),
        ({"chosen": [user(SKY), assistant("Blue.")], "rejected": [user("Why?"), assistant("Green.")]}, "parted_early"),
        ({"prompt": SKY, "chosen": [user(SKY), assistant("Blue.")], "rejected": [assistant("Green.")]}, "parted_early"),
        ({"prompt": SKY, "chosen": [assistant("Blue."), assistant("!")]}, "prompt_mismatch"),
        ({"prompt": "Why?", "chosen": [user(SKY), assistant("Blue.")]}, "prompt_mismatch"),
        ({"prompt": [user("Why?")], "chosen": [user(SKY), assistant("Blue.")]}, "prompt_mismatch"),
        ({"chosen": [user(SKY)], "rejected": [user(SKY)]}, "last_not_assistant"),
        ({"chosen": [], "rejected": [user(SKY)]}, "empty_turn"),
        ({"chosen": "Blue.", "rejected": "Green."}, "no_prompt"),
        ({"chosen": "Blue."}, "missing_field"),
        ({"chosen": "Blue.", "rejected": 7}, "wrong_type"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is blue."}, "same_response"),
        ({"prompt": SKY, "chosen": [assistant("Blue.")], "rejected": [assistant("Blue.")]}, "same_response"),
        ({"prompt": "\n\nHuman: Assistant: x\n\nAssistant:"}, "stray_marker"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "parted_early"),
    ],
)
def test_rows_in_no_format_are_refused(fields, expected):
    with pytest.raises(Unusable) as caught:
        trl_row(fields, PLACE)
    assert caught.value.reason == expected


def test_json_lines_and_parquet_say_the_same(tmp_path: Path):
    rows = [
        {"prompt": [user(f"Question {i}")], "chosen": [assistant("a")], "rejected": [assistant("b")]} for i in range(3)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    read = {
        suffix: list(read_source(Prepare(source="trl", path=str(tmp_path / f"data{suffix}")), Meter()))
        for suffix in (".jsonl", ".parquet")
    }
    assert [(r.messages, r.chosen, r.rejected) for r in read[".jsonl"] if isinstance(r, Row)] == [
        (r.messages, r.chosen, r.rejected) for r in read[".parquet"] if isinstance(r, Row)
    ]
    assert len(read[".parquet"]) == 3
