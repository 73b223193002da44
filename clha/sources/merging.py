"""Rows on disk until all are known: further pairs of a prompt join it, first turns get their split, limits cut.

A SQLite file holds them, so that a million rows need little memory and a run that was killed need not read again.
"""

import heapq
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clha.digests import prompt_id
from clha.settings import Limits, Splits
from clha.sources.rows import BadRow, Row
from clha.sources.splits import first_user_turn, limit_order, split_of

_TABLES = """
create table head (seq integer primary key, prompt_id text, first text, chosen integer, rejected integer);
create table body (seq integer primary key, row text);
create table bad (seq integer primary key, prompt_id text, reason text, detail text);
"""
_BATCH = 5000
_CACHE_KIB = 131_072


@dataclass
class Merged:
    """Responses that merging left out: those repeated for a prompt, and those that were on both sides."""

    repeated: int = 0
    contradicted: int = 0


def collect(rows: Iterable[Row | BadRow], database: Path) -> None:
    """Write all rows to a new database, which appears under its name when the last one is in it.

    Raises OSError (errno 28) when the disk is full.
    """
    partial = database.with_suffix(".partial")
    for left in (partial, Path(f"{partial}-journal")):
        left.unlink(missing_ok=True)
    with closing(sqlite3.connect(partial)) as db, _disk_errors():
        # A half-written file is thrown away, never read.
        db.executescript("pragma synchronous = off; pragma journal_mode = off;")
        db.executescript(_TABLES)
        good: list[tuple[Any, ...]] = []
        bad: list[tuple[Any, ...]] = []
        for seq, row in enumerate(rows):
            if isinstance(row, BadRow):
                bad.append((seq, row.prompt_id, row.reason, row.detail))
            else:
                body = [row.source, row.subset, row.messages, row.chosen, row.rejected]
                name, first = prompt_id(row.messages), first_user_turn(row.messages)
                text = json.dumps(body, ensure_ascii=False)
                good.append((seq, name, first, bool(row.chosen), bool(row.rejected), text))
            if len(good) + len(bad) >= _BATCH:
                _flush(db, good, bad)
        _flush(db, good, bad)
        db.execute("create index head_prompt on head (prompt_id, seq)")
        db.commit()
    partial.replace(database)


def _flush(db: sqlite3.Connection, good: list[tuple[Any, ...]], bad: list[tuple[Any, ...]]) -> None:
    db.executemany("insert into head values (?, ?, ?, ?, ?)", (row[:5] for row in good))
    db.executemany("insert into body values (?, ?)", ((row[0], row[5]) for row in good))
    db.executemany("insert into bad values (?, ?, ?, ?)", bad)
    db.commit()
    good.clear()
    bad.clear()


