"""What a stage's build function gets, and how it is run in a child process."""

import argparse
import json
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from clha.config import Settings, settings_from
from clha.errors import DISK_FULL, StageFailure, TransientFailure, UserError, says_disk_full
from clha.progress import Progress, pipe_progress
from clha.runs import existing_run
from clha.store import Artifact, ArtifactWriter, Home, kind_of

PROGRESS_FD = "CLHA_PROGRESS_FD"
LIFELINE_FD = "CLHA_LIFELINE_FD"


@dataclass(frozen=True)
class Work:
    """One node to build: where its inputs lie and where its output goes."""

    home: Home
    run: str
    node: str
    settings: Settings
    parts: Mapping[str, Any]  # the parts of the key
    inputs: Mapping[str, Artifact]
    models: Mapping[str, Path]  # role -> model folder
    writer: ArtifactWriter
    progress: Progress

    def finish(self, *, rows_in: int, rows_out: int, seed: int | None, device: str, **facts: Any) -> Artifact:
        """Complete the artifact with the manifest fields that are the same for every node.

        `facts` are the node's own manifest fields (tokens per second, ...). Raises StageFailure when
        rows_in != rows_out + quarantined.
        """
        parts = dict(self.parts)
        return self.writer.finish(
            rows_in=rows_in,
            rows_out=rows_out,
            facts={
                "node": self.node,
                "code_version": parts["code_version"],
                "inputs": {name: a.key for name, a in self.inputs.items()},
                "settings": parts["settings"],
                "key_parts": parts,
                "versions": {**installed_versions(), **parts["versions"]},
                "seed": seed,
                "device": device,
                "peak_memory_bytes": peak_memory_bytes(),
                **facts,
            },
        )

    def check_quarantine(self, rows_in: int, share: float, setting: str) -> None:
        """Raises UserError when more than `share` of the rows were quarantined, naming the commonest reason."""
        counts = self.writer.quarantined()
        bad = sum(counts.values())
        if rows_in and bad > share * rows_in:
            reason = max(counts, key=lambda r: counts[r])
            rows = self.writer.read("quarantine").to_pylist()
            first = next(row["detail"] for row in rows if row["reason"] == reason)
            raise UserError(
                f"{self.node}: {bad} of {rows_in} rows are bad (most: {reason}, first: {first}), more than {setting} = "
                f"{share:g}; see {self.writer.folder}/quarantine-*.parquet, mend the data or raise {setting}"
            )


def installed_versions() -> dict[str, str]:
    """Versions of what a result can depend on."""
    from clha import __version__
    from clha.stages.chain import package_version

    names = ("torch", "transformers", "vllm", "pyarrow", "numpy", "datasets", "prefect")
    return {"clha": __version__, "python": sys.version.split()[0], **{n: package_version(n) for n in names}}


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child_main(build: Callable[[Work], Artifact]) -> NoReturn:
    """Entry of `python -m clha.stages.<stage>`: build one node; errors go to the parent as one event."""
    parser = argparse.ArgumentParser()
    for name in ("--home", "--run", "--node", "--key"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    if LIFELINE_FD in os.environ:
        _die_with_parent(int(os.environ[LIFELINE_FD]))
    progress = pipe_progress(int(os.environ[PROGRESS_FD])) if PROGRESS_FD in os.environ else Progress()
    try:
        build_node(Home(Path(args.home)), args.run, args.node, args.key, build, progress)
    except (UserError, StageFailure) as error:
        _report(error)
        sys.exit(error.exit_code)
    except Exception as error:
        traceback.print_exc()
        _report(_as_failure(error))
        sys.exit(1)
    sys.exit(0)


def build_node(
    home: Home, run_name: str, node_name: str, key: str, build: Callable[[Work], Artifact], progress: Progress
) -> Artifact:
    """Build one node in this process, unless it is there already, holding its lock."""
    from clha.models import resolve_model
    from clha.stages.chain import nodes, plan_node

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
