"""A full disk: one clear line, nothing half-written, and the next run goes on. On a real small file system."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from chains import clha

from clha.errors import says_disk_full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB in memory (needs the right to mount)."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(small_disk: Path, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"{i:x} " * 300}], "chosen": f"{i} yes " * 20, "rejected": "no"}
        for i in range(4000)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # The tiny model must not be what fills the disk.
    begin = (
        "run-stage", "prepare", "--run", "r", "--profile", "smoke", "--set", f"prepare.path={data}",
        "--set", "prepare.limits={train: null, dev: null, test: null, reward_train: null, reward_eval: null}",
        "--set", "execution.min_free_disk_gb=0",
    )  # fmt: skip
    home = small_disk / "home"
    full = clha(home, *begin, expect=1)
    assert "disk is full" in full.stderr and full.stderr.count("\n") == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert not list((home / "artifacts").rglob("manifest.json"))

    subprocess.run(["mount", "-o", "remount,size=300m", str(small_disk)], check=True)
    clha(home, "run-stage", "prepare", "--run", "r")
    (manifest,) = (home / "artifacts").rglob("manifest.json")
    assert json.loads(manifest.read_text())["rows_out"] == 4000
    assert not [p for p in (home / "artifacts").rglob("*") if ".tmp" in p.name]


def test_a_disk_that_is_full_before_the_run_begins_is_one_line(small_disk: Path, tmp_path: Path):
    home = small_disk / "home"
    clha(home, "runs")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}], "chosen": "yes", "rejected": "no"}))
    filler = os.open(small_disk / "filler", os.O_CREAT | os.O_WRONLY)
    with suppress(OSError):
        while os.write(filler, b"x" * 4096):
            pass
    os.close(filler)
    asked = ("run", "--only", "prepare", "--no-prefect", "--profile", "smoke", "--set", f"prepare.path={data}")
    full = clha(home, *asked, "--set", "execution.min_free_disk_gb=0", expect=1)
    assert "disk is full" in full.stderr and full.stderr.count("\n") == 1, full.stderr


def test_all_the_ways_to_say_that_the_disk_is_full_are_known():
    assert says_disk_full(OSError(28, "No space left on device"))
    assert says_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert says_disk_full(Exception("database or disk is full"))
    assert not says_disk_full(OSError(13, "Permission denied"))
