"""Starting `clha` as a user does, for the tests of the whole chain."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def clha_command(*arguments: str) -> list[str]:
    """The command line of `clha` in this environment."""
    return [sys.executable, "-m", "flows.cli", *arguments]


def environment(home: Path) -> dict[str, str]:
    """The environment of a user whose CLHA_HOME is `home`, without a Prefect server of somebody else's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return {**kept, "CLHA_HOME": str(home), "COLUMNS": "160"}


def clha(home: Path, *arguments: str, expect: int | None = 0, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run `clha`; fails the test with its output when the exit code is not `expect`."""
    done = subprocess.run(
        clha_command(*arguments),
        cwd=ROOT,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if expect is not None:
        assert done.returncode == expect, f"clha {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_file(home: Path, run: str) -> dict[str, Any]:
    """What the run's file says."""
    return dict(json.loads((home / "runs" / f"{run}.json").read_text()))


def artifact_folder(home: Path, run: str, node: str) -> Path:
    """The folder of a node's artifact in a run."""
    kind = node.split("/")[-1].split(".")[0]
    return home / "artifacts" / kind / run_file(home, run)["nodes"][node]


def file_digests(home: Path, run: str, node: str, *, beginning: tuple[str, ...] = ("",)) -> dict[str, str]:
    """name -> sha256 of a node's files whose names begin so."""
    manifest = json.loads((artifact_folder(home, run, node) / "manifest.json").read_text())
    return {f["name"]: f["sha256"] for f in manifest["files"] if f["name"].startswith(beginning)}


def referee(shared: Path, home: Path, run: str) -> str:
    """The output of the independent check of a run; fails the test unless it finds nothing broken."""
    done = subprocess.run(
        [sys.executable, str(shared / "referee" / "check_run.py"), str(home), run],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.rstrip().endswith("\n0 broken"), done.stdout + done.stderr
    return done.stdout
