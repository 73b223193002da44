"""Lines and rows of files, one at a time: JSON lines (plain or gzip), Parquet."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from clha.errors import UserError
from clha.sources.rows import Unusable

MAX_LINE_BYTES = 1 << 26  # a file without line ends must not fill the memory
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"


@dataclass
class Meter:
    """How far reading is, in bytes of the source files or in rows of a dataset; readers move it on."""

    done: int = 0
    total: int = 0
    unit: str = "bytes"


def json_lines(file: Path, meter: Meter) -> Iterator[tuple[int, Any | Unusable]]:
    """(line number from 1, its JSON value or why it has none); blank lines are passed over.

    Raises UserError when the file cannot be read or its gzip stream is damaged.
    """
    number = 0
    try:
        with open(file, "rb") as raw:
            before = meter.done
            lines = _unpacked(raw)
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                meter.done = before + raw.tell()
                if number == 1:
                    line = line.removeprefix(_BOM)
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    _skip_line(lines, line)
                    yield number, Unusable("line_too_long", f"the line has more than {MAX_LINE_BYTES >> 20} MiB")
                elif line.strip():
                    yield number, _json_value(line)
            meter.done = before + file.stat().st_size
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{file}: cannot be read after line {number} ({reason}); fetch the file again or check its permissions"
        ) from None


def parquet_rows(file: Path, meter: Meter) -> Iterator[tuple[int, Any | Unusable]]:
    """(row number from 1, the row as a dict or why it has none). Raises UserError when the file is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, before, size = 0, meter.done, file.stat().st_size
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=1000):
                for i in range(batch.num_rows):
                    number += 1
                    yield number, _parquet_row(batch, i)
                meter.done = before + size * number // max(1, parquet.metadata.num_rows)
            meter.done = before + size
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: not a readable Parquet file ({reason}); fetch or write it again") from None


def _unpacked(raw: BinaryIO) -> BinaryIO:
    packed = raw.read(2) == _GZIP
    raw.seek(0)
    return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)) if packed else raw


def _skip_line(lines: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = lines.readline(MAX_LINE_BYTES)


def _json_value(line: bytes) -> Any | Unusable:
    try:
        return json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Unusable("invalid_utf8", f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return Unusable("malformed_json", f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        return Unusable("malformed_json", f"not usable JSON: {error}")


def _parquet_row(batch: Any, i: int) -> Any | Unusable:
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return Unusable("invalid_utf8", f"not UTF-8 at byte {error.start}")
