"""What an engine is asked and what it answers, and how shards of requests are fed to it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled; the same for all requests of an engine.

    `stop_token_ids` end a response (EOS among them); `stop` are strings that end it.
    """

    n: int
    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt as token ids, and the seed of its first sample (the k-th has seed + k; none when greedy)."""

    id: str
    token_ids: list[int]
    seed: int | None


@dataclass(frozen=True)
class Sample:
    """One sampled response as the engine gave it: the token that ended it included.

    `logprobs`: natural log-probability of each token under the policy at temperature 1, before top_p.
    `finish_reason`: "stop" (a stop token or stop string), "length", or what else the engine says.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class Result:
    """All samples of one request, in the order of their seeds."""

    id: str
    samples: list[Sample]


class Engine(Protocol):
    """Something that samples responses; requests are answered in any order."""

    @property
    def capacity(self) -> int:
        """The next shard goes in when fewer requests than this are pending."""
        ...

    @property
    def pending(self) -> int:
        """Requests submitted and not yet answered."""
        ...

    def submit(self, request: Request) -> None: ...

    def poll(self) -> list[Result]:
        """Go on with the work until something may have been answered. Raises StageFailure or TransientFailure."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Manifest fields `engine` {name, version, mode} and `device`."""
        ...

    def tokens_generated(self) -> int | None:
        """Tokens generated so far, those of unfinished requests too, where known."""
        ...

    def prefix_cache_hits(self) -> int | None:
        """Prompt tokens that were taken from the prefix cache, where known."""
        ...

    def close(self) -> None:
        """Give memory and connections back."""
        ...


@dataclass
class _Open:
    index: int
    waiting: set[str]
    results: dict[str, Result] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """A shard all of whose requests were answered: results by request id."""

    index: int
    results: dict[str, Result]


def run_shards(engine: Engine, shards: Iterable[tuple[int, list[Request]]]) -> Iterator[Finished | list[Result]]:
    """Feed shards to the engine and yield each when it is complete; between, the results as they come, often none.

    The engine's `capacity` says how far the next shard overlaps the last ones. Request ids must be unique among the
    shards.
    """
    source = iter(shards)
    opened: list[_Open] = []
    owner: dict[str, _Open] = {}
    exhausted = False
    while True:
        while not exhausted and engine.pending < engine.capacity:
            shard = next(source, None)
            if shard is None:
                exhausted = True
                break
            index, requests = shard
            state = _Open(index, {r.id for r in requests})
            opened.append(state)
            for request in requests:
                owner[request.id] = state
                engine.submit(request)
        if engine.pending:
            results = engine.poll()
            for result in results:
                state = owner.pop(result.id)
                state.waiting.discard(result.id)
                state.results[result.id] = result
            yield results
        for state in [s for s in opened if not s.waiting]:
            opened.remove(state)
            yield Finished(state.index, state.results)
        if exhausted and not opened:
            return
