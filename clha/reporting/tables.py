"""A run's tables as arrays for figures and as the few rows that are shown: pairs, paired scores, texts of examples."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clha.noise import effective_sample_size, labelled_pairs
from clha.rewards.trust import LabelTrust
from clha.rewards.weighing import LABEL_OF_ORIGIN, pair_strength
from clha.store import Artifact, read_parquet

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Ordering:
    """By what candidates stand in order (`rescore.rank_by`), and what the rewards say of that order.

    labelled_only: pairs that no label orders may not count.
    """

    rank_by: str
    trust: LabelTrust
    labelled_only: bool


@dataclass(frozen=True)
class Pairs:
    """Every pair of candidates of every prompt that may count, in rank order: M pairs."""

    prompt_ids: list[str]  # of the prompts, [P]
    prompt: Ints  # [M], index into prompt_ids
    first: Ints  # [M], candidate_id of the one ranked first
    second: Ints  # [M]
    gap: Floats  # [M], reward of the first minus that of the second; negative where a label ranks against it
    weight: Floats  # [M], the larger of the pair's two directions
    turned: NDArray[np.bool_]  # [M], whether that is the direction against the order
    log_odds: Floats  # [M], that the order is right; NaN where label order says nothing about the pair
    distance: Ints  # [M], places between the two in rank order
    best_reward: Floats  # [P], of the candidate that the SFT loss raises
    sft_lambda: Floats  # [P]

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[M], whether the pair takes part in training."""
        return self.weight > 0

    @property
    def effective_sample_size(self) -> float:
        """(sum w)^2 / sum w^2: so many pairs of equal weight would say as much (Kish 1965)."""
        return effective_sample_size(float(self.weight.sum()), float(np.square(self.weight).sum()))


def pairs_of(candidates: pa.Table, rewards: pa.Table, weights: pa.Table, ordering: Ordering) -> Pairs:
    """Join `candidates` (ids and origin), `rewards` and `weights` by id.

    Raises KeyError when a ranked candidate has no reward.
    """
    ids = weights["prompt_id"].combine_chunks()
    order, sizes = _flat_lists(weights["order"])
    width = int(order.max(initial=0)) + 1
    members, _ = _flat_lists(rewards["member_rewards"])
    reward = _grid(rewards, ids, width, rewards["reward"].to_numpy())
    member = _grid(rewards, ids, width, members.reshape(rewards.num_rows, -1))
    label = _grid(candidates, ids, width, _labels(candidates["origin"]))
    cells, _ = _flat_lists(weights["pair_weights"], depth=2)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    cell_starts = np.concatenate([[0], np.cumsum(sizes**2)[:-1]]).astype(np.int64)
    sft = weights["sft_index"].to_numpy().astype(np.int64)
    best = np.full(len(ids), np.nan)
    parts: list[tuple[NDArray[Any], ...]] = [tuple(np.empty(0) for _ in range(8))]
    for n in np.unique(sizes[sizes > 0]):
        rows = np.flatnonzero(sizes == n)
        ranked = order[starts[rows][:, None] + np.arange(n)].astype(np.int64)  # (G, n)
        values = reward[rows[:, None], ranked]  # (G, n)
        if np.isnan(values).any():
            raise KeyError("a ranked candidate has no reward")
        best[rows] = values[np.arange(len(rows)), sft[rows]]
        w = cells[cell_starts[rows][:, None] + np.arange(n * n)].reshape(-1, n, n).astype(np.float64)
        labels = np.nan_to_num(label[rows[:, None], ranked]).astype(np.int64)
        says, may = _said(ordering, member[rows[:, None], ranked], labels)
        strength = pair_strength(w)
        for k in range(n - 1):
            for j in range(k + 1, n):
                whole = (
                    rows,
                    ranked[:, k],
                    ranked[:, j],
                    values[:, k] - values[:, j],
                    strength[:, k, j],
                    w[:, j, k] > w[:, k, j],
                    says[:, k, j],
                    np.full(len(rows), j - k),
                )
                parts.append(tuple(column[may[:, k, j]] for column in whole))
    prompt, first, second, gap, weight, turned, log_odds, distance = (
        np.concatenate(p) for p in zip(*parts, strict=True)
    )
    return Pairs(
        ids.to_pylist(),
        prompt.astype(np.int64),
        first.astype(np.int64),
        second.astype(np.int64),
        gap.astype(np.float64),
        weight.astype(np.float64),
        turned.astype(bool),
        log_odds.astype(np.float64),
        distance.astype(np.int64),
        best,
        weights["sft_lambda"].to_numpy().astype(np.float64),
    )


def _said(ordering: Ordering, members: Floats, labels: Ints) -> tuple[Floats, NDArray[np.bool_]]:
    """For candidates in rank order, members (G, n, M) and labels (G, n): log-odds of each pair's order, and which may
    count, both (G, n, n)."""
    log_odds = ordering.trust.log_odds(members, labels, ordering.rank_by)
    labelled = labelled_pairs(labels)
    if ordering.rank_by == "label":
        log_odds = np.where(labelled, log_odds, np.nan)
    return log_odds, labelled if ordering.labelled_only else np.ones_like(labelled)


