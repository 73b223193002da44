"""Run files: names cannot leave their folder, what is written is read back, damage is one line."""

import os
from pathlib import Path

import pytest

from clha.errors import UserError
from clha.runs import Run, check_run_name, existing_run, load_run, run_lock, run_names, save_run
from clha.store import Busy, Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path).create()


def test_what_a_killed_process_left_half_written_is_no_run(home: Home):
    save_run(home, Run("old", "demo", {}))
    save_run(home, Run("new", "demo", {}))
    os.utime(home.runs / "old.json", (1, 1))
    (home.runs / ".tmp-99-new.json").write_text("{")
    assert run_names(home) == ["old", "new"]


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b", "a\n", "-x", "x" * 101, "ä", "a\\b", "a\0"])
def test_names_that_could_leave_the_folder_are_refused(name: str):
    with pytest.raises(UserError, match="run name"):
        check_run_name(name)


@pytest.mark.parametrize("name", ["demo", "nightly-2026.01.02", "A_1"])
def test_plain_names_are_taken(name: str):
    assert check_run_name(name) == name


def test_a_run_is_read_back_as_written(home: Home):
    run = Run("r", "demo", {"a": 1}, {"prepare": "k"}, {"train": 2})
    run.note("built", node="prepare")
    save_run(home, run)
    assert load_run(home, "r") == run


def test_no_run_is_none_or_an_error_that_names_those_there_are(home: Home):
    assert load_run(home, "r") is None
    save_run(home, Run("other", "demo", {}))
    with pytest.raises(UserError, match="no run `r`.*other"):
        existing_run(home, "r")


@pytest.mark.parametrize("text", ["", "{", '{"name": "r"}', "[]"])
def test_a_damaged_run_file_is_one_clear_line(home: Home, text: str):
    (home.runs / "r.json").write_text(text)
    with pytest.raises(UserError, match="damaged run file"):
        load_run(home, "r")


def test_a_run_that_is_in_progress_says_so(home: Home):
    with run_lock(home, "r"), pytest.raises(Busy, match="run r is in progress"), run_lock(home, "r"):
        pass
