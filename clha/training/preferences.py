"""Candidates, rewards and weights joined by id into memory-mapped files, and read one prompt at a time.

The join streams: token IDs go from Parquet to Arrow files batch by batch and are never held; only ids, candidate
numbers and rewards are in memory while it works. Opening the result maps files, whatever their size.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from clha.errors import StageFailure
from clha.store import fsync, write_atomic
from clha.training.batches import RankedPrompt

_BATCH_ROWS = 16_384
_RESPONSES = pa.schema([("tokens", pa.list_(pa.int32())), ("logps", pa.list_(pa.float32()))])
_PROMPTS = pa.schema([("tokens", pa.list_(pa.int32()))])
_INDEX = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_row", pa.int64()),
        ("rows", pa.list_(pa.int64())),
        ("rewards", pa.list_(pa.float64())),
        ("pair_weights", pa.list_(pa.float32())),
        ("sft_index", pa.int32()),
        ("sft_lambda", pa.float32()),
        ("reference", pa.list_(pa.float64())),  # null where there is none
    ]
)


def join_preferences(
    folder: Path,
    *,
    candidates: Sequence[Path],
    rewards: Sequence[Path],
    weights: Sequence[Path],
    prompts: Sequence[Path],
    reference: Sequence[Path] = (),
    splits: Sequence[str] = ("train", "dev"),
) -> dict[str, int]:
    """Join the Parquet shards of the tables into `folder`, one index for each split.

    Does nothing where an earlier call finished with the same files. Returns the number of prompts of each split.

    Raises:
        StageFailure: weights name a candidate or a prompt that is not there (a candidate without a reward, a prompt
            without a split), or one twice.
    """
    tables = {
        "candidates": candidates, "rewards": rewards, "weights": weights, "prompts": prompts, "reference": reference
    }  # fmt: skip
    inputs = {name: [_identity(shard) for shard in shards] for name, shards in tables.items()}
    done = folder / "joined.json"
    if (counts := _finished(done, inputs, splits)) is not None:
        return counts
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    ids, numbers, prompt_rows = _copy_tokens(folder, candidates)
    known = pc.unique(ids)
    known = known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known
    width = int(numbers.max(initial=0)) + 1
    keys = _keys(pc.index_in(ids, value_set=known).to_numpy().astype(np.int64), numbers, width)
    del ids, numbers
    row_of = _Lookup(keys, "candidates")
    reward_of = _values_by_row(rewards, "reward", "rewards", known, width, row_of)
    logp_of = _values_by_row(reference, "logp", "reference", known, width, row_of) if reference else None
    split_of = _splits_by_code(prompts, known)
    counts = dict.fromkeys(splits, 0)
    weighed = np.zeros(len(known), dtype=bool)
    writers = {split: pa.OSFile(str(folder / f".{split}.arrow"), "wb") for split in splits}
    files = {split: pa.ipc.new_file(writers[split], _INDEX) for split in splits}
    for batch in _batches(weights, ["prompt_id", "order", "pair_weights", "sft_index", "sft_lambda"]):
        codes = pc.index_in(batch["prompt_id"], value_set=known)
        if codes.null_count:
            missing = batch["prompt_id"].filter(codes.is_null())[0]
            raise StageFailure(f"weights: prompt {missing} has no candidates; rebuild from rescore")
        code = codes.to_numpy().astype(np.int64)
        _check_prompts(batch["prompt_id"], code, weighed, split_of)
        for split in splits:
            chosen = pa.array(split_of[code] == split)
            part = batch.filter(chosen)
            counts[split] += len(part)
            if len(part):
                own = code[split_of[code] == split]
                files[split].write_batch(_index_batch(part, own, width, row_of, reward_of, logp_of, prompt_rows))
    for split in splits:
        files[split].close()
        writers[split].close()
        (folder / f".{split}.arrow").replace(folder / f"{split}.arrow")
    for file in ("responses.arrow", "prompt_tokens.arrow", *(f"{split}.arrow" for split in splits)):
        fsync(folder / file)
    write_atomic(done, json.dumps({"inputs": inputs, "counts": counts}).encode())
    return counts


class Preferences:
    """The prompts of one split, read from memory-mapped files: `preferences[i]` is a `RankedPrompt`."""

    def __init__(self, folder: Path, split: str) -> None:
        self._index = _Mapped(folder / f"{split}.arrow")
        self._prompts = _Mapped(folder / "prompt_tokens.arrow")
        self._responses = _Mapped(folder / "responses.arrow")

    def __len__(self) -> int:
        return len(self._index)

    @property
    def max_candidates(self) -> int:
        """The largest number of candidates of any prompt."""
        lengths = (pc.max(pc.list_value_length(b["rows"])).as_py() for b in self._index.batches if b.num_rows)
        return max(lengths, default=0)

    def __getitem__(self, i: int) -> RankedPrompt:
        index = self._index
        rows = index.list_at("rows", i)
        n = len(rows)
        logps = [self._responses.list_at("logps", int(r)) for r in rows]
        reference = index.list_at("reference", i)
        return RankedPrompt(
            prompt_id=index.value_at("prompt_id", i),
            prompt=self._prompts.list_at("tokens", index.value_at("prompt_row", i)),
            responses=[self._responses.list_at("tokens", int(r)) for r in rows],
            rewards=index.list_at("rewards", i),
            pair_weights=index.list_at("pair_weights", i).reshape(n, n),
            sft_index=index.value_at("sft_index", i),
            sft_lambda=index.value_at("sft_lambda", i),
            generator_logps=[values if len(values) else None for values in logps],
            reference_logps=reference if len(reference) else None,
        )


def _identity(shard: Path) -> list[Any]:
    """What tells a file from another one, and from itself when it is written anew."""
    facts = shard.stat()
    return [str(shard.resolve()), facts.st_size, facts.st_mtime_ns]


def _finished(done: Path, inputs: dict[str, Any], splits: Sequence[str]) -> dict[str, int] | None:
    """The counts of an earlier join of the same files into the same splits; None where there is none."""
    try:
        earlier = json.loads(done.read_text(encoding="utf-8"))
        same = earlier["inputs"] == inputs and list(earlier["counts"]) == list(splits)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return dict(earlier["counts"]) if same else None


def _check_prompts(ids: pa.Array, codes: np.ndarray, weighed: np.ndarray, split_of: np.ndarray) -> None:
    """Each prompt of some rows of weights has a split and had no row before; notes in `weighed` that it has now."""
    first = np.zeros(len(codes), dtype=bool)
    first[np.unique(codes, return_index=True)[1]] = True
    again = weighed[codes] | ~first
    if again.any():
        raise StageFailure(f"weights: prompt {ids[int(again.argmax())]} has two rows; rebuild from rescore")
    lost = split_of[codes] == ""
    if lost.any():
        raise StageFailure(f"weights: prompt {ids[int(lost.argmax())]} is not in prompts; rebuild from prepare")
    weighed[codes] = True


class _Mapped:
    """Rows of a memory-mapped Arrow file."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0] + [b.num_rows for b in self.batches])
        self._views: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        b = int(np.searchsorted(self._starts, row, side="right")) - 1
        return b, row - int(self._starts[b])

    def list_at(self, column: str, row: int) -> np.ndarray:
        """One list, as a view of the mapped file."""
        b, at = self._find(row)
        if (b, column) not in self._views:
            lists = self.batches[b][column]
            self._views[b, column] = (lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=False))
        offsets, values = self._views[b, column]
        return values[offsets[at] : offsets[at + 1]]

    def value_at(self, column: str, row: int) -> Any:
        b, at = self._find(row)
        return self.batches[b][column][at].as_py()


