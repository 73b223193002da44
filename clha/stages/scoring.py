"""The shards of `score`: scored by this process, or claimed by several with a reward model each."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clha.errors import StageFailure, TransientFailure, UserError
from clha.progress import Progress
from clha.schema import REWARDS
from clha.store import Artifact, ArtifactWriter, read_parquet

if TYPE_CHECKING:
    from clha.rewards.adapters import Folders, RewardScorer, Scored
    from clha.settings_rewards import RewardModel

_READ = ["prompt_id", "candidate_id", "text", "truncated_turns"]
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Scoring:
    """What is scored with what, and where it goes: all that a process needs to know."""

    reward: RewardModel
    model: Folders | list[Folders]
    fitted: Path | None
    prepare: Artifact
    generate: Artifact
    shard_size: int
    total: int  # candidates
    writer: ArtifactWriter

    @property
    def shards(self) -> int:
        return -(-self.total // self.shard_size)


@dataclass(frozen=True)
class Done:
    """What was scored now, not by an earlier attempt: seconds of it, candidates, tokens, padding among them, where."""

    seconds: float
    candidates: int
    tokens: int
    padded: int
    devices: str


def score_shards(scoring: Scoring, processes: int, progress: Progress) -> Done:
    """Score every shard that is not there yet. Raises UserError, StageFailure or TransientFailure."""
    from clha.rewards.adapters import scoring_device

    there = [scoring.writer.has_shard("rewards", i) for i in range(scoring.shards)]
    processes = min(processes, there.count(False))
    if processes > 1:
        return _in_processes(scoring, there, processes, progress)
    return _score(
        scoring, lambda i: not there[i], scoring_device(), lambda n: progress.update(n, scoring.total, "candidates")
    )


def _score(scoring: Scoring, claim: Callable[[int], bool], device: str, report: Callable[[int], None]) -> Done:
    """Score the shards that `claim` gives to this process; `report` hears up to which candidate it has come."""
    from clha.rewards.adapters import load_scorer

    columns = ["prompt_id", "messages"]
    messages = {r["prompt_id"]: r["messages"] for r in scoring.prepare.rows("prompts", columns)}
    scorer: RewardScorer | None = None
    fresh, start, seconds = 0, 0, 0.0
    with ExitStack() as opened:
        for index, rows in enumerate(_slices(scoring.generate.shards("candidates"), scoring.shard_size)):
            if claim(index):
                if scorer is None:
                    loaded = load_scorer(scoring.reward, scoring.model, scoring.fitted, device)
                    scorer = opened.enter_context(closing(loaded))
                began = time.monotonic()
                scored = scorer.score(_inputs(rows, messages), lambda n, before=start: report(before + n))  # type: ignore[misc]
                seconds += time.monotonic() - began
                good, bad = _rows(rows, scored)
                scoring.writer.write_quarantine(index, bad)
                scoring.writer.write_shard("rewards", index, good, REWARDS)
                fresh += len(rows)
            start += len(rows)
            report(start)
    padding = scorer.padding if scorer else None
    return Done(seconds, fresh, padding.tokens if padding else 0, padding.padded if padding else 0, device)


def _in_processes(scoring: Scoring, there: list[bool], processes: int, progress: Progress) -> Done:
    """Let several processes claim the shards; each takes the next GPU, or its part of the threads."""
    import torch

    devices = worker_devices(processes, torch.cuda.device_count())
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")
    claimed, results = context.Array("b", [int(t) for t in there]), context.SimpleQueue()
    workers = [
        context.Process(target=_worker, args=(scoring, claimed, results, device, threads), daemon=True)
        for device in devices
    ]
    answers: list[Done] = []
    for worker in workers:
        worker.start()
    try:
        while len(answers) < processes:
            if results.empty():
                dead = [w for w in workers if w.exitcode not in (None, 0)]
                if dead and results.empty():
                    raise TransientFailure(f"score: a process ended with {dead[0].exitcode}; see the log")
                finished = sum((scoring.writer.shard_path("rewards", i)).exists() for i in range(scoring.shards))
                progress.update(min(finished * scoring.shard_size, scoring.total), scoring.total, "candidates")
                time.sleep(_POLL_SECONDS)
                continue
            kind, answer = results.get()
            if kind != "done":
                raise {"user": UserError, "passing": TransientFailure}.get(kind, StageFailure)(answer)
            answers.append(answer)
    finally:
        for worker in workers:
            if len(answers) < processes:
                worker.terminate()
            worker.join()
    progress.update(scoring.total, scoring.total, "candidates")
    return Done(
        max(d.seconds for d in answers),
        sum(d.candidates for d in answers),
        sum(d.tokens for d in answers),
        sum(d.padded for d in answers),
        f"{', '.join(dict.fromkeys(devices))} ({processes} processes)",
    )


def worker_devices(processes: int, gpus: int) -> list[str]:
    """The device of each process: the GPUs in turn, the CPU where there is none."""
    return [f"cuda:{rank % gpus}" if gpus else "cpu" for rank in range(processes)]


def _worker(scoring: Scoring, claimed: Any, results: Any, device: str, threads: int) -> None:
    """One of several processes: claims shards in order until there is none left."""
    import torch

    torch.set_num_threads(threads)

    def claim(index: int) -> bool:
        with claimed.get_lock():
            mine = not claimed[index]
            claimed[index] = 1
        return mine

    try:
        results.put(("done", _score(scoring, claim, device, lambda n: None)))
    except UserError as error:
        results.put(("user", str(error)))
    except TransientFailure as error:
        results.put(("passing", str(error)))
    except StageFailure as error:
        results.put(("failure", str(error)))
    except Exception as error:  # the parent says it in one line; here is the traceback for the log
        traceback.print_exc()
        results.put(("failure", f"score: {type(error).__name__}: {error}"))


def _slices(shards: list[Any], size: int) -> Iterator[list[dict[str, Any]]]:
    """The candidates of all shards in order, `size` at a time."""
    pending: list[dict[str, Any]] = []
    for shard in shards:
        pending += read_parquet(shard, _READ).to_pylist()
        while len(pending) >= size:
            yield pending[:size]
            pending = pending[size:]
    if pending:
        yield pending


def _inputs(rows: list[dict[str, Any]], messages: dict[str, Any]) -> list[Any]:
    """What the reward model reads: the turns that the policy saw, and the response."""
    from clha.rewards.texts import RewardInput, without_oldest_turns

    return [RewardInput(without_oldest_turns(messages[r["prompt_id"]], r["truncated_turns"]), r["text"]) for r in rows]


def _rows(rows: list[dict[str, Any]], scored: Scored) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `rewards`, and the quarantine rows of candidates whose reward is not finite.

    `truncated`: the reward was given for less than the whole dialogue, whether its own limit or the policy's cut it.
    """
    from math import isfinite

    good, bad = [], []
    for i, row in enumerate(rows):
        reward, members = float(scored.rewards[i]), scored.members[i].tolist()
        if isfinite(reward) and all(isfinite(m) for m in members):
            good.append(
                {
                    "prompt_id": row["prompt_id"],
                    "candidate_id": row["candidate_id"],
                    "reward": reward,
                    "member_rewards": members,
                    "truncated": bool(scored.truncated[i]) or row["truncated_turns"] > 0,
                }
            )
        else:
            why = scored.problems.get(i, f"reward {reward}")
            detail = f"candidate {row['candidate_id']}: {why}"
            bad.append({"prompt_id": row["prompt_id"], "reason": "reward not finite", "detail": detail})
    return good, bad
