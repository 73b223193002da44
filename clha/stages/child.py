"""Builds one node in a process of its own: `python -m clha.stages.child --home H --run R --node N --key K`."""

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from clha.config import settings_from
from clha.errors import DISK_FULL, StageFailure, TransientFailure, UserError, says_disk_full
from clha.models import resolve_model
from clha.progress import Progress, pipe_progress
from clha.runs import existing_run
from clha.stages.chain import nodes, plan_node
from clha.stages.work import Work
from clha.store import Artifact, ArtifactWriter, Home, kind_of

PROGRESS_FD = "CLHA_PROGRESS_FD"
LIFELINE_FD = "CLHA_LIFELINE_FD"


def main() -> NoReturn:
    """Build the node; errors go to the parent as one event."""
    parser = argparse.ArgumentParser()
    for name in ("--home", "--run", "--node", "--key"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    work_and_exit(lambda progress: build_node(Home(Path(args.home)), args.run, args.node, args.key, progress))


def work_and_exit(work: Callable[[Progress], object]) -> NoReturn:
    """Do `work` as a child of the process that reads its events, and exit: 0, 2 (the user's mistake) or 1.

    This process group ends when the parent does.
    """
    if LIFELINE_FD in os.environ:
        _die_with_parent(int(os.environ[LIFELINE_FD]))
    progress = pipe_progress(int(os.environ[PROGRESS_FD])) if PROGRESS_FD in os.environ else Progress()
    try:
        work(progress)
    except (UserError, StageFailure) as error:
        _report(error)
        sys.exit(error.exit_code)
    except Exception as error:
        traceback.print_exc()
        _report(_as_failure(error))
        sys.exit(1)
    sys.exit(0)


def build_node(home: Home, run_name: str, node_name: str, key: str, progress: Progress) -> Artifact:
    """Build one node in this process, unless it is there already, holding its lock."""
    run = existing_run(home, run_name)
    settings = settings_from(run.settings, (), where=f"run {run_name}")
    node = next(n for n in nodes(settings) if n.name == node_name)
    with home.lock(f"{node.kind}-{key}", wait_seconds=settings.execution.timeout_minutes * 60):
        done = home.find(node.kind, key)
        if done:
            return done
        inputs = {}
        for name in node.inputs:
            artifact = home.find(kind_of(name), run.nodes.get(name, ""))
            if artifact is None:
                raise StageFailure(f"{node_name}: its input {name} is missing or damaged; run again to rebuild it")
            inputs[name] = artifact
        planned = plan_node(home, run, settings, node, inputs)
        if planned.key != key:
            raise StageFailure(f"{node_name}: an input changed while it was being built; run again")
        models = {role: resolve_model(reference, home).path for role, reference in node.models.items()}
        writer = ArtifactWriter(home, node.kind, key)
        build: Callable[[Work], Artifact] = import_module(f"clha.stages.{node.stage}").build
        return build(Work(home, run_name, node_name, settings, planned.parts, inputs, models, writer, progress))


def _as_failure(error: Exception) -> StageFailure:
    """One line for an error that nobody foresaw; the traceback is in the log."""
    if says_disk_full(error):
        return StageFailure(DISK_FULL)
    line = (str(error).strip().splitlines() or [""])[0]
    passing = isinstance(error, ConnectionError | TimeoutError)
    return (TransientFailure if passing else StageFailure)(f"{type(error).__name__}: {line}")


def _report(error: UserError | StageFailure) -> None:
    kind = "user" if isinstance(error, UserError) else "passing" if isinstance(error, TransientFailure) else "failure"
    print(str(error), file=sys.stderr)
    if PROGRESS_FD in os.environ:
        line = json.dumps({"event": "error", "kind": kind, "message": str(error)}) + "\n"
        os.write(int(os.environ[PROGRESS_FD]), line.encode())


def _die_with_parent(fd: int) -> None:
    """End this process group when the other end of the pipe `fd` closes: the parent died, however it died."""

    def watch() -> None:
        os.read(fd, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