def _keys(codes: np.ndarray, numbers: np.ndarray, width: int) -> np.ndarray:
    """One number for (prompt, candidate_id); -1, which no candidate has, where either is out of range."""
    return np.where((codes >= 0) & (numbers >= 0) & (numbers < width), codes * width + numbers, -1)


class _Lookup:
    """Row numbers by key."""

    def __init__(self, keys: np.ndarray, table: str) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]
        if len(keys) > 1 and (self._sorted[1:] == self._sorted[:-1]).any():
            raise StageFailure(f"{table}: two rows with one id; rebuild the table")
        self.size = len(keys)

    def rows(self, keys: np.ndarray, what: str) -> np.ndarray:
        at = np.minimum(np.searchsorted(self._sorted, keys), max(self.size - 1, 0))
        if self.size == 0 or (self._sorted[at] != keys).any():
            raise StageFailure(f"{what} name a candidate that is not in candidates; rebuild from generate")
        return self._order[at]


def _batches(shards: Iterable[Path], columns: list[str]) -> Iterator[pa.RecordBatch]:
    for shard in shards:
        # Unbuffered reading would hold whole row groups; pre-buffering too.
        with pq.ParquetFile(shard, pre_buffer=False) as file:
            yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)


def _copy_tokens(folder: Path, shards: Sequence[Path]) -> tuple[pa.ChunkedArray, np.ndarray, np.ndarray]:
    """Stream tokens into Arrow files. Returns per candidate: prompt id, candidate_id, row of its prompt's tokens."""
    columns = ["prompt_id", "candidate_id", "prompt_token_ids", "response_token_ids", "response_logprobs"]
    ids, numbers, prompt_rows, prompts = [], [], [], 0
    with (
        pa.OSFile(str(folder / "responses.arrow"), "wb") as response_file,
        pa.OSFile(str(folder / "prompt_tokens.arrow"), "wb") as prompt_file,
        pa.ipc.new_file(response_file, _RESPONSES) as response_writer,
        pa.ipc.new_file(prompt_file, _PROMPTS) as prompt_writer,
    ):
        for batch in _batches(shards, columns):
            own = batch["prompt_id"]
            # A prompt's candidates stand together: its tokens are written once for each run of equal ids.
            first = np.ones(len(own), dtype=bool)
            first[1:] = pc.not_equal(own[1:], own[:-1]).to_numpy(zero_copy_only=False)
            prompt_rows.append(prompts + np.cumsum(first) - 1)
            prompts += int(first.sum())
            prompt_writer.write_batch(
                pa.record_batch([batch["prompt_token_ids"].filter(pa.array(first))], schema=_PROMPTS)
            )
            response_writer.write_batch(
                pa.record_batch([batch["response_token_ids"], batch["response_logprobs"]], schema=_RESPONSES)
            )
            ids.append(own)
            numbers.append(batch["candidate_id"].to_numpy().astype(np.int64))
    if not ids:
        raise StageFailure("candidates: there are none; look at generate's quarantine")
    return pa.chunked_array(ids), np.concatenate(numbers), np.concatenate(prompt_rows)


