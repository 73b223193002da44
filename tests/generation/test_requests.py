"""How shards are fed to an engine."""

import random
from typing import Any, ClassVar

import pytest

from clha.generation.requests import Finished, Request, Result, Sample, run_shards


class Shuffled:
    """Answers pending requests in random order, some at a time; remembers the most that were pending at once."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self._random = random.Random(seed)
        self._waiting: list[Request] = []
        self.most = 0

    @property
    def pending(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        self._waiting.append(request)
        self.most = max(self.most, self.pending)

    def poll(self) -> list[Result]:
        self._random.shuffle(self._waiting)
        some = self._random.randint(0, self.pending)
        answered, self._waiting = self._waiting[:some], self._waiting[some:]
        return [Result(r.id, [Sample(r.token_ids, [0.0], "stop")]) for r in answered]

    identity: ClassVar[dict[str, Any]] = {}

    def tokens_generated(self) -> None: ...

    def prefix_cache_hits(self) -> None: ...

    def close(self) -> None: ...


SIZES = [5, 0, 3, 1, 8, 0]
SHARDS = [(10 + k, [Request(f"{k}-{i}", [k, i], i) for i in range(size)]) for k, size in enumerate(SIZES)]


@pytest.mark.parametrize("capacity", [1, 2, 4, 100])
@pytest.mark.parametrize("seed", range(5))
def test_every_shard_is_finished_once_with_its_own_results(capacity: int, seed: int) -> None:
    events = list(run_shards(Shuffled(capacity, seed), SHARDS))
    finished = [e for e in events if isinstance(e, Finished)]
    assert sorted(f.index for f in finished) == [10, 11, 12, 13, 14, 15]
    for index, requests in SHARDS:
        (shard,) = [f for f in finished if f.index == index]
        assert {i: r.samples[0].token_ids for i, r in shard.results.items()} == {r.id: r.token_ids for r in requests}


def test_between_shards_each_result_is_seen_once_as_it_comes() -> None:
    events = list(run_shards(Shuffled(4, 0), SHARDS))
    seen = [r.id for e in events if not isinstance(e, Finished) for r in e]
    assert sorted(seen) == sorted(r.id for _, requests in SHARDS for r in requests)


def test_a_capacity_of_one_drains_each_shard_before_the_next() -> None:
    engine = Shuffled(1, 3)
    finished = [e.index for e in run_shards(engine, SHARDS) if isinstance(e, Finished)]
    assert finished == [10, 11, 12, 13, 14, 15]
    assert engine.most == max(SIZES)


def test_a_larger_capacity_lets_shards_overlap() -> None:
    engine = Shuffled(6, 3)
    list(run_shards(engine, SHARDS))
    assert engine.most > max(SIZES)


def test_no_shards_are_no_work() -> None:
    assert list(run_shards(Shuffled(4, 0), [])) == []
