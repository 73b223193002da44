"""Weights of pairs that the user gives: `rescore.noise.method: from_column`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clha.errors import UserError
from clha.rewards.weighing import RewardTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class GivenWeights:
    """Weights of pairs (better, worse), found by prompt and candidates; pairs that are not named weigh 0."""

    keys: Ints  # sorted
    weights: Floats

    @classmethod
    def read(cls, path: Path, column: str, table: RewardTable) -> "GivenWeights":
        """Read a Parquet file: prompt_id, better, worse (candidate ids), `column` (a number of at least 0).

        Rows of prompts that the run does not have, and of candidates whose rewards went to quarantine, are left out.
        Raises UserError for anything else that cannot be a weight of two candidates, and where no row is left.
        """
        where = f"weigh: rescore.noise.file {path}"
        try:
            rows = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{where}: no readable Parquet file ({str(error).splitlines()[0]})") from None
        _check_columns(rows, column, where)
        codes = pc.index_in(rows["prompt_id"].cast(pa.string()), value_set=table.prompt_ids.cast(pa.string()))
        known = pc.is_valid(codes)
        if not pc.any(known).as_py():
            what = "names no prompt of this run that has rewards" if rows.num_rows else "has no rows"
            raise UserError(
                f"{where}: {what}, so that every pair would weigh 0; prompt ids are those of the table prompts"
            )
        rows, code = rows.filter(known), codes.filter(known).to_numpy().astype(np.int64)
        weights = _stored(rows, column, where)
        sides = {name: rows[name].cast(pa.int64(), safe=False).to_numpy() for name in ("better", "worse")}
        same = sides["better"] == sides["worse"]
        if same.any():
            bad = int(np.flatnonzero(same)[0])
            raise UserError(f"{where}: a candidate is better than itself ({_named(rows, bad)}); take such rows out")
        kept = np.ones(len(code), dtype=bool)
        for name, ids in sides.items():
            scored, lost = table.has(code, ids)
            strange = ~scored & ~lost
            if strange.any():
                bad = int(np.flatnonzero(strange)[0])
                raise UserError(
                    f"{where}: column `{name}` names a candidate that its prompt does not have ({_named(rows, bad)}); "
                    "candidate ids are those of the table candidates"
                )
            kept &= scored
        keys = _pair_keys(code, sides["better"], sides["worse"])
        if len(np.unique(keys)) < len(keys):
            raise UserError(f"{where}: names a pair twice; one row for each pair (prompt_id, better, worse)")
        if not kept.any():
            raise UserError(f"{where}: each pair that it names has a candidate in score's quarantine; see its reasons")
        keys, weights = keys[kept], weights[kept]
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], weights[order])

    def of(self, prompt: Ints, candidates: NDArray[np.int32]) -> Floats:
        """[p, n, n] for prompts [p] with candidates [p, n]."""
        if not len(self.keys):
            return np.zeros((*candidates.shape, candidates.shape[1]))
        wanted = _pair_keys(prompt[:, None, None], candidates[:, :, None], candidates[:, None, :])
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[at] == wanted, self.weights[at], 0.0)


def _check_columns(rows: pa.Table, column: str, where: str) -> None:
    """Raises UserError when a column is missing or holds what it cannot."""
    missing = [c for c in ("prompt_id", "better", "worse", column) if c not in rows.column_names]
    if missing:
        raise UserError(f"{where}: has no column `{missing[0]}`; it has {', '.join(rows.column_names)}")
    whole, text = pa.types.is_integer, (pa.types.is_string, pa.types.is_large_string)
    wanted: list[tuple[str, str, tuple[Any, ...]]] = [
        ("prompt_id", "text", text),
        ("better", "candidate ids (integers)", (whole,)),
        ("worse", "candidate ids (integers)", (whole,)),
        (column, "numbers", (whole, pa.types.is_floating)),
    ]
    for name, what, fitting in wanted:
        kind = rows.schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not any(fits(kind) for fits in fitting):
            raise UserError(f"{where}: column `{name}` must hold {what}, it holds {kind}")
        if name != column and rows[name].null_count:
            raise UserError(f"{where}: column `{name}` has {rows[name].null_count} empty cells; each row names a pair")


def _stored(rows: pa.Table, column: str, where: str) -> Floats:
    """The weights as the table `weights` will hold them, in float32: what is too small for that is 0 from here on.

    Raises UserError for one that is negative or not finite there.
    """
    given = rows[column].cast(pa.float64(), safe=False).to_numpy()  # nulls become NaN
    with np.errstate(over="ignore"):
        weights = given.astype(np.float32).astype(np.float64)
    wrong = ~(np.isfinite(weights) & (given >= 0))
    if wrong.any():
        bad = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"{where}: column `{column}` has a weight that is negative or not finite in float32 ({given[bad]:g}, for "
            f"{_named(rows, bad)}); give 0 to a pair that does not count"
        )
    return weights


def _named(rows: pa.Table, i: int) -> str:
    """A row of the file, for an error."""
    row = {name: rows[name][i].as_py() for name in ("prompt_id", "better", "worse")}
    return ", ".join(f"{name} {value}" for name, value in row.items())


def _pair_keys(prompt: NDArray[Any], better: NDArray[Any], worse: NDArray[Any]) -> Ints:
    keys = (prompt.astype(np.int64) << 32) | (better.astype(np.int64) << 16) | worse.astype(np.int64)
    return np.asarray(keys)
