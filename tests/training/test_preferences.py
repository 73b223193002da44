"""The join of candidates, rewards and weights: by id, streaming, and only what fits."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clha.errors import StageFailure
from clha.schema import CANDIDATES, PROMPTS, REFERENCE, REWARDS, WEIGHTS
from clha.training.preferences import Preferences, join_preferences


def write(folder: Path, name: str, rows: list[dict[str, Any]], schema: pa.Schema, shard: int = 0) -> Path:
    path = folder / f"{name}-{shard:05d}.parquet"
    full = [{field.name: row.get(field.name) for field in schema} for row in rows]
    pq.write_table(pa.Table.from_pylist(full, schema=schema), path)
    return path


def three_prompts(folder: Path) -> dict[str, list[Path]]:
    """Prompts a (two candidates), b (three) and c (dev, two), the tables in different orders and shards."""
    candidates = [
        {"prompt_id": p, "candidate_id": c, "prompt_token_ids": tokens, "response_token_ids": [10 * c + 1] * (c + 1)}
        for p, n, tokens in (("a", 2, [1, 2]), ("b", 3, [3]), ("c", 2, [4, 5, 6]))
        for c in range(n)
    ]
    candidates[1]["response_logprobs"] = [-0.5, -0.25]
    rewards = [{"prompt_id": r["prompt_id"], "candidate_id": r["candidate_id"]} for r in candidates]
    for row in rewards:
        row["reward"] = row["candidate_id"] + ord(row["prompt_id"])
    weights = [
        {"prompt_id": "b", "order": [2, 0, 1], "pair_weights": [[0, 1, 2], [0, 0, 3], [0, 0, 0]]},
        {"prompt_id": "c", "order": [1, 0], "pair_weights": [[0, 1], [0, 0]]},
        {"prompt_id": "a", "order": [1, 0], "pair_weights": [[0, 0.5], [0, 0]]},
    ]
    for row in weights:
        row |= {"sft_index": 1, "sft_lambda": 0.5, "flags": []}
    splits = [{"prompt_id": p, "split": s} for p, s in (("c", "dev"), ("x", "test"), ("b", "train"), ("a", "train"))]
    return {
        "candidates": [
            write(folder, "candidates", candidates[:2], CANDIDATES),
            write(folder, "candidates", candidates[2:], CANDIDATES, 1),
        ],
        "rewards": [write(folder, "rewards", rewards[::-1], REWARDS)],
        "weights": [write(folder, "weights", weights, WEIGHTS)],
        "prompts": [write(folder, "prompts", splits, PROMPTS)],
    }


def test_rows_are_joined_by_id_in_rank_order_and_split(tmp_path: Path):
    assert join_preferences(tmp_path / "joined", **three_prompts(tmp_path)) == {"train": 2, "dev": 1}
    train, dev = (Preferences(tmp_path / "joined", split) for split in ("train", "dev"))
    b, a = train[0], train[1]
    assert (b.prompt_id, b.prompt.tolist(), b.sft_index, b.sft_lambda) == ("b", [3], 1, 0.5)
    assert [r.tolist() for r in b.responses] == [[21, 21, 21], [1], [11, 11]]
    assert b.rewards.tolist() == [100.0, 98.0, 99.0]
    assert b.pair_weights.tolist() == [[0, 1, 2], [0, 0, 3], [0, 0, 0]]
    assert a.generator_logps[0].tolist() == [-0.5, -0.25] and a.generator_logps[1] is None
    assert (dev[0].prompt_id, dev[0].prompt.tolist()) == ("c", [4, 5, 6])
    assert (train.max_candidates, dev.max_candidates) == (3, 2)
    with pytest.raises(IndexError):
        train[2]


def test_reference_log_probabilities_are_joined_by_id_in_rank_order(tmp_path: Path):
    tables = three_prompts(tmp_path)
    rows = [
        {"prompt_id": p, "candidate_id": c, "logp": -float(10 * i + c)}
        for i, (p, n) in enumerate((("a", 2), ("b", 3), ("c", 2)), start=1)
        for c in range(n)
    ]
    reference = [
        write(tmp_path, "reference", rows[:3], REFERENCE),
        write(tmp_path, "reference", rows[3:], REFERENCE, 1),
    ]
    join_preferences(tmp_path / "joined", **tables, reference=reference)
    train = Preferences(tmp_path / "joined", "train")
    assert train[0].prompt_id == "b" and train[0].reference_logps.tolist() == [-22.0, -20.0, -21.0]
    assert train[1].reference_logps.tolist() == [-11.0, -10.0]
    join_preferences(tmp_path / "without", **tables)
    assert Preferences(tmp_path / "without", "train")[0].reference_logps is None


def test_a_finished_join_is_not_done_again(tmp_path: Path):
    tables = three_prompts(tmp_path)
    first = join_preferences(tmp_path / "joined", **tables)
    made = (tmp_path / "joined" / "responses.arrow").stat().st_mtime_ns
    assert join_preferences(tmp_path / "joined", **tables) == first
    assert (tmp_path / "joined" / "responses.arrow").stat().st_mtime_ns == made


def test_a_prompt_weighed_twice_in_two_shards_is_a_failure(tmp_path: Path):
    tables = three_prompts(tmp_path)
    rows = pq.read_table(tables["weights"][0]).to_pylist()
    tables["weights"].append(write(tmp_path, "weights", rows[1:2], WEIGHTS, 1))
    with pytest.raises(StageFailure, match="prompt c has two rows"):
        join_preferences(tmp_path / "joined", **tables)


@pytest.mark.parametrize("splits", [("train", "dev"), ("train",)])
def test_a_join_of_other_files_is_done_again(tmp_path: Path, splits: tuple[str, ...]):
    tables, joined = three_prompts(tmp_path), tmp_path / "joined"
    join_preferences(joined, **tables)
    rows = pq.read_table(tables["weights"][0]).to_pylist()[:-1]
    tables["weights"][0] = write(tmp_path, "weights", rows, WEIGHTS)
    counts = join_preferences(joined, **tables, splits=splits)
    assert counts == dict.fromkeys(splits, 1) and len(Preferences(joined, "train")) == 1
    tables["weights"] = tables["weights"] * 2
    with pytest.raises(StageFailure, match="two rows"):
        join_preferences(joined, **tables)
    assert not (joined / "joined.json").exists()  # what lies there now is of no inputs at all


@pytest.mark.parametrize("left", [b"", b'{"train": 2, "dev": 1}', b'{"inputs": '])
def test_a_note_that_is_no_note_of_this_join_does_not_count(tmp_path: Path, left: bytes):
    tables, joined = three_prompts(tmp_path), tmp_path / "joined"
    joined.mkdir()
    (joined / "joined.json").write_bytes(left)
    assert join_preferences(joined, **tables) == {"train": 2, "dev": 1}
    assert len(Preferences(joined, "train")) == 2


@pytest.mark.parametrize(
    ("table", "schema", "change", "match"),
    [
        ("weights", WEIGHTS, {"order": [9, 0]}, "weights name a candidate that is not in candidates"),
        ("weights", WEIGHTS, {"prompt_id": "z"}, "prompt z has no candidates"),
        ("weights", WEIGHTS, {"pair_weights": [[0.0]]}, "pair_weights do not fit"),
        ("weights", WEIGHTS, "double", "weights: prompt b has two rows; rebuild from rescore"),
        ("weights", WEIGHTS, {"order": [1, 1]}, "order names a candidate twice"),
        ("prompts", PROMPTS, None, "weights: prompt a is not in prompts; rebuild from prepare"),
        ("rewards", REWARDS, {"candidate_id": 9}, "rewards name a candidate that is not in candidates"),
        ("rewards", REWARDS, None, "has no reward"),
        ("candidates", CANDIDATES, "double", "two rows with one id"),
    ],
)
def test_what_does_not_fit_together_is_a_failure(
    tmp_path: Path, table: str, schema: pa.Schema, change: Any, match: str
):
    tables = three_prompts(tmp_path)
    rows = pq.read_table(tables[table][0]).to_pylist()
    if change is None:
        rows = rows[:-1]
    elif change == "double":
        rows.append(rows[0])
    else:
        rows[-1] |= change
    tables[table][0] = write(tmp_path, table, rows, schema)
    with pytest.raises(StageFailure, match=match):
        join_preferences(tmp_path / "joined", **tables)


def million_rows(folder: Path) -> dict[str, list[Path]]:
    """250,000 prompts with four responses: 100 and 48 tokens."""
    draw, n, prompts, tokens, response = np.random.default_rng(0), 4, 250_000, 100, 48
    ids = np.array([hashlib.md5(str(i).encode()).hexdigest() for i in range(prompts)])
    tables: dict[str, list[Path]] = {"candidates": [], "rewards": [], "weights": [], "prompts": []}
    for shard, own in enumerate(np.array_split(ids, 5)):
        rows = len(own) * n

        def lists(values: np.ndarray, size: int) -> pa.Array:
            offsets = np.arange(0, len(values) + 1, size, dtype=np.int32)
            return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

        prompt_ids, numbers = pa.array(np.repeat(own, n)), pa.array(np.tile(np.arange(n, dtype=np.int32), len(own)))
        prompt_tokens = np.repeat(draw.integers(0, 49152, (len(own), tokens), dtype=np.int32), n, 0).ravel()
        columns = {
            "candidates": {
                "prompt_id": prompt_ids,
                "candidate_id": numbers,
                "prompt_token_ids": lists(prompt_tokens, tokens),
                "response_token_ids": lists(draw.integers(0, 49152, rows * response, dtype=np.int32), response),
                "response_logprobs": lists(draw.random(rows * response, dtype=np.float32), response),
            },
            "rewards": {"prompt_id": prompt_ids, "candidate_id": numbers, "reward": pa.array(draw.random(rows))},
            "prompts": {"prompt_id": pa.array(own), "split": pa.array(["train"] * len(own))},
        }
        for name, table in columns.items():
            path = folder / f"{name}-{shard:05d}.parquet"
            pq.write_table(pa.table(table), path, row_group_size=65_536)
            tables[name].append(path)
        row = {"order": [3, 2, 1, 0], "pair_weights": np.triu(np.ones((n, n)), 1).tolist(), "sft_index": 0}
        weights = [row | {"prompt_id": i, "sft_lambda": 1.0} for i in own]
        tables["weights"].append(write(folder, "weights", weights, WEIGHTS, shard))
    return tables


MEASURE = """
import json, sys, time
from pathlib import Path
from clha.training.preferences import Preferences, join_preferences

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

tables = {name: [Path(p) for p in paths] for name, paths in json.loads(sys.argv[2]).items()}
import threading
before, peak, over = anonymous(), [0], []
def watch():
    while not over:
        peak[0] = max(peak[0], anonymous()); time.sleep(0.02)
watcher = threading.Thread(target=watch); watcher.start()
start = time.process_time()
join_preferences(Path(sys.argv[1]), **tables)
joined = time.process_time() - start
start = time.process_time()
data = Preferences(Path(sys.argv[1]), "train")
for i in range(0, len(data), 100): data[i]
over.append(1); watcher.join()
print(json.dumps({"rows": len(data), "join": joined, "open": time.process_time() - start, "kb": peak[0] - before}))
"""


@pytest.mark.slow
def test_a_million_rows_open_in_seconds_with_under_500_mb_of_data_in_memory(tmp_path: Path, root: Path):
    import json

    tables = {name: list(map(str, paths)) for name, paths in million_rows(tmp_path).items()}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "joined"), json.dumps(tables)],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["rows"] == 250_000
    assert measured["kb"] < 500_000, measured
    assert measured["join"] < 40 and measured["open"] < 5, (measured, time.monotonic() - start)
