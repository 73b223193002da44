"""Reads what `prepare.source` and `prepare.path` name, row by row."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clha.errors import UserError
from clha.settings import Prepare
from clha.sources import hub
from clha.sources.chat_jsonl import chat_row
from clha.sources.files import hub_commit, hub_reference, local_files, source_paths
from clha.sources.hh_rlhf import hh_row
from clha.sources.lines import Meter, json_lines, parquet_rows
from clha.sources.rows import BadRow, Place, Row, Unusable
from clha.sources.trl import trl_row

Convert = Callable[[Mapping[str, Any], Place], Row]

_CONVERT: dict[str, Convert] = {
    "hh_rlhf": hh_row,
    "chat_jsonl": chat_row,
    "trl": trl_row,
    "datasets": hub.dataset_row,
}
_ROW_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_TRL_SUFFIXES = (*_ROW_SUFFIXES, ".parquet")


def read_source(prepare: Prepare, meter: Meter) -> Iterator[Row | BadRow]:
    """The rows of all places of a source, in order; each is in memory only while it is handed on.

    `meter` is moved on while reading. Raises UserError when a place cannot be read.
    """
    places = source_paths(prepare)
    if prepare.source != "datasets":
        files = [(file, name) for path in places for file, name in _files(prepare, path)]
        meter.total = sum(file.stat().st_size for file, _ in files)
        for file, name in files:
            yield from _file_rows(prepare, file, name, meter)
        return
    for path in places:
        if path.startswith("hub:"):
            yield from _hub_rows(prepare, path, meter)
        else:
            local_files(path)  # says so when there is nothing
            place = Path(path)
            subset = prepare.subset or _stem(place.name)
            yield from _converted(prepare, hub.local_rows(place, prepare.hub_split, meter), place.name, subset, "row")


def _files(prepare: Prepare, path: str) -> list[tuple[Path, str]]:
    """The files of one place and their names below it; in a folder, those that the reader can read."""
    if path.startswith("hub:"):
        raise UserError(
            f"prepare.path {path}: prepare.source={prepare.source} reads files; set prepare.source=datasets"
        )
    root, files = Path(path), local_files(path)
    if root.is_file():
        return [(root, root.name)]
    suffixes = _TRL_SUFFIXES if prepare.source == "trl" else _ROW_SUFFIXES
    named = [(file, file.relative_to(root).as_posix()) for file in files if file.name.endswith(suffixes)]
    if not named:
        raise UserError(f"prepare.path {root}: no file that ends with {', '.join(suffixes)}; give a file or folder")
    return named


def _file_rows(prepare: Prepare, file: Path, name: str, meter: Meter) -> Iterator[Row | BadRow]:
    # Of the files in a folder, those of one subfolder make one subset ("harmless-base/test.jsonl.gz").
    subset = prepare.subset or (name.split("/")[0] if "/" in name else _stem(name))
    parquet = prepare.source == "trl" and file.suffix == ".parquet"
    rows = (parquet_rows if parquet else json_lines)(file, meter)
    yield from _converted(prepare, rows, name, subset, "row" if parquet else "line")


def _hub_rows(prepare: Prepare, path: str, meter: Meter) -> Iterator[Row | BadRow]:
    name, folder, revision = hub_reference(path, prepare.revision)
    commit = hub_commit(name, revision)
    rows = hub.hub_rows(name, folder, commit, prepare.subset, prepare.hub_split, meter)
    subset = prepare.subset or folder or name.split("/")[1]
    yield from _converted(prepare, rows, path.split("@")[0], subset, "row")


def _converted(
    prepare: Prepare, rows: Iterator[tuple[int, Any | Unusable]], source: str, subset: str, unit: str
) -> Iterator[Row | BadRow]:
    convert = _CONVERT[prepare.source]
    for number, fields in rows:
        place = Place(source, f"{unit} {number}", subset)
        try:
            if isinstance(fields, Unusable):
                raise fields
            if not isinstance(fields, Mapping):
                raise Unusable("not_an_object", "not a JSON object")
            yield convert(fields, place)
        except Unusable as problem:
            yield problem.at(place)


def _stem(name: str) -> str:
    return name.split(".")[0] or name
