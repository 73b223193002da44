"""Checkpoints that are whole or recognised as not: a list of files and sizes is written last."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_MARK = "complete.json"


def mark_complete(folder: Path) -> None:
    """Flush the files of a checkpoint to disk, then list them with their sizes; only then the checkpoint counts."""
    sizes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MARK):
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    temporary = folder / f".{_MARK}"
    with open(temporary, "w") as f:
        json.dump(sizes, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(folder / _MARK)


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint was finished and its files are still those that were listed."""
    try:
        sizes = json.loads((folder / _MARK).read_text())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def last_checkpoint(folder: Path, log: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint in `folder`, or None. Half-written ones are removed, with one line each."""
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    for _, path in sorted(found, reverse=True):
        if is_complete(path):
            return path
        log(f"{path.name} is half-written; the one before it is taken")
        shutil.rmtree(path)
    return None
