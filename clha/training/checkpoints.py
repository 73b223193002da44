"""Checkpoints that are whole or recognised as not: a list of files, sizes and samples is written last.

Every file is flushed to disk before the list is, and the list gets its name by renaming, so that after a crash a
checkpoint with a list is whole. The list tells as well when files changed later: a copy that broke off, a disk that
lost what it said it had. It holds digests of samples, not of whole files: 7 billion weights with AdamW's states are
84 GB, of which SHA-256 (1.6 GB/s measured) would make a minute in each save and resume, samples take a second. What
was cut off, also where zeros stand in for it, is always seen; damage within a large file is where a sample meets it.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from clha.errors import TransientFailure

_MARK = "complete.json"
# Files up to 64 MiB are read whole; of larger ones 64 pieces at equal distances, the first and the last among them.
_PIECE, _PIECES = 1 << 20, 64


def mark_complete(folder: Path) -> None:
    """Flush the files of a checkpoint to disk, then list them with size and sample; only then the checkpoint counts."""
    listed = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MARK):
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
        listed[str(path.relative_to(folder))] = _seen(path)
    temporary = folder / f".{_MARK}"
    with open(temporary, "w") as f:
        json.dump(listed, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(folder / _MARK)


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint was finished and its files are still those that were listed.

    Raises OSError where that cannot be told because a file cannot be read.
    """
    try:
        listed = json.loads((folder / _MARK).read_text())
        return bool(listed) and all(_seen(folder / name) == seen for name, seen in listed.items())
    except (FileNotFoundError, ValueError):
        return False


def why_not_resumable(folder: Path) -> str:
    """Why training cannot go on from a checkpoint, or "".

    One without a list may as well be another trainer's: its files are opened, as far as that shows one that was cut
    off. transformers goes on without a word where states are missing, with a fresh optimizer.

    Raises TransientFailure where the checkpoint cannot be read.
    """
    try:
        if not folder.is_dir():
            return "there is no such folder"
        if (folder / _MARK).exists():
            if not is_complete(folder):
                return "it is half-written, or was changed since it was saved"
        else:
            cut = [path.name for path in sorted(folder.rglob("*")) if path.is_file() and not _opens(path)]
            if cut:
                return f"{', '.join(cut)} cannot be read: half-written"
    except OSError as error:
        raise TransientFailure(f"{folder.name} cannot be read ({error}); nothing was changed, try again") from error
    missing = " and no ".join(_missing(folder))
    return f"it holds no {missing} to go on with (save_only_model keeps weights alone)" if missing else ""


def _missing(folder: Path) -> list[str]:
    """What resuming needs besides weights, and the checkpoint lacks."""
    return [name for name in ("optimizer", "scheduler", "trainer_state") if not any(folder.glob(f"{name}*"))]


def _opens(path: Path) -> bool:
    """Whether a file looks whole: headers of weights say how long these are, a zip (torch.save) has its list last."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np"):
                return True
        except SafetensorError:
            return False
    if path.suffix == ".json":
        try:
            return json.loads(path.read_text()) is not None
        except ValueError:
            return False
    if path.suffix in (".bin", ".pt", ".pth"):
        with open(path, "rb") as f:
            start = f.read(2)
        return bool(start) and (start != b"PK" or zipfile.is_zipfile(path))
    return True


def _seen(path: Path) -> list[int | str]:
    """The file's size in bytes, and the SHA-256 of its samples."""
    size, digest = path.stat().st_size, hashlib.sha256()
    last = max(size - _PIECE, 0)
    with open(path, "rb") as f:
        for i in range(_PIECES):
            start = i * _PIECE if size <= _PIECE * _PIECES else last * i // (_PIECES - 1)
            f.seek(start)
            digest.update(f.read(_PIECE))
    return [size, digest.hexdigest()]


def last_checkpoint(folder: Path, log: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in `folder` that is complete and can be resumed from, or None.

    Others are passed over, with one line each, and left alone: what has no list may as well be another trainer's.

    Raises TransientFailure where a checkpoint cannot be read.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    for _, path in sorted(found, reverse=True):
        try:
            whole = is_complete(path)
        except OSError as error:
            raise TransientFailure(f"{path.name} cannot be read ({error}); nothing was changed, try again") from error
        if whole and not _missing(path):
            return path
        if whole:
            kind = "without states to go on with (save_only_model)"
        else:
            kind = "half-written" if (path / _MARK).exists() else "half-written or another trainer's"
        log(f"{path.name} is {kind}; the one before it is taken")
    return None
