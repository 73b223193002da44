"""A run: a small file that holds its settings and maps node names to the keys of their artifacts."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from clha.errors import UserError
from clha.store import Busy, Home, write_atomic

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_run_name(name: str) -> str:
    """Return `name`; raises UserError when it could leave the folder of runs or is no plain name."""
    if not _NAME.fullmatch(name):
        raise UserError(f"run name {name!r}: letters, digits, '.', '_' and '-' only, a letter or digit first")
    return name


@dataclass
class Run:
    """What `runs/<name>.json` says."""

    name: str
    profile: str
    settings: dict[str, Any]
    nodes: dict[str, str] = field(default_factory=dict)  # node -> key
    attempts: dict[str, int] = field(default_factory=dict)  # node -> attempt number of --force
    history: list[dict[str, Any]] = field(default_factory=list)

    def note(self, event: str, **what: Any) -> None:
        """Add a line to the history."""
        self.history.append({"at": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **what})


def save_run(home: Home, run: Run) -> None:
    """Write the run file atomically."""
    check_run_name(run.name)
    body = {
        "name": run.name,
        "profile": run.profile,
        "settings": run.settings,
        "nodes": run.nodes,
        "attempts": run.attempts,
        "history": run.history[-1000:],
    }
    write_atomic(home.runs / f"{run.name}.json", json.dumps(body, indent=1, ensure_ascii=False).encode())


def load_run(home: Home, name: str) -> Run | None:
    """Read a run, or None when there is none of that name. Raises UserError when its file is damaged."""
    path = home.runs / f"{check_run_name(name)}.json"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return Run(body["name"], body["profile"], body["settings"], body["nodes"], body["attempts"], body["history"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); set CLHA_HOME to a folder that can") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged run file; delete it and run again (finished stages are kept)") from None


def run_names(home: Home) -> list[str]:
    """Names of all runs, the one that was written last at the end."""
    found: list[tuple[float, str]] = []
    for path in home.runs.glob("*.json"):
        if _NAME.fullmatch(path.stem):  # not what a killed process left half-written
            try:
                found.append((path.stat().st_mtime, path.stem))
            except FileNotFoundError:
                continue
    return [name for _, name in sorted(found)]


def existing_run(home: Home, name: str) -> Run:
    """Read a run. Raises UserError when there is none, naming those that exist."""
    run = load_run(home, name)
    if run is None:
        names = ", ".join(sorted(run_names(home)))
        raise UserError(f"no run `{name}` under {home.root}; there is {names or 'none'}")
    return run


@contextmanager
def run_lock(home: Home, name: str, wait_seconds: float = 0) -> Iterator[None]:
    """Let one process at a time work on a run. Raises Busy naming the run."""
    try:
        with home.lock(f"run-{check_run_name(name)}", wait_seconds):
            yield
    except Busy as busy:
        if f"run-{name} " not in str(busy):
            raise
        raise Busy(f"run {name} is in progress in another process; wait for it, or take another --run name") from None
