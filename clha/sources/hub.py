"""Hub and local datasets through the library `datasets`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clha.errors import UserError
from clha.sources.chat_jsonl import chat_row
from clha.sources.hh_rlhf import hh_row, is_dialogue
from clha.sources.lines import Meter
from clha.sources.rows import Place, Row
from clha.sources.trl import trl_row

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def dataset_row(fields: Mapping[str, Any], place: Place) -> Row:
    """A row of a dataset by its columns: TRL's formats, HH dialogues, or those of chat JSONL. Raises Unusable."""
    sides = (fields.get("chosen"), fields.get("rejected"))
    if fields.get("messages") is None or fields.get("prompt") is not None:
        return trl_row(fields, place)
    if any(isinstance(side, list) and side and isinstance(side[0], Mapping) for side in sides):
        return trl_row(fields, place)
    return hh_row(fields, place) if any(map(is_dialogue, sides)) else chat_row(fields, place)


def hub_rows(
    name: str, folder: str | None, commit: str, configuration: str | None, split: str, meter: Meter
) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of one split of a Hub dataset, by way of the cache of `datasets`.

    Raises UserError when it cannot be loaded.
    """
    from datasets import load_dataset

    with _explained(f"prepare.path hub:{name}"):
        data = load_dataset(name, configuration, data_dir=folder, revision=commit, split=split)
    yield from _numbered(data, meter)


def local_rows(path: Path, split: str, meter: Meter) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a file, a folder of files, or a folder written by `save_to_disk`; streamed.

    Raises UserError when it cannot be loaded.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    with _explained(f"prepare.path {path}"):
        if path.is_dir() and any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
            data = load_from_disk(str(path))
            if isinstance(data, DatasetDict):
                if split not in data:
                    raise ValueError(f"no split {split!r}, there are {', '.join(data)}; set prepare.hub_split")
                data = data[split]
        elif path.is_dir():
            data = load_dataset(str(path), split=split, streaming=True)
        else:
            data = load_dataset(_builder(path), data_files=str(path), split="train", streaming=True)
        yield from _numbered(data, meter)


def _builder(path: Path) -> str:
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst", ".bz2", ".xz")), "")
    if suffix not in _BUILDERS:
        raise ValueError(f"a file must end with {', '.join(_BUILDERS)} (or .gz behind it)")
    return _BUILDERS[suffix]


def _numbered(data: Any, meter: Meter) -> Iterator[tuple[int, Any]]:
    meter.unit = "rows"
    if hasattr(data, "__len__"):
        meter.total += len(data)
    for number, row in enumerate(data, 1):
        meter.done += 1
        yield number, row


class _explained:
    """Turns whatever `datasets` raises into one line; it raises about everything there is."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise UserError(
                f"{self.where}: `datasets` cannot load it ({reason}); check name, revision, prepare.subset and "
                "prepare.hub_split, and the network for what is not cached"
            ) from error
