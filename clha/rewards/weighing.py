"""From stored rewards to the table `weights`: prompts of unlike size, in order, without a loop over prompts."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clha import noise
from clha.schema import WEIGHTS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# What the data say of a candidate of this origin; 0 of any other.
LABEL_OF_ORIGIN = {"dataset_chosen": 1, "dataset_rejected": -1}

# Prompts that are looked at together in passes over all rewards.
_CHUNK = 65_536


@dataclass(frozen=True)
class RewardTable:
    """Scored candidates sorted by prompt; prompt i owns the rows offsets[i]:offsets[i + 1].

    prompt_ids [P] (those with scores, in the order of the candidates), unscored: the others; candidate_id, reward,
    label (1 chosen, -1 rejected, 0 neither), truncated [N]; members [N, M]. lost: keys (see `_keys`) of candidates
    without a reward beside others that have one, sorted.
    """

    prompt_ids: pa.Array
    unscored: list[str]
    offsets: Ints
    candidate_id: NDArray[np.int32]
    reward: Floats
    members: Floats
    label: NDArray[np.int8]
    truncated: NDArray[np.bool_]
    lost: Ints

    @property
    def prompts(self) -> int:
        return len(self.offsets) - 1

    def has(self, prompt: Ints, candidate: Ints) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether prompts (their places, [K]) have such candidates [K]: with a reward, and without one."""
        wanted = _keys(prompt, candidate)
        small = (candidate >= 0) & (candidate < 1 << 31)  # others would stand for another prompt
        own = _keys(np.repeat(np.arange(self.prompts), np.diff(self.offsets)), self.candidate_id)
        return small & _among(own, wanted), small & _among(self.lost, wanted)

    def by_size(self, prompts: range) -> Iterator[tuple[Ints, Ints]]:
        """Prompts of one size at a time: (places within `prompts` [p], their rows [p, n])."""
        starts = self.offsets[prompts.start : prompts.stop]
        sizes = self.offsets[prompts.start + 1 : prompts.stop + 1] - starts
        for n in np.unique(sizes):
            places = np.flatnonzero(sizes == n)
            yield places, starts[places][:, None] + np.arange(n)


def reward_table(candidates: pa.Table, rewards: pa.Table) -> RewardTable:
    """Join candidates (prompt_id, candidate_id, origin) and rewards (contract columns) by their ids.

    Raises ValueError when a reward belongs to no candidate.
    """
    ids = pc.unique(candidates["prompt_id"])
    known = pc.index_in(candidates["prompt_id"], value_set=ids).to_numpy().astype(np.int64)
    codes = pc.index_in(rewards["prompt_id"], value_set=ids)
    if codes.null_count:
        raise ValueError("a reward belongs to no candidate")
    code = codes.to_numpy().astype(np.int64)
    candidate_id = rewards["candidate_id"].to_numpy()
    order = np.lexsort((candidate_id, code))
    code, candidate_id = code[order], candidate_id[order]
    keys = _keys(known, candidates["candidate_id"].to_numpy())
    label = _labels(candidates["origin"], keys, _keys(code, candidate_id))
    sizes = np.bincount(code, minlength=len(ids))
    scored = sizes > 0
    members = rewards["member_rewards"].combine_chunks()
    width = len(members.flatten()) // max(1, len(members))
    return RewardTable(
        prompt_ids=ids.filter(pa.array(scored)),
        unscored=ids.filter(pa.array(~scored)).to_pylist(),
        offsets=np.concatenate([[0], np.cumsum(sizes[scored])]),
        candidate_id=candidate_id,
        reward=rewards["reward"].to_numpy()[order],
        members=members.flatten().to_numpy().reshape(-1, width)[order],
        label=label,
        truncated=rewards["truncated"].to_numpy()[order],
        lost=_lost(keys, code, candidate_id, scored),
    )


def _keys(prompt: NDArray[Any], candidate: NDArray[Any]) -> Ints:
    """One number for each candidate: the place of its prompt, then its id."""
    return np.asarray((prompt.astype(np.int64) << 32) | candidate.astype(np.int64))


