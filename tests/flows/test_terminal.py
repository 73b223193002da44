"""What the terminal shows: plain lines off a TTY, one line per finished node, bars on a TTY."""

import io
import os
from typing import Any

import pytest

from flows.terminal import BarTerminal, Terminal, node_line

MANIFEST: dict[str, Any] = {
    "rows_in": 114,
    "rows_out": 72,
    "rows_quarantined": 42,
    "quarantined": {"parted_early": 5, "malformed": 37},
    "seconds": 2.25,
}


def test_a_finished_node_is_one_line_with_rows_reasons_and_seconds():
    line = node_line("prepare", {"event": "node", "state": "built", "key": "k", "manifest": MANIFEST})
    expected = "prepare built 114 in 72 out 42 quarantined (37 malformed, 5 parted_early) 2.2 s"
    assert " ".join(line.split()) == expected


def test_a_reused_node_shows_no_seconds_as_it_took_none():
    line = node_line("prepare", {"event": "node", "state": "reused", "key": "k", "manifest": MANIFEST})
    assert "reused" in line and " s" not in line


def test_without_a_tty_each_event_that_matters_is_a_line_and_progress_is_sparse():
    stream = io.StringIO()
    with Terminal(stream) as terminal:
        terminal.listen("train", {"event": "node", "state": "started", "key": "k"})
        for step in range(100):
            terminal.listen("train", {"event": "progress", "done": step, "total": 100, "unit": "steps", "note": ""})
            terminal.listen("train", {"event": "metrics", "step": step, "values": {"loss": 1.0}})
            terminal.listen("train", {"event": "output", "line": "noise"})
        terminal.listen("train", {"event": "log", "message": "resumed at step 5"})
        terminal.listen("train", {"event": "node", "state": "built", "key": "k", "manifest": MANIFEST})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and "started" in lines[0] and "resumed at step 5" in lines[1] and "built" in lines[2]


def test_the_work_goes_on_where_nobody_reads_what_it_says():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        terminal = Terminal(stream)
        terminal.say("one")
        terminal.say("two")


def test_on_a_tty_a_bar_follows_the_progress_and_ends_as_a_line(capsys: pytest.CaptureFixture[str]):
    with BarTerminal() as terminal:
        terminal.listen("generate", {"event": "node", "state": "started", "key": "k"})
        event = {"event": "progress", "done": 64, "total": 128, "unit": "prompts", "note": "206 tokens/s [bold]"}
        terminal.listen("generate", event)
        (bar,) = terminal._progress.tasks
        assert bar.percentage == 50 and bar.fields["note"] == "206 tokens/s [bold]"
        terminal.listen("generate", {"event": "node", "state": "built", "key": "k", "manifest": MANIFEST})
        assert not terminal._progress.tasks
    assert "generate" in capsys.readouterr().out
