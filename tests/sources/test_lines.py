"""Lines are read one at a time; what is wrong with one is said with its number."""

import gzip
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clha.errors import UserError
from clha.sources import lines
from clha.sources.lines import Meter, json_lines, parquet_rows
from clha.sources.rows import Unusable


def read(file: Path) -> list[tuple[int, object]]:
    """(line number, value, or the reason why there is none)."""
    return [(n, v.reason if isinstance(v, Unusable) else v) for n, v in json_lines(file, Meter())]


def test_blank_lines_count_but_are_no_rows(tmp_path: Path):
    (tmp_path / "a").write_bytes(b'{"a": 1}\n\n  \r\n[2]\r\n3')
    assert read(tmp_path / "a") == [(1, {"a": 1}), (4, [2]), (5, 3)]


def test_a_gzip_file_is_known_by_its_content_not_its_name(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b"1\n2\n"))
    assert read(tmp_path / "a.jsonl") == [(1, 1), (2, 2)]


def test_a_byte_order_mark_is_passed_over(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf1\n")
    assert read(tmp_path / "a") == [(1, 1)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "malformed_json"),
        (b"{'a': 1}", "malformed_json"),
        (b"1 2", "malformed_json"),
        (b"[" * 100_000, "malformed_json"),
        (b"9" * 5000, "malformed_json"),
        (b'"\xff"', "invalid_utf8"),
        (b'"\xed\xa0\x80"', "invalid_utf8"),  # a surrogate written as bytes
    ],
)
def test_a_bad_line_keeps_its_number_and_the_next_one_is_read(tmp_path: Path, line: bytes, reason: str):
    (tmp_path / "a").write_bytes(b"1\n" + line + b"\n3\n")
    assert read(tmp_path / "a") == [(1, 1), (2, reason), (3, 3)]


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    (tmp_path / "a").write_bytes(b'"12345678"\n' + b"x" * 95 + b"\n3\n" + b"y" * 40)
    assert read(tmp_path / "a") == [(1, "12345678"), (2, "line_too_long"), (3, 3), (4, "line_too_long")]


@pytest.mark.parametrize("cut", [3, 12, -4])
def test_a_damaged_gzip_file_is_one_clear_line(tmp_path: Path, cut: int):
    whole = gzip.compress("".join(f"{i}\n" for i in range(1000)).encode())
    (tmp_path / "a.gz").write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"a\.gz: cannot be read after line \d+ .*fetch the file again") as caught:
        read(tmp_path / "a.gz")
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(), st.binary().map(gzip.compress), st.binary().map(lambda b: b"\x1f\x8b" + b)))
def test_no_bytes_crash_the_reader(data: bytes):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "f"
        file.write_bytes(data)
        try:
            read(file)
        except UserError as error:
            assert data.startswith(b"\x1f\x8b") and "\n" not in str(error)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text()))
def test_any_text_is_read_as_it_was_written(texts: list[str]):
    # json escapes lone surrogates, which hypothesis makes too: they are somebody else's to refuse.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "f"
        file.write_text("".join(json.dumps(t) + "\n" for t in texts), encoding="utf-8")
        assert [v for _, v in read(file)] == texts


def test_the_meter_ends_at_the_size_of_all_files(tmp_path: Path):
    meter = Meter()
    for name, data in (("a", b"1\n2\n"), ("b", gzip.compress(b"3\n" * 5000))):
        (tmp_path / name).write_bytes(data)
        list(json_lines(tmp_path / name, meter))
    pq.write_table(pa.table({"a": list(range(5000))}), tmp_path / "c")
    list(parquet_rows(tmp_path / "c", meter))
    assert meter.done == sum((tmp_path / n).stat().st_size for n in "abc")


def test_parquet_rows_are_numbered_dicts(tmp_path: Path):
    table = pa.table({"a": ["x", None], "m": [[{"role": "user", "content": "y"}], []]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = list(parquet_rows(tmp_path / "a.parquet", Meter()))
    assert rows == [(1, {"a": "x", "m": [{"role": "user", "content": "y"}]}), (2, {"a": None, "m": []})]


def test_a_parquet_string_that_is_not_utf8_spoils_its_row_only(tmp_path: Path):
    raw = pa.array([b"ok", b"\xff\xfe", b"ok too"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    rows = [(n, v.reason if isinstance(v, Unusable) else v) for n, v in parquet_rows(tmp_path / "a.parquet", Meter())]
    assert rows == [(1, {"prompt": "ok"}), (2, "invalid_utf8"), (3, {"prompt": "ok too"})]


@settings(max_examples=50, deadline=None)
@given(st.binary(), st.booleans())
def test_no_bytes_crash_the_parquet_reader(data: bytes, framed: bool):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "f.parquet"
        file.write_bytes(b"PAR1" + data + b"PAR1" if framed else data)
        with pytest.raises(UserError, match="not a readable Parquet file"):
            list(parquet_rows(file, Meter()))