def _among(keys: Ints, wanted: Ints) -> NDArray[np.bool_]:
    """Which of `wanted` are among the sorted `keys`."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=bool)
    return np.asarray(keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted)


def _labels(origins: pa.ChunkedArray, keys: Ints, wanted: Ints) -> NDArray[np.int8]:
    """The labels of the candidates `wanted`, from the origins of `keys`."""
    sort = np.argsort(keys, kind="stable")
    at = sort[np.minimum(np.searchsorted(keys, wanted, sorter=sort), len(keys) - 1)]
    if not (keys[at] == wanted).all():
        raise ValueError("a reward belongs to no candidate")
    origin = origins.combine_chunks().dictionary_encode()
    values = np.array([LABEL_OF_ORIGIN.get(v, 0) for v in origin.dictionary.to_pylist()], dtype=np.int8)
    return values[origin.indices.to_numpy()[at]]


def _lost(keys: Ints, code: Ints, candidate_id: NDArray[np.int32], scored: NDArray[np.bool_]) -> Ints:
    """Keys of candidates without a reward, by the places that the prompts have among those with scores."""
    if len(keys) == len(code):
        return np.empty(0, dtype=np.int64)
    lost = np.setdiff1d(keys, _keys(code, candidate_id))
    lost = lost[scored[lost >> 32]]
    return _keys((np.cumsum(scored) - 1)[lost >> 32], lost & 0xFFFFFFFF)


@dataclass(frozen=True)
class Ranked:
    """p prompts of n candidates in rank order: rewards [p, n], members [p, n, M], labels [p, n].

    prompts [p] are their places in the table, candidates [p, n] the candidate ids.
    """

    rewards: Floats
    members: Floats
    labels: Ints
    prompts: Ints
    candidates: NDArray[np.int32]


@dataclass(frozen=True)
class Weighed:
    """pair_weights [p, n, n], sft_lambda [p]; sft_index [p] (None: the best-ranked); flags: name -> [p].

    pairs [p, n, n]: those k before j that may count at all, whatever they weigh (None: all).
    """

    pair_weights: Floats
    sft_lambda: Floats
    sft_index: Ints | None = None
    flags: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    pairs: NDArray[np.bool_] | None = None


Rule = Callable[[Ranked], Weighed]


def pair_strength(pair_weights: Floats) -> Floats:
    """What each pair counts for, [p, n, n] -> [p, n, n], zero but for k before j: the larger of its two directions.

    A soft label is one pair. Manifest, report and trainer all take their sums over this.
    """
    return np.triu(np.maximum(pair_weights, pair_weights.transpose(0, 2, 1)), 1)


def _by_distance(pairs: NDArray[np.bool_]) -> dict[int, int]:
    """How many of these pairs [p, n, n] there are at each rank distance."""
    return {i: int(np.diagonal(pairs, i, axis1=1, axis2=2).sum()) for i in range(1, pairs.shape[1])}


@dataclass
class Totals:
    """What the weights come to, over all prompts."""

    prompts: int = 0
    pairs: Counter[int] = field(default_factory=Counter)  # that may count, by rank distance
    kept: Counter[int] = field(default_factory=Counter)
    weight: float = 0.0
    weight_squares: float = 0.0
    sft_on: float = 0.0

    def add(self, weighed: Weighed) -> None:
        counts = noise.count_pairs(weighed.pair_weights)
        strength = pair_strength(weighed.pair_weights)
        self.prompts += len(strength)
        self.pairs.update(counts.total if weighed.pairs is None else _by_distance(weighed.pairs))
        self.kept.update(counts.kept)
        self.weight += float(strength.sum())
        self.weight_squares += float(np.square(strength).sum())
        self.sft_on += float((weighed.sft_lambda > 0).sum())

    def facts(self) -> dict[str, Any]:
        pairs, kept = sum(self.pairs.values()), sum(self.kept.values())
        return {
            "pairs": pairs,
            "pairs_kept": kept,
            "kept_fraction": kept / pairs if pairs else 0.0,
            "pairs_by_distance": {str(i): [self.kept[i], n] for i, n in sorted(self.pairs.items()) if n},
            "effective_sample_size": noise.effective_sample_size(self.weight, self.weight_squares),
            "sft_share": self.sft_on / self.prompts if self.prompts else 0.0,
        }


def ranked_prompts(table: RewardTable, prompts: range, rank_by: str) -> Iterator[tuple[Ints, Ints, Ranked]]:
    """Prompts of one size at a time, ranked: (places [p], rows in rank order [p, n], their figures)."""
    for places, rows in table.by_size(prompts):
        rewards, labels = table.reward[rows], table.label[rows].astype(np.int64)
        order = noise.rank_by_reward(rewards) if rank_by == "reward" else noise.rank_by_label(rewards, labels)
        rows = np.take_along_axis(rows, order, axis=1)
        labels = table.label[rows].astype(np.int64)
        own = places + prompts.start
        yield places, rows, Ranked(table.reward[rows], table.members[rows], labels, own, table.candidate_id[rows])


def all_ranked(table: RewardTable, rank_by: str) -> Iterator[tuple[Ints, Ints, Ranked]]:
    """Everything, some tens of thousands of prompts at a time; see `ranked_prompts`."""
    for start in range(0, table.prompts, _CHUNK):
        yield from ranked_prompts(table, range(start, min(start + _CHUNK, table.prompts)), rank_by)


def weigh_shard(table: RewardTable, prompts: range, rank_by: str, rule: Rule, totals: Totals) -> pa.Table:
    """The rows of `weights` for a range of prompts; what they come to is added to `totals`."""
    sizes = np.diff(table.offsets[prompts.start : prompts.stop + 1])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    square_starts = np.concatenate([[0], np.cumsum(sizes**2)])
    order = np.empty(starts[-1], dtype=np.int32)
    weights = np.empty(square_starts[-1], dtype=np.float32)
    sft_lambda = np.empty(len(prompts), dtype=np.float32)
    sft_index = np.zeros(len(prompts), dtype=np.int32)
    flags: list[list[str]] = [[] for _ in prompts]
    for places, rows, ranked in ranked_prompts(table, prompts, rank_by):
        n = rows.shape[1]
        weighed = rule(ranked)
        totals.add(weighed)
        order[starts[places][:, None] + np.arange(n)] = table.candidate_id[rows]
        weights[square_starts[places][:, None] + np.arange(n * n)] = weighed.pair_weights.reshape(-1, n * n)
        sft_lambda[places] = weighed.sft_lambda
        if weighed.sft_index is not None:
            sft_index[places] = weighed.sft_index
        for name, where in _flags(weighed, table.truncated[rows]).items():
            for place in places[where]:
                flags[place].append(name)
    row_offsets = np.concatenate([[0], np.cumsum(np.repeat(sizes, sizes))])
    inner = pa.ListArray.from_arrays(pa.array(row_offsets, pa.int32()), pa.array(weights))
    columns = [
        table.prompt_ids.slice(prompts.start, len(prompts)),
        pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(order)),
        pa.ListArray.from_arrays(pa.array(starts, pa.int32()), inner),
        pa.array(sft_index),
        pa.array(sft_lambda),
        pa.array(flags, pa.list_(pa.string())),
    ]
    return pa.table(columns, schema=WEIGHTS)


def _flags(weighed: Weighed, truncated: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """Flags of p prompts with n candidates each: name -> [p]."""
    n = truncated.shape[1]
    kept = (weighed.pair_weights > 0).any(axis=(1, 2))
    return {
        "single_candidate": np.full(len(truncated), n == 1),
        "no_pairs": ~kept & (n > 1),
        "sft_off": weighed.sft_lambda == 0,
        "truncated": truncated.any(axis=1),
        **weighed.flags,
    }
