"""Artifacts on disk: atomic shards, quarantine, manifests, locks.

An artifact is a folder `artifacts/<kind>/<key>/` that appears whole or not at all: its files are written in
`work/<kind>/<key>/` (each to a temporary name, fsynced, renamed), the manifest last, and then the folder is moved.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from clha.digests import FileDigests, digest_of, file_sha256
from clha.errors import StageFailure, UserError
from clha.schema import QUARANTINE, SCHEMA_VERSION

# Files of an artifact that record how it was made, not what it is: they do not count for the content digest.
RECORDS = ("metrics-", "events.out.", "README.md", "runs/", "quarantine-", "report")


def kind_of(node: str) -> str:
    """The kind of a node: `answers` for `round-2/answers.trained`."""
    return node.split("/")[-1].split(".")[0]


class Busy(UserError):
    """Somebody else is writing the same thing."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Make a file's content, or the renames in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_parquet_atomic(path: Path, table: pa.Table) -> None:
    """Write a Parquet file (zstd, page checksums) as `write_atomic` does."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomic(path, sink.getvalue().to_pybytes())


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, checking its page checksums.

    Raises StageFailure when it is damaged.
    """
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise StageFailure(f"{path}: damaged Parquet file ({str(error).splitlines()[0]})") from error


@dataclass(frozen=True)
class Artifact:
    """A finished artifact."""

    folder: Path
    manifest: dict[str, Any] = field(repr=False)

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    @cached_property
    def content(self) -> str:
        """Digest of what the artifact is: names and digests of its files but the records of its making."""
        return digest_of(
            sorted(
                (f["name"], f["sha256"])
                for f in self.manifest["files"]
                if not any(f["name"].rsplit("/", 1)[-1].startswith(r) or f["name"].startswith(r) for r in RECORDS)
            )
        )

    def content_of(self, splits: Sequence[str]) -> str | dict[str, str]:
        """What the artifact is to a reader of some splits: a digest of the rows of each, where the manifest has them.

        Otherwise, and for an artifact without splits, `content`.
        """
        contents = self.manifest.get("split_contents")
        return {split: contents[split] for split in splits} if splits and contents else self.content

    def shards(self, table: str) -> list[Path]:
        """The Parquet files of a table, in order."""
        names = sorted(f["name"] for f in self.manifest["files"])
        return [self.folder / n for n in names if n.startswith(f"{table}-") and n.endswith(".parquet")]

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """A whole table in memory. Raises StageFailure when a shard is damaged or the table is missing."""
        shards = self.shards(table)
        if not shards:
            raise StageFailure(f"{self.folder}: has no table {table}")
        return pa.concat_tables(read_parquet(s, columns) for s in shards)

    def rows(self, table: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
        """A table as a list of dicts."""
        return self.read(table, columns).to_pylist()  # type: ignore[no-any-return]

    def damage(self, deep: bool = False) -> str | None:
        """What is wrong with the files (missing, other size; with `deep`, other bytes), or None."""
        for f in self.manifest["files"]:
            path = self.folder / f["name"]
            if not path.is_file():
                return f"{f['name']} is missing"
            if path.stat().st_size != f["bytes"]:
                return f"{f['name']} has another size than its manifest says"
            if deep and file_sha256(path) != f["sha256"]:
                return f"{f['name']} is not what its manifest says"
        return None


class Home:
    """The folder under which everything lies that runs make (CLHA_HOME)."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.artifacts = self.root / "artifacts"
        self.work = self.root / "work"
        self.locks = self.root / "locks"
        self.runs = self.root / "runs"
        self.models = self.root / "models"
        self.prefect = self.root / "prefect"
        self.reports = self.root / "reports"
        self.logs = self.root / "logs"

    def create(self) -> "Home":
        """Make the folder. Raises UserError when it cannot be written."""
        try:
            for folder in (self.root, self.locks, self.work, self.runs, self.models):
                folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise UserError(
                f"{self.root}: cannot be written ({error.strerror}); set CLHA_HOME to a folder that can"
            ) from None
        return self

    @cached_property
    def digests(self) -> FileDigests:
        return FileDigests(self.root / "digests.sqlite")

    def artifact_folder(self, kind: str, key: str) -> Path:
        return self.artifacts / kind / key

    def find(self, kind: str, key: str) -> Artifact | None:
        """The finished artifact, or None when there is none or its files are not those of its manifest."""
        artifact = self.find_any(kind, key)
        return artifact if artifact and artifact.damage() is None else None

    def find_any(self, kind: str, key: str) -> Artifact | None:
        """The artifact also when it is damaged; None when there is no readable manifest."""
        folder = self.artifact_folder(kind, key)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            return Artifact(folder, manifest) if manifest["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put_aside(self, artifact: Artifact) -> Path:
        """Move a damaged artifact out of the way, so that it is built anew; returns where it lies now."""
        aside = self.root / "damaged" / artifact.folder.parent.name / f"{artifact.folder.name}-{time.time_ns()}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        artifact.folder.rename(aside)
        return aside

    @contextmanager
    def lock(self, name: str, wait_seconds: float = 0) -> Iterator[None]:
        """Hold the lock `name`. It dies with its owner. Raises Busy when another holds it for too long."""
        self.locks.mkdir(parents=True, exist_ok=True)
        path = self.locks / f"{name}.lock"
        held = FileLock(path)
        try:
            held.acquire(timeout=wait_seconds)
        except Timeout:
            raise Busy(f"{name} is being worked on by another process; wait for it, or end it first") from None
        try:
            yield
        finally:
            held.release()

    def check_free_disk(self, gigabytes: float, kind: str, key: str) -> None:
        """Raises UserError when less than `gigabytes` (10**9 bytes) are free.

        What an earlier attempt at the artifact left counts as free: the next one goes on from it.
        """
        left = 0
        for folder, _, names in os.walk(self.work / kind / key):
            for name in names:
                with suppress(FileNotFoundError):  # another run may be at work on the same artifact
                    left += os.stat(os.path.join(folder, name)).st_size
        free = (shutil.disk_usage(self.root).free + left) / 1e9
        if free < gigabytes:
            raise UserError(
                f"{self.root}: {free:.1f} GB free, {gigabytes:g} GB wanted (execution.min_free_disk_gb); "
                "make room or set CLHA_HOME to another disk"
            )


class ArtifactWriter:
    """Writes one artifact, shard by shard; shards that an earlier attempt finished are kept.

    Use it inside `home.lock(f"{kind}-{key}")`: there is one writer for each artifact.
    """

    def __init__(self, home: Home, kind: str, key: str) -> None:
        self.home, self.kind, self.key = home, kind, key
        base = home.work / kind / key
        self.folder = base / "artifact"  # what will be the artifact
        self.scratch = base / "scratch"  # checkpoints and other things that go away
        self._base = base
        self._started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(parents=True, exist_ok=True)
        for left in self.folder.rglob(".tmp-*"):
            left.unlink()
        (self.folder / "manifest.json").unlink(missing_ok=True)

    def shard_path(self, table: str, index: int) -> Path:
        return self.folder / f"{table}-{index:05d}.parquet"

    def has_shard(self, table: str, index: int) -> bool:
        """Whether an earlier attempt finished this shard; a damaged one is removed."""
        path = self.shard_path(table, index)
        if not path.exists():
            return False
        try:
            read_parquet(path)
            return True
        except StageFailure:
            path.unlink()
            return False

    def write_shard(
        self, table: str, index: int, rows: list[dict[str, Any]] | pa.Table, schema: pa.Schema | None = None
    ) -> None:
        """Write one shard of a table; `rows` are dicts (then `schema` is needed) or an Arrow table."""
        data = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=schema)
        write_parquet_atomic(self.shard_path(table, index), data)

    def write_quarantine(self, index: int, rows: list[dict[str, Any]]) -> None:
        """Write the quarantined rows of shard `index` (prompt_id, reason, detail), before the shard itself."""
        if rows:
            self.write_shard("quarantine", index, rows, QUARANTINE)
        else:  # what an attempt left that died between the quarantine and its shard
            self.shard_path("quarantine", index).unlink(missing_ok=True)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file of the artifact."""
        write_atomic(self.folder / name, data)

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """What has been written of a table so far."""
        return pa.concat_tables(read_parquet(s, columns) for s in sorted(self.folder.glob(f"{table}-*.parquet")))

    def quarantined(self) -> dict[str, int]:
        """Quarantined rows by reason."""
        counts: dict[str, int] = {}
        for shard in sorted(self.folder.glob("quarantine-*.parquet")):
            for reason in read_parquet(shard, ["reason"])["reason"].to_pylist():
                counts[reason] = counts.get(reason, 0) + 1
        return counts

    def finish(self, *, rows_in: int, rows_out: int, facts: dict[str, Any]) -> Artifact:
        """Write the manifest and move the folder to its place.

        `facts`: the other manifest fields (see docs/data-formats.md). Raises StageFailure when
        rows_in != rows_out + quarantined.
        """
        quarantined = self.quarantined()
        bad = sum(quarantined.values())
        if rows_in != rows_out + bad:
            raise StageFailure(
                f"{self.kind}: {rows_in} rows in, but {rows_out} out and {bad} quarantined; rows were lost or doubled"
            )
        files = []
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            fsync(path)  # libraries that write models and events do not
            parquet = path.suffix == ".parquet"
            files.append(
                {
                    "name": str(path.relative_to(self.folder)),
                    "rows": pq.read_metadata(path).num_rows if parquet else None,
                    "bytes": path.stat().st_size,
                    "sha256": file_sha256(path),
                }
            )
        manifest = {
            "kind": self.kind,
            "key": self.key,
            "schema_version": SCHEMA_VERSION,
            **facts,
            "files": files,
            "rows_in": rows_in,
            "rows_out": rows_out,
            "rows_quarantined": bad,
            "quarantined": quarantined,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._started, 3),
        }
        write_atomic(self.folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        final = self.home.artifact_folder(self.kind, self.key)
        if final.exists():  # a damaged one: put aside in one rename, so that no reader sees a half
            aside = self.home.work / f".damaged-{self.kind}-{self.key}-{os.getpid()}"
            final.rename(aside)
            shutil.rmtree(aside)
        final.parent.mkdir(parents=True, exist_ok=True)
        self.folder.rename(final)
        fsync(final.parent)
        shutil.rmtree(self._base)
        return Artifact(final, manifest)
