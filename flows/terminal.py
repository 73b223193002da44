"""What the terminal shows of a run: a bar per node on a TTY, plain lines elsewhere, one line per finished node."""

import io
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from clha.progress import Event

if TYPE_CHECKING:
    from rich.progress import TaskID

    from clha.study.tables import Grid

_LINE_SECONDS = 15.0


def node_line(node: str, event: Event) -> str:
    """One line for a finished node: reused or built, rows in, out and quarantined, seconds."""
    manifest = event.get("manifest")
    if not manifest:
        return f"{node:<18} {event['state']}"
    text = f"{node:<18} {event['state']:<7} {manifest['rows_in']:>6} in {manifest['rows_out']:>6} out"
    if manifest["rows_quarantined"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(manifest["quarantined"].items()))
        text += f"  {manifest['rows_quarantined']} quarantined ({reasons})"
    return f"{text}  {manifest['seconds']:.1f} s" if event["state"] == "built" else text


class Terminal:
    """Plain lines, for logs and pipes: at most one line of progress per node in `_LINE_SECONDS`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._last: dict[str, float] = {}

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def say(self, text: str) -> None:
        """Print one line that stays. Where nobody reads any more, the work goes on unheard."""
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def table(self, grid: "Grid") -> None:
        """Print a table that stays; as wide as it needs to be where nobody watches."""
        from rich.console import Console
        from rich.table import Table

        table = Table(*grid.columns, title=grid.title, title_justify="left")
        for row in grid.rows:
            table.add_row(*row)
        if self._stream.isatty():
            Console(file=self._stream, highlight=False, markup=False).print(table)
        else:
            text = io.StringIO()
            Console(file=text, width=200, highlight=False, markup=False).print(table)
            self.say(text.getvalue().rstrip("\n"))

    def listen(self, node: str, event: Event) -> None:
        """Show one event of a node (see clha.progress and clha.stages.runner)."""
        kind = event["event"]
        if kind == "node" and event["state"] == "started":
            self._last[node] = time.monotonic()
            self.started(node)
        elif kind == "node":
            self.finished(node, event)
        elif kind == "progress":
            self.progressed(node, event)
        elif kind == "log":
            self.say(f"{node:<18} {event['message'].removeprefix(f'{node}: ')}")

    def started(self, node: str) -> None:
        """A node's process starts."""
        self.say(f"{node:<18} started")

    def finished(self, node: str, event: Event) -> None:
        """A node is there."""
        self.say(node_line(node, event))

    def progressed(self, node: str, event: Event) -> None:
        """A node has come further."""
        now = time.monotonic()
        if now - self._last.get(node, 0.0) >= _LINE_SECONDS:
            self._last[node] = now
            self.say(f"{node:<18} {event['done']} of {event['total']} {event['unit']}  {event['note']}".rstrip())


class BarTerminal(Terminal):
    """A Rich bar per running node; finished nodes become a line above the bars."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        super().__init__(stream)
        self._console = Console(file=self._stream, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
            refresh_per_second=4,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "BarTerminal":
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def started(self, node: str) -> None:
        self._forget(node)
        self._tasks[node] = self._progress.add_task(f"{node:<16}", total=None, count="starting", note="")

    def finished(self, node: str, event: Event) -> None:
        self._forget(node)
        super().finished(node, event)

    def progressed(self, node: str, event: Event) -> None:
        if node not in self._tasks:
            self.started(node)
        count = f"{event['done']}/{event['total']} {event['unit']}"
        self._progress.update(
            self._tasks[node], completed=event["done"], total=event["total"], count=count, note=event["note"]
        )

    def _forget(self, node: str) -> None:
        task = self._tasks.pop(node, None)
        if task is not None:
            self._progress.remove_task(task)


def open_terminal(stream: TextIO | None = None) -> Terminal:
    """Bars where somebody watches, lines where the output goes to a file or a pipe; `stream`: stdout."""
    stream = stream or sys.stdout
    return BarTerminal(stream) if stream.isatty() else Terminal(stream)
