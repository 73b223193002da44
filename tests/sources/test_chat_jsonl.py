"""Chat JSONL is read as it was written."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clha.settings import Prepare
from clha.sources.chat_jsonl import chat_row
from clha.sources.lines import Meter
from clha.sources.reading import read_source
from clha.sources.rows import BadRow, Place, Row, Unusable

PLACE = Place("pairs.jsonl", "line 1", "pairs")
USER = [{"role": "user", "content": "Hello"}]


def write(folder: Path, *rows: object) -> Prepare:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return Prepare(source="chat_jsonl", path=str(file))


def test_responses_may_be_one_or_several_or_none(tmp_path: Path):
    rows = list(
        read_source(
            write(
                tmp_path,
                {"messages": USER, "chosen": "a", "rejected": ["b", "c"], "subset": "greetings", "id": 7},
                {"messages": USER, "chosen": None, "rejected": []},
                {"messages": USER},
            ),
            Meter(),
        )
    )
    assert rows == [
        Row(USER, ["a"], ["b", "c"], "data.jsonl", "greetings"),
        Row(USER, [], [], "data.jsonl", "data"),
        Row(USER, [], [], "data.jsonl", "data"),
    ]


def test_a_bad_line_is_quarantined_under_its_number(tmp_path: Path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n{"messages": [\n[]\n')
    good, *bad = read_source(Prepare(source="chat_jsonl", path=str(file)), Meter())
    assert isinstance(good, Row)
    assert [(b.reason, b.detail.split(":")[0]) for b in bad if isinstance(b, BadRow)] == [
        ("malformed_json", "data.jsonl line 2"),
        ("not_an_object", "data.jsonl line 3"),
    ]


def test_a_lone_surrogate_in_json_is_quarantined(tmp_path: Path):
    (bad,) = read_source(write(tmp_path, {"messages": [{"role": "user", "content": "\ud800"}]}), Meter())
    assert isinstance(bad, BadRow) and bad.reason == "invalid_unicode"


def test_responses_given_as_messages_point_to_the_reader_that_takes_them():
    with pytest.raises(Unusable, match=r"prepare\.source=trl") as caught:
        chat_row({"messages": USER, "chosen": [{"role": "assistant", "content": "a"}]}, PLACE)
    assert caught.value.reason == "wrong_type"


TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda t: t.strip())


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=5), st.lists(TEXT, max_size=3), st.lists(TEXT, max_size=3), TEXT)
def test_any_text_goes_through_unchanged(turns: list[str], chosen: list[str], rejected: list[str], subset: str):
    turns = turns[: len(turns) - 1 + len(turns) % 2]  # an odd number: the user speaks last
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    rejected = [r for r in dict.fromkeys(rejected) if r not in chosen]
    with tempfile.TemporaryDirectory() as folder:
        fields = {"messages": messages, "chosen": chosen, "rejected": rejected, "subset": subset}
        (row,) = read_source(write(Path(folder), fields), Meter())
    assert row == Row(messages, list(dict.fromkeys(chosen)), rejected, "data.jsonl", subset)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["messages", "chosen", "rejected", "subset", "role", "content"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(JSON, min_size=1, max_size=4))
def test_no_json_crashes_the_reader(values: list[object]):
    with tempfile.TemporaryDirectory() as folder:
        rows = list(read_source(write(Path(folder), *values), Meter()))
    assert len(rows) == len(values)
