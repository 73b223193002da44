"""Prompts in, rows out: shard by shard, resumable, with every prompt either in the rows or in the quarantine."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clha.chat import Chat, EncodedPrompt, Unusable
from clha.errors import UserError
from clha.generation.requests import Engine, Finished, Request, Result, run_shards
from clha.progress import Progress
from clha.store import ArtifactWriter, write_atomic

Row = dict[str, Any]
# (prompt row, encoded prompt, the engine's result, counts) -> rows; raises Unusable
MakeRows = Callable[[Row, EncodedPrompt, Result, "Counter[str]"], list[Row]]


_REPORT_SECONDS = 0.5
_COUNTED = ("tokens_in", "tokens_out", "truncated_prompts")


@dataclass(frozen=True)
class Plan:
    """What is generated: one table of an artifact, from prompts in shards."""

    table: str
    schema: pa.Schema
    prompts: Sequence[Row]  # of the table `prompts`, sorted by prompt_id
    shard_size: int
    max_prompt_tokens: int
    tokens_per_prompt: int  # at most generated for one, all samples together
    seed_of: Callable[[str], int | None]  # seed of a prompt id
    counted: Sequence[str] = ()  # counts that `make_rows` adds to, so that zeros are in the manifest too


@dataclass(frozen=True)
class Done:
    """What came of it: `counts` are those of all shards, speed and cache hits those of this process's own part."""

    rows_out: int
    counts: "Counter[str]"
    identity: dict[str, Any]  # of the engine: `engine`, `device`
    tokens_per_second: float | None
    prefix_cache_hits: int | None

    def manifest_fields(self) -> dict[str, Any]:
        """The fields that generated artifacts have in their manifest."""
        finish = {k.removeprefix("finish_"): v for k, v in sorted(self.counts.items()) if k.startswith("finish_")}
        plain = {k: v for k, v in sorted(self.counts.items()) if not k.startswith("finish_")}
        return {
            **self.identity,
            **plain,
            "finish_reasons": finish,
            "tokens_per_second": self.tokens_per_second,
            "prefix_cache_hits": self.prefix_cache_hits,
        }


def generate_shards(
    writer: ArtifactWriter,
    progress: Progress,
    plan: Plan,
    chat: Chat,
    open_engine: Callable[[], Engine],
    make_rows: MakeRows,
) -> Done:
    """Write all shards of `plan` that an earlier attempt did not finish.

    The engine is opened only when there is something to do. Raises UserError when there are no prompts, and what the
    engine raises; finished shards stay.
    """
    if not plan.prompts:
        raise UserError(f"there are no prompts to make {plan.table} for; see prepare.splits and prepare.limits")
    cut = range(0, len(plan.prompts), plan.shard_size)
    shards = {index: plan.prompts[start : start + plan.shard_size] for index, start in enumerate(cut)}
    todo = {index: rows for index, rows in shards.items() if not writer.has_shard(plan.table, index)}
    rate: float | None = None
    hits: int | None = None
    if todo:
        before = sum(len(rows) for index, rows in shards.items() if index not in todo)
        if before:
            progress.log(f"{before} of {len(plan.prompts)} prompts were finished by an earlier attempt")
        engine = open_engine()
        try:
            rate = _Run(writer, progress, plan, chat, make_rows, engine, before).run(todo)
            hits = engine.prefix_cache_hits()
        finally:
            engine.close()
    counts = Counter(dict.fromkeys((*_COUNTED, *plan.counted), 0))
    identity: dict[str, Any] = {}
    for index in shards:
        record = json.loads(_record_path(writer, plan.table, index).read_text(encoding="utf-8"))
        counts.update(record["counts"])
        identity = record["identity"]
    rows_out = len(pc.unique(writer.read(plan.table, ["prompt_id"])["prompt_id"]))
    return Done(rows_out, counts, identity, rate, hits)


def _record_path(writer: ArtifactWriter, table: str, index: int) -> Path:
    return writer.scratch / f"{table}-{index:05d}.json"


class _Run:
    """One pass over the shards that are to do."""

    def __init__(
        self,
        writer: ArtifactWriter,
        progress: Progress,
        plan: Plan,
        chat: Chat,
        make_rows: MakeRows,
        engine: Engine,
        done: int,
    ) -> None:
        self._writer, self._progress, self._plan, self._chat = writer, progress, plan, chat
        self._make_rows, self._engine, self._done = make_rows, engine, done
        self._tokens = 0
        self._started = self._reported = time.monotonic()
        self._encoded: dict[str, EncodedPrompt] = {}
        self._refused: dict[str, Unusable] = {}

    def run(self, todo: dict[int, Sequence[Row]]) -> float:
        """Write the shards `todo`; returns the generated tokens per second."""
        for event in run_shards(self._engine, self._requests(todo)):
            if isinstance(event, Finished):
                self._write(event, todo[event.index])
            else:
                self._done += len(event)
                self._tokens += sum(len(s.token_ids) for result in event for s in result.samples)
            self._report()
        return round(self._tokens / self._seconds(), 1)

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def _report(self) -> None:
        """Progress in prompts; tokens of unfinished ones count as the share of a prompt that they are at least."""
        total, now = len(self._plan.prompts), time.monotonic()
        if self._done < total and now < self._reported + _REPORT_SECONDS:
            return
        self._reported = now
        tokens = max(self._engine.tokens_generated() or 0, self._tokens)
        begun = int((tokens - self._tokens) / self._plan.tokens_per_prompt)
        done = self._done if self._done == total else min(self._done + begun, total - 1)
        self._progress.update(done, total, "prompts", f"{tokens / self._seconds():.0f} tokens/s")

    def _requests(self, todo: dict[int, Sequence[Row]]) -> Iterator[tuple[int, list[Request]]]:
        for index, prompts in todo.items():
            requests = []
            for prompt in prompts:
                prompt_id = prompt["prompt_id"]
                try:
                    self._chat.check_markers(m["content"] for m in prompt["messages"])
                    encoded = self._chat.encode_prompt(prompt["messages"], self._plan.max_prompt_tokens)
                except Unusable as refused:
                    self._refused[prompt_id] = refused
                    self._done += 1
                    continue
                self._encoded[prompt_id] = encoded
                requests.append(Request(prompt_id, encoded.token_ids, self._plan.seed_of(prompt_id)))
            yield index, requests

    def _write(self, shard: Finished, prompts: Sequence[Row]) -> None:
        """Quarantine and record first: where the shard is, they are too."""
        rows: list[Row] = []
        quarantine: list[Row] = []
        counts: Counter[str] = Counter()
        for prompt in prompts:
            prompt_id = prompt["prompt_id"]
            try:
                if prompt_id in self._refused:
                    raise self._refused.pop(prompt_id)
                encoded, result = self._encoded.pop(prompt_id), shard.results[prompt_id]
                made = self._make_rows(prompt, encoded, result, counts)
            except Unusable as refused:
                quarantine.append({"prompt_id": prompt_id, "reason": refused.reason, "detail": refused.detail})
                continue
            rows += made
            counts["tokens_in"] += len(encoded.token_ids)
            counts["tokens_out"] += sum(len(s.token_ids) for s in result.samples)
            counts["truncated_prompts"] += encoded.truncated_turns > 0
        self._writer.write_quarantine(shard.index, quarantine)
        record = {"counts": counts, "identity": self._engine.identity}
        write_atomic(_record_path(self._writer, self._plan.table, shard.index), json.dumps(record).encode())
        self._writer.write_shard(self._plan.table, shard.index, rows, self._plan.schema)
