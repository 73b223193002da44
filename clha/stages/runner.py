"""Builds stages: plans each node, reuses what is fresh, otherwise runs a child process until it is built."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from clha.errors import StageFailure, TransientFailure
from clha.process import python_module, run_child
from clha.progress import Event, failure_of
from clha.runs import Run, save_run
from clha.settings import Settings
from clha.stages import chain
from clha.store import Artifact, Home

T = TypeVar("T")

# on_event(node name, event): the events of clha.progress, and {"event": "node", "state": ...} from here.
Listener = Callable[[str, Event], None]


@dataclass(frozen=True)
class Built:
    """What became of a node."""

    node: str
    artifact: Artifact
    reused: bool


def run_stage(home: Home, run: Run, settings: Settings, stage: str, listener: Listener) -> list[Built]:
    """Build all nodes of one stage (those that are fresh are reused) and record them in the run file.

    Inputs are taken as the run recorded them. Raises UserError or StageFailure, with one line.
    """
    return [build(home, run, settings, node, listener) for node in chain.select_nodes(settings, [stage])]


def build(home: Home, run: Run, settings: Settings, node: chain.Node, listener: Listener) -> Built:
    """Build one node, or reuse it; records its key in the run file before the work and the outcome after it."""
    inputs = {name: _recorded(home, run, settings, name) for name in node.inputs}
    planned = chain.plan_node(home, run, settings, node, inputs)
    assert planned.key is not None
    run.nodes[node.name] = planned.key
    if planned.artifact is not None:
        run.note("reused", node=node.name, key=planned.key)
        save_run(home, run)
        event = {"event": "node", "state": "reused", "key": planned.key, "manifest": planned.artifact.manifest}
        listener(node.name, event)
        return Built(node.name, planned.artifact, reused=True)
    home.check_free_disk(settings.execution.min_free_disk_gb, node.kind, planned.key)
    run.note("started", node=node.name, key=planned.key)
    save_run(home, run)
    listener(node.name, {"event": "node", "state": "started", "key": planned.key})

    def note(failure: TransientFailure) -> None:
        run.note("retried", node=node.name, reason=str(failure))
        save_run(home, run)

    artifact = retried(settings, lambda: _build_once(home, run, settings, planned, listener), node.name, listener, note)
    run.note("built", node=node.name, key=planned.key, seconds=artifact.manifest["seconds"])
    save_run(home, run)
    listener(node.name, {"event": "node", "state": "built", "key": planned.key, "manifest": artifact.manifest})
    return Built(node.name, artifact, reused=False)


def _recorded(home: Home, run: Run, settings: Settings, name: str) -> Artifact:
    node = next(n for n in chain.nodes(settings) if n.name == name)
    artifact = chain.taken_node(home, run, node).artifact
    assert artifact is not None
    return artifact


def retried(
    settings: Settings,
    work: Callable[[], T],
    name: str,
    listener: Listener,
    note: Callable[[TransientFailure], None] = lambda failure: None,
) -> T:
    """What `work` returns; it is tried again after a TransientFailure, as often as `execution.retries` says."""
    limits = settings.execution
    for attempt in range(limits.retries):
        try:
            return work()
        except TransientFailure as failure:
            message = f"{failure}; again in {limits.retry_delay_seconds:g} s ({attempt + 1} of {limits.retries})"
            note(failure)
            listener(name, {"event": "log", "message": message})
            time.sleep(limits.retry_delay_seconds)
    return work()


def _build_once(home: Home, run: Run, settings: Settings, planned: chain.Planned, listener: Listener) -> Artifact:
    node, key = planned.node, planned.key
    assert key is not None
    log = run_module(
        "clha.stages.child",
        ["--home", str(home.root), "--run", run.name, "--node", node.name, "--key", key],
        name=node.name,
        log=home.logs / run.name / f"{node.name.replace('/', '-')}.log",
        settings=settings,
        minutes=settings.execution.timeout_minutes,
        listener=listener,
    )
    artifact = home.find(node.kind, key)
    if artifact is None:
        raise StageFailure(f"{node.name}: its process ended well but left no artifact; log: {log}")
    return artifact


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    name: str,
    log: Path,
    settings: Settings,
    minutes: float,
    listener: Listener,
) -> Path:
    """Run `python -m module arguments` in a child process to its good end; returns its log.

    `name` is what its events and errors are said of; after `minutes` it is ended. Raises UserError, StageFailure or
    TransientFailure, with one line.
    """
    errors: list[Event] = []

    def hear(event: Event) -> None:
        if event["event"] == "error":
            errors.append(event)
        else:
            listener(name, event)

    ended = run_child(
        python_module(module, *arguments),
        environment=child_environment(settings),
        log=log,
        on_event=hear,
        on_line=lambda line: listener(name, {"event": "output", "line": line}),
        timeout_seconds=minutes * 60,
    )
    where = f"log: {log}"
    if ended.timed_out:
        raise TransientFailure(f"{name}: not finished after {minutes:g} minutes (execution.timeout_minutes); {where}")
    if errors:
        message = errors[-1]["message"]
        if not message.startswith(name):
            message = f"{name}: {message}"
        raise failure_of(errors[-1], message if errors[-1]["kind"] == "user" else f"{message} ({where})")
    if ended.returncode < 0:
        raise TransientFailure(f"{name}: its process was killed by signal {-ended.returncode}; {where}")
    if ended.returncode != 0:
        raise StageFailure(f"{name}: its process ended with {ended.returncode}: {ended.last_line}; {where}")
    return log


def child_environment(settings: Settings) -> dict[str, str]:
    """The environment of a stage's process: telemetry off, no code from the Hub, threads as set."""
    own = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list is for nested regions
    threads = settings.execution.threads or own or len(os.sched_getaffinity(0))
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Asking whether there is a GPU must not set up CUDA: vLLM forks its worker, where it could not be used then.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def start_run(home: Home, name: str, profile: str, settings: Settings, previous: Run | None) -> Run:
    """The run file with today's settings, saved before any work; keys of an earlier run of that name stay."""
    run = Run(name, profile, settings.model_dump(mode="json"))
    if previous is not None:
        run.nodes, run.attempts, run.history = previous.nodes, previous.attempts, previous.history
    run.note("run", profile=profile)
    save_run(home, run)
    return run


def status(home: Home, run: Run, settings: Settings, stages: Iterable[str] = chain.STAGES) -> list[dict[str, Any]]:
    """Per node: key, state (fresh, stale, waiting, unknown, damaged), artifact folder, rows in, out, quarantined."""
    rows = []
    for planned in chain.plan(home, run, settings):
        if planned.node.stage not in stages:
            continue
        key = run.nodes.get(planned.node.name)
        recorded = home.find_any(planned.node.kind, key) if key else None
        state: str = planned.state
        if recorded is not None and recorded.damage() is not None:
            state = "damaged"
        manifest = recorded.manifest if recorded else {}
        rows.append(
            {
                "node": planned.node.name,
                "stage": planned.node.stage,
                "key": key,
                "state": state,
                "reason": planned.reason,
                "folder": str(recorded.folder) if recorded else None,
                "rows_in": manifest.get("rows_in"),
                "rows_out": manifest.get("rows_out"),
                "rows_quarantined": manifest.get("rows_quarantined"),
                "seconds": manifest.get("seconds"),
            }
        )
    return rows
