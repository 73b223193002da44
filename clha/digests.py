"""Content digests: of values (canonical JSON), of files, of model folders; file digests are remembered."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from clha.errors import UserError

_BLOCK = 1 << 22


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, non-ASCII kept: one text for one value."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def digest_of(value: Any) -> str:
    """sha256 (64 hex digits) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def prompt_id(messages: Iterable[dict[str, str]]) -> str:
    """The id of a prompt: 32 hex digits over the canonical JSON of its messages (role and content only)."""
    return digest_of([{"content": m["content"], "role": m["role"]} for m in messages])[:32]


def seed_of(*parts: Any) -> int:
    """A seed in [0, 2**31) that depends on the parts only, not on order, place or time of the work."""
    return int(digest_of(list(parts))[:8], 16) & 0x7FFFFFFF


def unit_of(*parts: Any) -> float:
    """A number in [0, 1) that depends on the parts only."""
    return int(digest_of(list(parts))[:13], 16) / 16**13


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(_BLOCK):
            h.update(block)
    return h.hexdigest()


class FileDigests:
    """File digests remembered by path, size, modification time and inode, in one SQLite file."""

    def __init__(self, database: Path) -> None:
        self._database = database

    def of(self, path: Path) -> str:
        """sha256 of the file at `path`, computed only when the file changed since the last call.

        Raises UserError when the file cannot be read.
        """
        try:
            stat = path.stat()
            state = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
            return self._looked_up(path, state)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"{path}: cannot be read ({reason}); check the file and its permissions") from error

    def _looked_up(self, path: Path, state: tuple[str, int, int, int]) -> str:
        try:
            return self._remembered(path, state)
        except sqlite3.OperationalError:  # locked for too long, or no room: memory is a convenience
            return file_sha256(path)
        except sqlite3.DatabaseError:  # damaged; all that is in it can be computed
            self._database.with_name(f"{self._database.name}-journal").unlink(missing_ok=True)
            self._database.unlink(missing_ok=True)
            return self._remembered(path, state)

    def _remembered(self, path: Path, state: tuple[str, int, int, int]) -> str:
        with closing(self._connection()) as db:
            row = db.execute(
                "select sha256 from digest where path = ? and size = ? and mtime = ? and inode = ?", state
            ).fetchone()
        if row:
            return str(row[0])
        sha = file_sha256(path)  # no connection is open meanwhile: others are not kept waiting
        with closing(self._connection()) as db, db:
            db.execute("insert or replace into digest values (?, ?, ?, ?, ?)", (*state, sha))
        return sha

    def _connection(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._database, timeout=30)
        try:
            with db:
                db.execute("create table if not exists digest (path text primary key, size, mtime, inode, sha256)")
        except BaseException:
            db.close()
            raise
        return db

    def of_files(self, files: Iterable[Path], root: Path) -> str:
        """One digest of several files: their names below `root` and their contents."""
        return digest_of(sorted((str(f.relative_to(root)), self.of(f)) for f in files))