def _values_by_row(
    shards: Sequence[Path], column: str, table: str, known: pa.Array, width: int, row_of: _Lookup
) -> np.ndarray:
    """A column of a table with a row per candidate, by the candidate's row; NaN where the table has none."""
    values = np.full(row_of.size, np.nan)
    for batch in _batches(shards, ["prompt_id", "candidate_id", column]):
        codes = pc.fill_null(pc.index_in(batch["prompt_id"], value_set=known), -1).to_numpy().astype(np.int64)
        keys = _keys(codes, batch["candidate_id"].to_numpy().astype(np.int64), width)
        values[row_of.rows(keys, table)] = batch[column].to_numpy()
    return values


def _splits_by_code(shards: Sequence[Path], known: pa.Array) -> np.ndarray:
    splits = np.full(len(known), "", dtype="U16")
    for batch in _batches(shards, ["prompt_id", "split"]):
        codes = pc.index_in(batch["prompt_id"], value_set=known)
        here = codes.is_valid().to_numpy(zero_copy_only=False)
        splits[codes.drop_null().to_numpy()] = batch["split"].to_numpy(zero_copy_only=False)[here]
    return splits


def _index_batch(
    weights: pa.RecordBatch,
    codes: np.ndarray,
    width: int,
    row_of: _Lookup,
    reward_of: np.ndarray,
    logp_of: np.ndarray | None,
    prompt_rows: np.ndarray,
) -> pa.RecordBatch:
    sizes = pc.list_value_length(weights["order"]).to_numpy().astype(np.int64)
    numbers = weights["order"].flatten().to_numpy().astype(np.int64)
    rows = row_of.rows(_keys(np.repeat(codes, sizes), numbers, width), "weights")
    if len(np.unique(rows)) < len(rows):
        raise StageFailure("weights: order names a candidate twice; rebuild from rescore")
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    squares = np.concatenate([[0], np.cumsum(sizes**2)]).astype(np.int32)
    pair_weights = weights["pair_weights"].flatten().flatten()
    rewards = reward_of[rows]
    if len(pair_weights) != squares[-1]:
        raise StageFailure("weights: pair_weights do not fit order; rebuild from rescore")
    if np.isnan(rewards).any():
        raise StageFailure("weights name a candidate that has no reward; rebuild from rescore")
    if logp_of is not None and np.isnan(logp_of[rows]).any():
        raise StageFailure("weights name a candidate that has no reference log-probability; rebuild from train")
    return pa.record_batch(
        [
            weights["prompt_id"],
            pa.array(prompt_rows[rows[offsets[:-1]]]),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.astype(np.int64))),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(rewards)),
            pa.ListArray.from_arrays(pa.array(squares), pair_weights),
            weights["sft_index"],
            weights["sft_lambda"],
            pa.nulls(len(weights), pa.list_(pa.float64()))
            if logp_of is None
            else pa.ListArray.from_arrays(pa.array(offsets), pa.array(logp_of[rows])),
        ],
        schema=_INDEX,
    )
