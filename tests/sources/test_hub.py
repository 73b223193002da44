"""Datasets through the library `datasets`: local files, folders, saved datasets, the cache of the Hub."""

import json
from pathlib import Path

import pytest

from clha.errors import UserError
from clha.settings import Prepare
from clha.sources.lines import Meter
from clha.sources.reading import read_source
from clha.sources.rows import BadRow, Row

USER = [{"role": "user", "content": "What colour is the sky?"}]
BLUE, GREEN = [{"role": "assistant", "content": "Blue."}], [{"role": "assistant", "content": "Green."}]
HH = "\n\nHuman: What colour is the sky?\n\nAssistant: "
FORMATS = {
    "explicit": {"prompt": USER, "chosen": BLUE, "rejected": GREEN},
    "implicit": {"chosen": USER + BLUE, "rejected": USER + GREEN},
    "hh": {"chosen": HH + "Blue.", "rejected": HH + "Green."},
    "chat": {"messages": USER, "chosen": "Blue.", "rejected": "Green."},
}


def read(path: Path, **settings: str) -> list[Row | BadRow]:
    return list(read_source(Prepare(source="datasets", path=str(path), **settings), Meter()))


def assert_sky(rows: list[Row | BadRow], subset: str) -> None:
    (row,) = rows
    assert isinstance(row, Row), row
    assert (row.messages, row.chosen, row.rejected, row.subset) == (USER, ["Blue."], ["Green."], subset)


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_of_a_local_file_is_known_by_its_columns(tmp_path: Path, name: str):
    (tmp_path / "sky.jsonl").write_text(json.dumps(FORMATS[name]) + "\n")
    assert_sky(read(tmp_path / "sky.jsonl"), "sky")


@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_dataset_is_read(tmp_path: Path, name: str):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([FORMATS[name]])}).save_to_disk(tmp_path / "sky")
    assert_sky(read(tmp_path / "sky", subset="colours"), "colours")
    with pytest.raises(UserError, match="no split 'validation', there are train; set prepare.hub_split"):
        read(tmp_path / "sky", hub_split="validation")


def test_a_folder_of_parquet_files_is_read_by_split(tmp_path: Path):
    from datasets import Dataset

    (tmp_path / "sky").mkdir()
    Dataset.from_list([FORMATS["explicit"]]).to_parquet(tmp_path / "sky" / "test-00000.parquet")
    Dataset.from_list([FORMATS["explicit"]] * 3).to_parquet(tmp_path / "sky" / "train-00000.parquet")
    assert_sky(read(tmp_path / "sky", hub_split="test"), "sky")
    assert len(read(tmp_path / "sky")) == 3


def test_rows_that_cannot_be_used_are_quarantined_by_number(tmp_path: Path):
    rows = [FORMATS["explicit"], {**FORMATS["explicit"], "rejected": BLUE}]
    (tmp_path / "sky.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    _, bad = read(tmp_path / "sky.jsonl")
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.detail.split(":")[0]) == ("same_response", "sky.jsonl row 2")


@pytest.mark.parametrize(
    ("name", "content"),
    [("sky.parquet", b"PAR1 no PAR1"), ("sky.jsonl", b'{"a": '), ("sky.txt", b"hello"), ("sky.arrow", b"")],
)
def test_what_datasets_cannot_load_is_one_line(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="`datasets` cannot load it") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_hub_dataset_that_is_not_cached_is_one_line():
    commit = "0123456789" * 4
    with pytest.raises(UserError, match="hub:nobody/nothing: `datasets` cannot load it") as caught:
        list(read_source(Prepare(source="datasets", path=f"hub:nobody/nothing@{commit}"), Meter()))
    assert "\n" not in str(caught.value)
