"""Ids and seeds depend on content only."""

import hashlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from clha.digests import FileDigests, canonical_json, digest_of, prompt_id, seed_of, unit_of
from clha.errors import UserError


def test_prompt_id_is_the_documented_digest():
    text = '[{"content":"Grüße, 你好","role":"user"}]'
    assert prompt_id([{"role": "user", "content": "Grüße, 你好"}]) == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_prompt_id_ignores_other_fields_and_their_order():
    assert prompt_id([{"content": "a", "role": "user", "name": "x"}]) == prompt_id([{"role": "user", "content": "a"}])


def test_prompt_id_survives_lone_surrogates():
    assert len(prompt_id([{"role": "user", "content": "\ud800"}])) == 32


def test_canonical_json_has_one_text_for_one_value():
    assert canonical_json({"b": 1, "a": [1, {"d": None, "c": "ü"}]}) == '{"a":[1,{"c":"ü","d":null}],"b":1}'
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_seeds_fit_31_bits_and_differ_by_part():
    seeds = {seed_of(0, f"p{i}") for i in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**31 for s in seeds)
    assert seed_of(0, "p") == seed_of(0, "p") != seed_of(1, "p")


def test_unit_numbers_are_spread_over_zero_to_one():
    units = [unit_of("s", i) for i in range(2000)]
    assert 0 <= min(units) and max(units) < 1
    assert abs(sum(u < 0.3 for u in units) / 2000 - 0.3) < 0.05


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database that remembers the digests of 300 files."""
    database = tmp_path / "digests.sqlite"
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    with sqlite3.connect(database) as db:
        FileDigests(database).of(tmp_path / "0.txt")
        state = [(str(tmp_path / f"{i}.txt"), 1, 2, 3, "0" * 64) for i in range(1, 300)]
        db.executemany("insert into digest values (?, ?, ?, ?, ?)", state)
    db.close()
    return database


def cut(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


def overwrite(database: Path) -> None:
    with open(database, "r+b") as f:
        f.seek(4096)
        f.write(b"x" * (database.stat().st_size - 4096))


@pytest.mark.parametrize("damage", [lambda database: database.write_bytes(b"no database " * 99), cut, overwrite])
def test_a_damaged_memory_of_digests_is_made_anew(database: Path, damage: Callable[[Path], None]):
    damage(database)
    for i in (0, 299):
        text = f"text {i}".encode()
        assert FileDigests(database).of(database.with_name(f"{i}.txt")) == hashlib.sha256(text).hexdigest()
    with sqlite3.connect(database) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        assert db.execute("select count(*) from digest").fetchone() == (2,)
    db.close()


def test_without_room_for_its_memory_a_digest_is_still_given(tmp_path: Path):
    file = tmp_path / "a"
    file.write_text("one")
    assert FileDigests(tmp_path / "no folder" / "digests.sqlite").of(file) == hashlib.sha256(b"one").hexdigest()


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path):
    """A folder in the file's place fails as a file without permission does, also for the superuser."""
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"a: cannot be read \(is a directory\)"):
        FileDigests(tmp_path / "digests.sqlite").of(tmp_path / "a")


def test_a_digest_is_remembered_until_the_file_changes_and_no_connection_stays_open(tmp_path: Path):
    digests, file = FileDigests(tmp_path / "digests.sqlite"), tmp_path / "a"
    file.write_text("one")
    first = digests.of(file)
    with sqlite3.connect(tmp_path / "digests.sqlite") as db:
        db.execute("update digest set sha256 = 'remembered'")
    db.close()
    assert digests.of(file) == "remembered"
    file.write_text("two!")
    assert digests.of(file) == hashlib.sha256(b"two!").hexdigest() != first
    opened = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert not [name for name in opened if "digests.sqlite" in name]