def _labels(origins: pa.ChunkedArray) -> Floats:
    """1 for chosen, -1 for rejected responses of the data, 0 for others."""
    origin = origins.combine_chunks().dictionary_encode()
    known = np.array([LABEL_OF_ORIGIN.get(v, 0) for v in origin.dictionary.to_pylist()], dtype=np.float64)
    return known[origin.indices.to_numpy()]


def _grid(table: pa.Table, ids: pa.Array, width: int, values: NDArray[Any]) -> Floats:
    """`values` [N, ...] of the table's rows by (row of `ids`, candidate_id): [P, at least `width`, ...], else NaN."""
    row = pc.index_in(table["prompt_id"], value_set=ids)
    known = row.is_valid().to_numpy()
    row = pc.fill_null(row, 0).to_numpy()[known]
    candidate = table["candidate_id"].to_numpy()[known]
    grid = np.full((len(ids), max(width, int(candidate.max(initial=0)) + 1), *values.shape[1:]), np.nan)
    grid[row, candidate] = values[known]
    return grid


def _flat_lists(column: pa.ChunkedArray, depth: int = 1) -> tuple[NDArray[Any], Ints]:
    """The values of a list column, flattened `depth` times, and the outermost lengths."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # a column without rows
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    sizes = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    for _ in range(depth):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False), sizes


@dataclass(frozen=True)
class PairedScores:
    """The scores of both policies on the prompts that both answered, in one order: P prompts."""

    prompt_ids: list[str]
    base: Floats
    trained: Floats
    base_training: Floats  # by the reward model that training used
    trained_training: Floats
    base_length: Floats  # tokens
    trained_length: Floats

    @property
    def gain(self) -> Floats:
        return self.trained - self.base


def paired_scores(scores: pa.Table) -> PairedScores:
    """Put the rows of both policies side by side, by id."""
    sides: dict[str, dict[str, dict[str, Any]]] = {"base": {}, "trained": {}}
    for row in scores.to_pylist():
        sides[row["policy"]][row["prompt_id"]] = row
    ids = sorted(sides["base"].keys() & sides["trained"].keys())

    def column(policy: str, name: str) -> Floats:
        values = [sides[policy][i].get(name) for i in ids]
        return np.asarray([np.nan if v is None else v for v in values], dtype=np.float64)

    return PairedScores(
        ids,
        column("base", "reward"),
        column("trained", "reward"),
        column("base", "training_reward"),
        column("trained", "training_reward"),
        column("base", "length"),
        column("trained", "length"),
    )


def rows_by_id(artifact: Artifact, table: str, columns: list[str], ids: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a few prompts, read shard by shard."""
    wanted = pa.array(sorted(set(ids)), pa.string())
    out: list[dict[str, Any]] = []
    for shard in artifact.shards(table):
        read = read_parquet(shard, columns)
        out += read.filter(pc.is_in(read["prompt_id"], value_set=wanted)).to_pylist()
    return out


def split_counts(prompts: pa.Table) -> list[dict[str, Any]]:
    """Prompts per subset and split: [{"subset", split: count, ..., "total"}], largest subset first."""
    counted = prompts.group_by(["subset", "split"]).aggregate([("prompt_id", "count")]).to_pylist()
    table: dict[str, dict[str, int]] = {}
    for row in counted:
        table.setdefault(row["subset"] or "", {})[row["split"]] = row["prompt_id_count"]
    rows: list[dict[str, Any]] = [{"subset": s, **c, "total": sum(c.values())} for s, c in table.items()]
    return sorted(rows, key=lambda r: (-r["total"], r["subset"]))


def quarantine_counts(nodes: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """Rows in, out and quarantined of every node, and the reasons."""
    return [
        {
            "node": name,
            "rows_in": a.manifest["rows_in"],
            "rows_out": a.manifest["rows_out"],
            "rows_quarantined": a.manifest["rows_quarantined"],
            "reasons": sorted(a.manifest["quarantined"].items(), key=lambda r: -r[1]),
        }
        for name, a in nodes.items()
    ]


def scored_candidates(nodes: Mapping[str, Artifact]) -> pa.Table:
    """origin, length (tokens) and reward of all scored candidates, joined by id."""
    shards = []
    for shard in nodes["generate"].shards("candidates"):  # one by one: token IDs are large
        read = read_parquet(shard, ["prompt_id", "candidate_id", "origin", "response_token_ids"])
        length = pc.list_value_length(read["response_token_ids"])
        shards.append(read.drop_columns(["response_token_ids"]).append_column("length", length))
    reward = nodes["score"].read("rewards", ["prompt_id", "candidate_id", "reward"])
    return pa.concat_tables(shards).join(reward, keys=["prompt_id", "candidate_id"], join_type="inner")


def read_json(artifact: Artifact, name: str) -> dict[str, Any]:
    """A JSON file of an artifact."""
    content: dict[str, Any] = json.loads((artifact.folder / name).read_text(encoding="utf-8"))
    return content