class Collected:
    """The collected rows, opened to be divided and read as prompts."""

    def __init__(self, database: Path) -> None:
        self._db = sqlite3.connect(database)
        self._db.execute("pragma temp_store = file")
        self._db.execute(f"pragma cache_size = -{_CACHE_KIB}")
        self.good = self._count("select count(*) from head")
        self.bad = self._count("select count(*) from bad")

    def close(self) -> None:
        self._db.close()

    def bad_rows(self, start: int, count: int) -> list[dict[str, Any]]:
        """`count` quarantined rows in the order of the source, from number `start` on."""
        rows = self._db.execute(
            "select prompt_id, reason, detail from bad order by seq limit ? offset ?", (count, start)
        )
        return [{"prompt_id": p, "reason": r, "detail": d} for p, r, d in rows]

    def bad_reasons(self) -> list[tuple[str, int, str]]:
        """(reason, rows, detail of the first) of the quarantined rows, the commonest first."""
        return self._db.execute(
            "select reason, count(*) as n, (select detail from bad b where b.reason = bad.reason order by seq limit 1)"
            " from bad group by reason order by n desc, reason"
        ).fetchall()

    def divide(self, shares: Splits, seed: int, limits: Limits) -> tuple[int, dict[str, int]]:
        """Give every prompt its split and cut each split to its limit.

        Returns (prompts kept, {split: prompts that its limit left out}). Kept prompts are numbered in the order in
        which they first appear in the source.
        """
        self._db.create_function("split_of", 2, lambda first, pair: split_of(first, bool(pair), shares, seed))
        with _disk_errors():
            self._db.executescript(
                """
                drop table if exists prompt;
                drop table if exists turn;
                drop table if exists kept;
                create temp table merged as
                    select prompt_id, min(seq) as seq, first, max(chosen) and max(rejected) as pair
                    from head group by prompt_id;
                create temp table turn as
                    select first, split_of(first, max(pair)) as split from merged group by first;
                create index temp.turn_first on turn (first);
                create table prompt as select prompt_id, seq, split from merged join turn using (first) order by seq;
                drop table merged;
                drop table turn;
                """
            )
            dropped = self._cut(limits)
            self._db.executescript(
                "create table kept (number integer primary key, prompt_id text, split text);"
                "insert into kept select row_number() over (order by seq) - 1, prompt_id, split from prompt "
                "where split != '' order by seq;"
            )
            self._db.commit()
        return self._count("select count(*) from kept"), dropped

    def _cut(self, limits: Limits) -> dict[str, int]:
        dropped = {}
        for split, limit in limits:
            there = self._count("select count(*) from prompt where split = ?", split)
            if limit is None or there <= limit:
                continue
            ids = (row[0] for row in self._db.execute("select prompt_id from prompt where split = ?", (split,)))
            stay = heapq.nsmallest(limit, ids, key=limit_order)
            self._db.execute("create temp table stay (prompt_id text primary key)")
            self._db.executemany("insert into stay values (?)", ((i,) for i in stay))
            self._db.execute(
                "update prompt set split = '' where split = ? and prompt_id not in (select prompt_id from stay)",
                (split,),
            )
            self._db.execute("drop table stay")
            dropped[split] = there - limit
        return dropped

    def merged_rows(self) -> int:
        """Good rows that joined an earlier row of their prompt."""
        return self.good - self._count("select count(*) from prompt")

    def prompts(self, start: int, stop: int, merged: Merged) -> Iterator[dict[str, Any]]:
        """The kept prompts with numbers in [start, stop), as rows of the table `prompts`; counts into `merged`."""
        found = self._db.execute(
            "select kept.prompt_id, kept.split, body.row from kept join head using (prompt_id) join body using (seq) "
            "where number >= ? and number < ? order by number, seq",
            (start, stop),
        )
        current: dict[str, Any] | None = None
        for name, split, body in found:
            source, subset, messages, chosen, rejected = json.loads(body)
            if current is None or current["prompt_id"] != name:
                if current is not None:
                    yield _settled(current, merged)
                current = {"prompt_id": name, "source": source, "subset": subset, "split": split}
                current |= {"messages": messages, "chosen": chosen, "rejected": rejected}
                continue
            for side, more in (("chosen", chosen), ("rejected", rejected)):
                new = [response for response in more if response not in current[side]]
                merged.repeated += len(more) - len(new)
                current[side] = current[side] + new
        if current is not None:
            yield _settled(current, merged)

    def _count(self, query: str, *values: Any) -> int:
        return int(self._db.execute(query, values).fetchone()[0])


def _settled(prompt: dict[str, Any], merged: Merged) -> dict[str, Any]:
    """Take responses that are both chosen and rejected out of both lists: the middle of three, or a contradiction."""
    both = set(prompt["chosen"]) & set(prompt["rejected"])
    merged.contradicted += len(both)
    for side in ("chosen", "rejected"):
        prompt[side] = [response for response in prompt[side] if response not in both]
    return prompt


class _disk_errors:
    """SQLite's "disk is full" as the OSError that everything else raises."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
            raise OSError(28, "No space left on device") from error
