"""What a path means: one file, a folder, several of them; and which subset its rows belong to."""

import json
from pathlib import Path

import pytest

from clha.config import Prepare
from clha.errors import UserError
from clha.sources.lines import Meter
from clha.sources.reading import read_source
from clha.sources.rows import BadRow, Row


def prompt(text: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n"


def hh(text: str) -> str:
    start = f"\n\nHuman: {text}\n\nAssistant: "
    return json.dumps({"chosen": start + "a", "rejected": start + "b"}) + "\n"


def read(path: Path | list[str], source: str = "chat_jsonl", **settings: str) -> list[tuple[str, str, str]]:
    paths = path if isinstance(path, list) else str(path)
    prepare = Prepare.model_validate({"source": source, "path": paths, **settings})
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
