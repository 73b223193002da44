"""What a stage says while it works: progress, log lines and metrics, as JSON lines on a pipe.

The library calls a `Progress`; who listens (a Rich bar, a Prefect artifact, nobody) is decided elsewhere.
"""

import json
import os
import time
from collections.abc import Callable
from typing import Any

from clha.errors import StageFailure, TransientFailure, UserError, as_failure

Event = dict[str, Any]

# The narrower kind first.
_KINDS: dict[str, type[UserError] | type[StageFailure]] = {
    "user": UserError,
    "passing": TransientFailure,
    "failure": StageFailure,
}


class Progress:
    """Sends events to `emit`; the base of all reporting, and silent without an `emit`.

    Events: {"event": "progress", "done", "total", "unit", "note"}, {"event": "log", "message"},
    {"event": "metrics", "step", "values"}, {"event": "error", "kind": "user", "failure" or "passing", "message",
    "foreseen"}.
    """

    def __init__(self, emit: Callable[[Event], None] | None = None, interval: float = 0.2) -> None:
        """`interval`: seconds between two progress events; the last one (done == total) always goes out."""
        self._emit = emit or (lambda event: None)
        self._interval = interval
        self._last = 0.0

    def update(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Say that `done` of `total` units are finished."""
        now = time.monotonic()
        if done < total and now - self._last < self._interval:
            return
        self._last = now
        self._emit({"event": "progress", "done": done, "total": total, "unit": unit, "note": note})

    def log(self, message: str) -> None:
        """Say one line that a person should read."""
        self._emit({"event": "log", "message": message})

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Report the metrics of one training step."""
        self._emit({"event": "metrics", "step": step, "values": values})

    def forward(self, event: Event) -> None:
        """Send an event of another process on, as it is."""
        self._emit(event)

    def error(self, error: Exception) -> UserError | StageFailure:
        """Say what ended the work; returns the error as one of ours."""
        known = as_failure(error)
        kind = next(name for name, own in _KINDS.items() if isinstance(known, own))
        self._emit({"event": "error", "kind": kind, "message": str(known), "foreseen": known is error})
        return known


def failure_of(event: Event, message: str) -> UserError | StageFailure:
    """The error that an "error" event tells of, with another message."""
    return _KINDS[event["kind"]](message)


def pipe_progress(fd: int) -> Progress:
    """A `Progress` that writes JSON lines to the file descriptor `fd` (the parent's pipe)."""

    def emit(event: Event) -> None:
        # One write per line: lines under PIPE_BUF (4096 bytes) are not torn apart between threads.
        try:
            os.write(fd, (json.dumps(event) + "\n").encode())
        except BrokenPipeError:
            pass  # the parent is gone; the lifeline ends this process

    return Progress(emit)
