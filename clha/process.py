"""Child processes: start in a group of their own, read line by line, time out, and never leave one behind."""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from clha.progress import Event, Progress, pipe_progress

# Environment variables that hold the numbers of a child's two pipes.
PROGRESS_FD = "CLHA_PROGRESS_FD"
LIFELINE_FD = "CLHA_LIFELINE_FD"

_GRACE_SECONDS = 10.0
_LAST_WORDS_SECONDS = 1.0


@dataclass(frozen=True)
class Ended:
    """How a child ended. `returncode` is negative for a signal; `last_line` is its last line of output."""

    returncode: int
    timed_out: bool
    last_line: str
    stopped: bool = False  # it was well, and ended here because another was not


def run_child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path | None,
    on_event: Callable[[Event], None],
    on_line: Callable[[str], None] = lambda line: None,
    timeout_seconds: float | None = None,
) -> Ended:
    """Run `command` to its end; its output goes to the file `log` and to `on_line`, its events to `on_event`.

    The child gets two pipes, their numbers in the variables named by `PROGRESS_FD` (it writes JSON lines) and
    `LIFELINE_FD` (it ends itself when that closes: this process died). Whatever happens here, a KeyboardInterrupt
    or a cancelled flow too, the child's whole group is ended (TERM, then KILL) before this returns or raises.
    """
    return run_together(
        [command],
        environments=[environment],
        log=log,
        on_event=on_event,
        on_line=on_line,
        timeout_seconds=timeout_seconds,
    )[0]


def run_together(
    commands: Sequence[Sequence[str]],
    *,
    environments: Sequence[Mapping[str, str]],
    log: Path | None,
    on_event: Callable[[Event], None],
    on_line: Callable[[str], None] = lambda line: None,
    timeout_seconds: float | None = None,
) -> list[Ended]:
    """Run several commands that need each other, as `run_child` does: one that ends badly ends all."""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_seconds if timeout_seconds else None
    children: list[_Child] = []
    timed_out = failed = False
    codes: list[int | None] = []
    try:
        for command, environment in zip(commands, environments, strict=True):
            children.append(_Child(command, environment))
        with open(log or os.devnull, "ab") as log_file, selectors.DefaultSelector() as selector:
            for child in children:
                selector.register(child.output, selectors.EVENT_READ, (child, child.lines))
                selector.register(child.events_in, selectors.EVENT_READ, (child, child.events))
            while not failed and not all(child.is_over() for child in children):
                if deadline is not None and time.monotonic() >= deadline:
                    timed_out = True
                    break
                for key, _ in selector.select(_tick(children, deadline)):
                    child, buffer = key.data
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                        child.open_pipes -= 1
                    if buffer is child.lines:
                        log_file.write(data)
                        log_file.flush()
                        for line in buffer.feed(data):
                            child.last_line = line or child.last_line
                            on_line(line)
                    else:
                        for line in buffer.feed(data):
                            on_event(json.loads(line))
                failed = any(child.is_over() and child.process.returncode for child in children)
        codes = [child.process.poll() for child in children]
    finally:
        for child in children:
            child.end()
    return [
        Ended(child.process.returncode, timed_out, child.last_line, code is None and not timed_out)
        for child, code in zip(children, codes, strict=True)
    ]


class _Child:
    """A process that leads a group of its own, with its pipes."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.events_in, events_out = os.pipe()
        life_in, self._life_out = os.pipe()
        try:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**environment, PROGRESS_FD: str(events_out), LIFELINE_FD: str(life_in)},
                pass_fds=(events_out, life_in),
                start_new_session=True,
            )
        except BaseException:
            os.close(self.events_in)
            os.close(self._life_out)
            raise
        finally:
            os.close(events_out)
            os.close(life_in)
        assert self.process.stdout is not None
        self.output = self.process.stdout
        self.lines, self.events = _Lines(), _Lines()
        self.open_pipes, self.last_line = 2, ""
        self._dead_since: float | None = None

    def is_over(self) -> bool:
        """Whether the process has ended and all that it said was read.

        A grandchild may hold its pipes open: they are listened to for a moment only.
        """
        if self.process.poll() is None:
            return False
        if self._dead_since is None:
            self._dead_since = time.monotonic()
        return not self.open_pipes or time.monotonic() - self._dead_since >= _LAST_WORDS_SECONDS

    def end(self) -> None:
        end_group(self.process)
        self.output.close()
        os.close(self.events_in)
        os.close(self._life_out)


def _tick(children: Sequence[_Child], deadline: float | None) -> float:
    """Seconds to listen before looking at the processes again; short when one is about to end."""
    closing = any(not child.open_pipes and child.process.returncode is None for child in children)
    tick = 0.01 if closing else 0.25
    return tick if deadline is None else max(0.0, min(tick, deadline - time.monotonic()))


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours in this interpreter; files in the current folder cannot shadow any."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_main(work: Callable[[Progress], object]) -> NoReturn:
    """The life of a process that `run_child` started: it works, says as one event what went wrong, and exits.

    It ends with its parent, however that died.
    """
    if LIFELINE_FD in os.environ:
        _die_with_parent(int(os.environ[LIFELINE_FD]))
    progress = pipe_progress(int(os.environ[PROGRESS_FD])) if PROGRESS_FD in os.environ else Progress()
    try:
        work(progress)
    except Exception as error:
        known = progress.error(error)
        if known is not error:
            traceback.print_exc()
        sys.stderr.write(f"{known}\n")
        sys.exit(known.exit_code)
    sys.exit(0)


def _die_with_parent(fd: int) -> None:
    """End this process group when the other end of the pipe `fd` closes."""

    def watch() -> None:
        os.read(fd, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


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
