"""Helpers of the tests of flows and command line."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil

Clha = Callable[..., subprocess.CompletedProcess[str]]

TOPICS = ("a fern", "sourdough", "a bicycle chain", "tax forms", "a shy cat", "chess openings", "a leaking tap", "maps")


def write_pairs(path: Path, rows: int) -> Path:
    """Chat JSONL with `rows` preference pairs, each about something else."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            topic = f"{TOPICS[i % len(TOPICS)]} number {i}"
            row = {
                "messages": [{"role": "user", "content": f"What should I know about {topic}?"}],
                "chosen": f"Begin with the basics of {topic}, then try it {i} times.",
                "rejected": "No idea.",
            }
            file.write(json.dumps(row) + "\n")
    return path


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file and folder below `folder` with its bytes, but locks and remembered digests."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if "locks" not in path.parts and path.name != "digests.sqlite"
    }


def processes_of(home: Path) -> list[str]:
    """Command lines of all processes that were started for `home`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(home) in line and ("clha.stages" in line or "flows." in line):
            found.append(line)
    return found


def hear_interrupts() -> None:
    """For Popen(preexec_fn=...): a test suite in the background of a shell hands down that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
