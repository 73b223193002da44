"""What a path means: one file, a folder, several of them; and which subset its rows belong to."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clha.errors import UserError
from clha.settings import Prepare
from clha.sources.chat_jsonl import chat_row
from clha.sources.hh_rlhf import hh_row
from clha.sources.hub import dataset_row
from clha.sources.lines import Meter
from clha.sources.reading import Convert, read_source
from clha.sources.rows import BadRow, Place, Row, Unusable
from clha.sources.trl import trl_row


def prompt(text: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n"


def hh(text: str) -> str:
    start = f"\n\nHuman: {text}\n\nAssistant: "
    return json.dumps({"chosen": start + "a", "rejected": start + "b"}) + "\n"


def read(path: Path | list[str], source: str = "chat_jsonl", **more: str) -> list[tuple[str, str, str]]:
    paths = path if isinstance(path, list) else str(path)
    prepare = Prepare.model_validate({"source": source, "path": paths, **more})
    rows = list(read_source(prepare, Meter()))
    return [(r.messages[0]["content"], r.source, r.subset) for r in rows if isinstance(r, Row)]


def test_places_are_read_in_the_order_given_and_files_of_a_folder_sorted(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for name in ("data/b.jsonl", "data/a.jsonl", "z.jsonl"):
        (tmp_path / name).write_text(prompt(name))
    texts = [r[0] for r in read([str(tmp_path / "z.jsonl"), str(tmp_path / "data")])]
    assert texts == ["z.jsonl", "data/a.jsonl", "data/b.jsonl"]


def test_in_a_folder_only_files_the_reader_knows_are_read(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text(prompt("a"))
    (tmp_path / "README.md").write_text("# no JSON")
    assert [r[0] for r in read(tmp_path)] == ["a"]
    (tmp_path / "pairs.jsonl").unlink()
    with pytest.raises(UserError, match=r"no file that ends with \.jsonl"):
        read(tmp_path)


def test_a_file_named_outright_is_read_whatever_its_name(tmp_path: Path):
    (tmp_path / "notes.txt").write_text(prompt("a"))
    assert read(tmp_path / "notes.txt") == [("a", "notes.txt", "notes")]


def test_a_subfolder_is_a_subset_and_the_setting_goes_before_it(tmp_path: Path):
    for name in ("harmless-base", "helpful-base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(hh(name))
    assert read(tmp_path, "hh_rlhf") == [
        ("harmless-base", "harmless-base/test.jsonl", "harmless-base"),
        ("helpful-base", "helpful-base/test.jsonl", "helpful-base"),
    ]
    assert {r[2] for r in read(tmp_path, "hh_rlhf", subset="both")} == {"both"}


def test_a_reader_of_files_refuses_the_hub_before_it_reads_anything():
    with pytest.raises(UserError, match="set prepare.source=datasets"):
        read(["hub:Anthropic/hh-rlhf"], "hh_rlhf")


@pytest.mark.parametrize("source", ["hh_rlhf", "chat_jsonl", "trl"])
def test_another_format_is_quarantined_not_misread(tmp_path: Path, source: str):
    (tmp_path / "data.jsonl").write_text('{"instruction": "x", "output": "y"}\n')
    (bad,) = read_source(Prepare.model_validate({"source": source, "path": str(tmp_path / "data.jsonl")}), Meter())
    assert isinstance(bad, BadRow) and bad.reason == "missing_field"


def test_reading_moves_the_meter_to_its_end(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(prompt("a") * 100)
    meter = Meter()
    list(read_source(Prepare(source="chat_jsonl", path=str(tmp_path)), meter))
    assert meter.done == meter.total == (tmp_path / "a.jsonl").stat().st_size


HALF = st.sampled_from(["", " ", "\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b", "\ud800", "a b", "a c"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | HALF | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content"]), inner, min_size=2)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=10,
)
FIELDS = st.dictionaries(st.sampled_from(["messages", "prompt", "chosen", "rejected", "subset"]), VALUE)


@pytest.mark.parametrize("convert", [hh_row, chat_row, trl_row, dataset_row])
@settings(max_examples=400, deadline=None)
@given(fields=FIELDS)
def test_whatever_a_row_holds_it_is_usable_or_refused(convert: Convert, fields: dict[str, object]):
    try:
        row = convert(fields, Place("f", "line 1", "s"))
    except Unusable as problem:
        problem.at(Place("f", "line 1", "s")).detail.encode()
        return
    assert row.messages[-1]["role"] == "user"
    texts = [m["content"] for m in row.messages] + row.chosen + row.rejected
    assert all(text.strip() and text.encode() for text in texts)
    row.subset.encode()
