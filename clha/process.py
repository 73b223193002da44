"""Child processes: start in a group of their own, read line by line, time out, and never leave one behind."""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clha.progress import Event

_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Ended:
    """How a child ended. `returncode` is negative for a signal; `last_line` is its last line of output."""

    returncode: int
    timed_out: bool
    last_line: str


def run_child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    on_event: Callable[[Event], None],
    on_line: Callable[[str], None] = lambda line: None,
    timeout_seconds: float | None = None,
    progress_fd: str,
    lifeline_fd: str,
) -> Ended:
    """Run `command` to its end; its output goes to the file `log` and to `on_line`, its events to `on_event`.

    The child gets two pipes, their numbers in the variables named `progress_fd` (it writes JSON lines) and
    `lifeline_fd` (it ends itself when that closes: this process died). Whatever happens here, a KeyboardInterrupt
    or a cancelled flow too, the child's whole group is ended (TERM, then KILL) before this returns or raises.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    events_in, events_out = os.pipe()
    life_in, life_out = os.pipe()
    deadline = time.monotonic() + timeout_seconds if timeout_seconds else None
    try:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, progress_fd: str(events_out), lifeline_fd: str(life_in)},
            pass_fds=(events_out, life_in),
            start_new_session=True,
        )
    except BaseException:
        for fd in (events_in, events_out, life_in, life_out):
            os.close(fd)
        raise
    os.close(events_out)
    os.close(life_in)
    assert child.stdout is not None
    last_line, timed_out = "", False
    try:
        with open(log, "ab") as log_file, selectors.DefaultSelector() as selector:
            lines, events = _Lines(), _Lines()
            selector.register(child.stdout, selectors.EVENT_READ, lines)
            selector.register(events_in, selectors.EVENT_READ, events)
            while selector.get_map():
                wait = None if deadline is None else max(0.0, deadline - time.monotonic())
                ready = selector.select(wait)
                if not ready and deadline is not None and time.monotonic() >= deadline:
                    timed_out = True
                    break
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    if key.data is lines:
                        log_file.write(data)
                        log_file.flush()
                        for line in lines.feed(data):
                            last_line = line or last_line
                            on_line(line)
                    else:
                        for line in events.feed(data):
                            on_event(json.loads(line))
        if not timed_out:
            child.wait()
    finally:
        end_group(child)
        child.stdout.close()
        os.close(events_in)
        os.close(life_out)
    return Ended(child.returncode, timed_out, last_line)


def end_group(child: "subprocess.Popen[bytes]") -> None:
    """End a child and all of its group: TERM, some seconds of grace, then KILL."""
    if child.poll() is None:
        _signal_group(child.pid, signal.SIGTERM)
        try:
            child.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    _signal_group(child.pid, signal.SIGKILL)  # grandchildren that outlived the child
    child.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass


class _Lines:
    """Cuts a stream of bytes into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes; no data: the unfinished rest."""
        if not data:
            rest, self._rest = self._rest, b""
            return [rest.decode("utf-8", "replace").rstrip("\r")] if rest else []
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line.decode("utf-8", "replace").rstrip("\r") for line in whole]
