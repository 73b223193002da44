"""All rows of a dataset looked at before the first step: Arrow columns, a few thousand rows at a time.

What is found are rows to read more closely: reading says what is wrong with them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clha.training.limits import Limits

_ROWS_AT_ONCE = 5000


@dataclass
class Found:
    """What was seen of the preferences form."""

    max_candidates: int = 0
    doubtful: list[int] = field(default_factory=list)  # rows
    widest_gap: float | None = None  # between the best and the worst reward of a row without pair_weights
    weighed: bool = False  # whether there is a pair weight above 0


def look_at_preferences(dataset: Any, limits: Limits, max_length: int | None) -> Found | None:
    """None where the columns are not Arrow lists: then rows are checked when they are read."""
    names = ("prompt_token_ids", "response_token_ids", "rewards", "pair_weights", "sft_index", "sft_lambda")
    if not _in_arrow(dataset):
        return None
    found = Found()
    for start, batch in _batches(dataset, names):
        columns = {name: _column(batch, name) for name in batch.column_names}
        if not all(_is_list(columns[name].type) for name in names[:3]):
            return None
        if not _is_list(columns["response_token_ids"].type.value_type):
            return None
        bad = _doubtful(columns, limits, max_length, found)
        found.doubtful += (start + np.flatnonzero(bad)).tolist()
    return found


def look_at_pairs(dataset: Any) -> list[int]:
    """Rows of which chosen or rejected is missing or empty, or has more messages than the other."""
    doubtful: list[int] = []
    if not _in_arrow(dataset):
        return doubtful
    for start, batch in _batches(dataset, ("chosen", "rejected")):
        bad = np.zeros(len(batch), dtype=bool)
        sizes = []
        for name in batch.column_names:
            column = _column(batch, name)
            if _is_list(column.type):
                sizes.append(_lengths(column))
                bad |= (sizes[0] == 0) | (sizes[-1] != sizes[0])
            elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                bad |= _numpy(pc.binary_length(column), 0) == 0
            else:
                bad |= column.is_null().to_numpy(zero_copy_only=False)
        doubtful += (start + np.flatnonzero(bad)).tolist()
    return doubtful


def _doubtful(columns: dict[str, pa.Array], limits: Limits, max_length: int | None, found: Found) -> np.ndarray:
    """[rows] bool; what else is seen goes to `found`."""
    responses, rewards = columns["response_token_ids"], columns["rewards"]
    n = _lengths(responses)
    found.max_candidates = max(found.max_candidates, int(n.max(initial=0)))
    row = np.repeat(np.arange(len(n)), n)  # of each response
    bad = (n == 0) | (_lengths(rewards) != n)

    def mark(rows: np.ndarray, wrong: np.ndarray) -> None:
        bad[rows[wrong]] = True

    each = responses.flatten()
    size, prompt_size = _lengths(each), _lengths(columns["prompt_token_ids"])
    mark(row, size == 0)
    bad |= prompt_size == 0
    for ids, of_row in (
        (each.flatten(), lambda: np.repeat(row, size)),
        (columns["prompt_token_ids"].flatten(), lambda: np.repeat(np.arange(len(n)), prompt_size)),
    ):
        bad |= _outside(ids, limits.vocabulary, of_row, len(n))
    if limits.positions is not None and max_length is None:
        mark(row, prompt_size[row] + size - 1 > limits.positions)

    values = _numpy(rewards.flatten(), np.nan)
    of_reward = np.repeat(np.arange(len(n)), _lengths(rewards))
    mark(of_reward, ~np.isfinite(values))
    given = _is_given(columns, "pair_weights")
    together = of_reward[1:] == of_reward[:-1]
    mark(of_reward[1:], together & (np.diff(values) > 0) & ~given[of_reward[1:]])
    ends = np.flatnonzero(np.append(~together, True)) if len(values) else np.zeros(0, dtype=int)
    firsts = np.append(0, ends[:-1] + 1) if len(values) else ends
    ruled = ~given[of_reward[firsts]]
    if ruled.any():
        with np.errstate(invalid="ignore"):  # infinities are told of when their row is read
            gaps = (values[firsts] - values[ends])[ruled]
        found.widest_gap = float(np.nanmax(gaps, initial=found.widest_gap or 0.0))
    if given.any():
        weights = columns["pair_weights"]
        if not (_is_list(weights.type) and _is_list(weights.type.value_type)):
            found.weighed = True  # not looked at: nothing can be said of them before rows are read
        else:
            bad |= given & (_lengths(weights) != n)
            inner = weights.flatten()
            of_weights = np.repeat(np.arange(len(n)), _lengths(weights))
            mark(of_weights, _lengths(inner) != n[of_weights])
            numbers = _numpy(inner.flatten(), np.nan)
            mark(np.repeat(of_weights, _lengths(inner)), ~(np.isfinite(numbers) & (numbers >= 0)))
            found.weighed |= bool((numbers > 0).any())
    for name, top in (("sft_index", n - 1), ("sft_lambda", np.ones(len(n)))):
        if (known := _is_given(columns, name)).any() and _is_number(columns[name].type):
            numbers = _numpy(columns[name], 0)
            bad |= known & ~((numbers >= 0) & (numbers <= top))
    return bad


def _outside(ids: pa.Array, vocabulary: int | None, of_row: Callable[[], np.ndarray], rows: int) -> np.ndarray:
    """[rows] bool: rows with what is no token id."""
    bad = np.zeros(rows, dtype=bool)
    if len(ids) and not pa.types.is_integer(ids.type):
        return ~bad
    values = _numpy(ids, -1)
    largest = np.iinfo(np.int32).max if vocabulary is None else vocabulary - 1
    if len(values) and (values.min() < 0 or values.max() > largest):
        bad[of_row()[(values < 0) | (values > largest)]] = True
    return bad


def _batches(dataset: Any, names: tuple[str, ...]) -> Iterator[tuple[int, pa.Table]]:
    """(first row, table) of a `datasets.Dataset`."""
    columns = [name for name in names if name in dataset.column_names]
    start = 0
    for table in dataset.with_format("arrow", columns=columns).iter(batch_size=_ROWS_AT_ONCE):
        yield start, table
        start += len(table)


def _in_arrow(dataset: Any) -> bool:
    """Whether a dataset lies in Arrow tables: not what only looks like one, or makes its rows when they are read."""
    return hasattr(dataset, "with_format") and getattr(dataset, "format", {}).get("type") != "custom"


def _column(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece, as the lists that an extension type, as `datasets.Array2D`, keeps it in."""
    column = table.column(name).combine_chunks()
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_given(columns: dict[str, pa.Array], name: str) -> np.ndarray:
    rows = len(columns["rewards"])
    return columns[name].is_valid().to_numpy(zero_copy_only=False) if name in columns else np.zeros(rows, dtype=bool)


def _lengths(lists: pa.Array) -> np.ndarray:
    """How long each list is, 0 where it is missing."""
    return _numpy(pc.list_value_length(lists), 0).astype(np.int64)


def _numpy(values: pa.Array, missing: float) -> np.ndarray:
    if pa.types.is_null(values.type):
        return np.full(len(values), missing)
    if values.null_count:
        whole = pa.types.is_integer(values.type) and np.isfinite(missing)
        values = pc.fill_null(values.cast(pa.int64() if whole else pa.float64()), missing)
    return values.to_numpy(zero_copy_only=False)
