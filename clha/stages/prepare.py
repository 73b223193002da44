"""prepare: a source of prompts and preference pairs becomes the table `prompts`, one row per prompt, with splits."""

import hashlib
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from clha.digests import canonical_json
from clha.errors import StageFailure, UserError
from clha.schema import PROMPTS, SPLITS
from clha.sources.files import source_paths
from clha.sources.lines import Meter
from clha.sources.merging import Collected, Merged, collect
from clha.sources.reading import read_source
from clha.sources.rows import BadRow, Row
from clha.sources.splits import SplitCheck
from clha.store import Artifact, read_parquet

if TYPE_CHECKING:
    from clha.stages.work import Work

CODE_VERSION = {"prepare": 1}


def build(work: "Work") -> Artifact:
    """Read the source, merge the rows of each prompt, divide, limit, write.

    `rows_in` counts the prompts that are written and the rows that are quarantined; the manifest says in
    `source_rows`, `merged_rows` and `dropped_by_limits` what became of all others. Raises UserError for data that
    cannot be read, is empty, has too many bad rows or leaves a needed split empty.
    """
    database = work.writer.scratch / "rows.sqlite"
    try:
        if not database.exists():
            collect(_rows(work), database)
        with closing(Collected(database)) as rows:
            return _write(work, rows)
    except UserError:
        database.unlink(missing_ok=True)  # these settings cannot work: nobody will come back for it
        raise


def _rows(work: "Work") -> Iterator[Row | BadRow]:
    meter = Meter()
    for row in read_source(work.settings.prepare, meter):
        yield row
        # The total is the source's, and not reached before the last row is here.
        work.progress.update(meter.done, max(meter.total, meter.done + 1), meter.unit, "reading")


def _write(work: "Work", rows: Collected) -> Artifact:
    settings = work.settings.prepare
    source_rows = rows.good + rows.bad
    if not source_rows:
        raise UserError(f"prepare: no rows in {', '.join(source_paths(settings))}; give data with prepare.path")
    _write_quarantine(work, rows)
    work.check_quarantine(source_rows, settings.max_quarantined, "prepare.max_quarantined")
    if not rows.good:
        raise UserError(f"prepare: none of the {source_rows} rows can be used; see the reasons in the quarantine")
    kept, dropped = rows.divide(settings.splits, settings.split_seed, settings.limits)
    merged = _write_prompts(work, rows, kept)
    facts = _checked(work)
    prompts = sum(facts["splits"].values())
    if source_rows != prompts + rows.bad + rows.merged_rows() + sum(dropped.values()):
        raise StageFailure(f"prepare: {source_rows} rows read, {prompts} prompts written; rows were lost or doubled")
    return work.finish(
        rows_in=prompts + rows.bad,
        rows_out=prompts,
        seed=settings.split_seed,
        device="cpu",
        source_rows=source_rows,
        merged_rows=rows.merged_rows(),
        dropped_by_limits=dropped,
        repeated_responses=merged.repeated,
        contradicted_responses=merged.contradicted,
        **facts,
    )


def _write_quarantine(work: "Work", rows: Collected) -> None:
    size = work.settings.prepare.shard_size
    for i in range(-(-rows.bad // size)):
        if not work.writer.has_shard("quarantine", i):
            work.writer.write_quarantine(i, rows.bad_rows(i * size, size))
    for reason, count, first in rows.bad_reasons():
        work.progress.log(f"quarantined: {reason} {count} (first: {first})")


def _write_prompts(work: "Work", rows: Collected, kept: int) -> Merged:
    size = work.settings.prepare.shard_size
    merged = Merged()
    for i in range(-(-kept // size)):
        # A shard that an earlier attempt finished is gone through once more, for the counts only.
        prompts = rows.prompts(i * size, (i + 1) * size, merged)
        if work.writer.has_shard("prompts", i):
            deque(prompts, maxlen=0)
        else:
            work.writer.write_shard("prompts", i, list(prompts), PROMPTS)
        work.progress.update(min(kept, (i + 1) * size), kept, "prompts", "writing")
    return merged


def _checked(work: "Work") -> dict[str, Any]:
    """Check what was written: splits apart, needed ones not empty. Returns counts and digests for the manifest.

    `split_contents`: a digest of the rows of each split, in order. Whoever reads some splits depends on no other.
    """
    check = SplitCheck()
    contents = {split: hashlib.sha256() for split in SPLITS}
    splits, pairs, subsets = Counter[str](), Counter[str](), Counter[str]()
    for shard in sorted(work.writer.folder.glob("prompts-*.parquet")):
        for row in read_parquet(shard).to_pylist():
            contents[row["split"]].update(f"{canonical_json(row)}\n".encode("utf-8", "surrogatepass"))
            check.add(row["messages"], row["split"])
            splits[row["split"]] += 1
            subsets[row["subset"]] += 1
            pairs[row["split"]] += bool(row["chosen"] and row["rejected"])
    settings = work.settings
    needed = {"train": splits, settings.evaluate.split: splits}
    if settings.fit_reward is not None and settings.rescore.reward.uses_fitted:
        needed["reward_train"] = pairs
    if settings.fit_reward is not None and settings.evaluate.reward.uses_fitted:
        needed["reward_eval"] = pairs
    for split, counts in needed.items():
        if not counts[split]:
            what = "preference pairs" if counts is pairs else "prompts"
            share = getattr(settings.prepare.splits, split)
            raise UserError(
                f"prepare: no {what} in split {split} (prepare.splits.{split} = {share:g}, "
                f"{sum(splits.values())} prompts in all); raise the share or give more data"
            )
    return {
        "splits": {split: splits[split] for split in SPLITS},
        "pairs": {split: pairs[split] for split in SPLITS},
        "subsets": dict(sorted(subsets.items())),
        "split_contents": {split: digest.hexdigest() for split, digest in contents.items()},
    }
