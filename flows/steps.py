"""What all stage flows share: a node as a Prefect task, a stage as its nodes, the listener of both UI and terminal."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

from clha.errors import StageFailure, UserError
from clha.progress import Event
from clha.runs import check_run_name, existing_run
from clha.stages import chain, runner
from clha.store import Home
from flows import launch, present
from flows.orphans import bury
from flows.server import Server, ServerLost, answers

# What the terminal of `clha run` hears besides the UI; flows started by a deployment have none.
_terminal: ContextVar[runner.Listener | None] = ContextVar("terminal", default=None)


@contextmanager
def watched_by(listener: runner.Listener) -> Iterator[None]:
    """Flows called in this block tell `listener` too what they do."""
    token = _terminal.set(listener)
    try:
        yield
    finally:
        _terminal.reset(token)


def call_watched(home: Home, server: Server, listener: runner.Listener, flow: Callable[[], object]) -> None:
    """Call a flow in this process, seen by both the server and `listener`.

    Raises UserError or StageFailure as the stages do, and ServerLost when the server went away: what is finished by
    then is there, so that the work can go on without.
    """
    logging.raiseExceptions = False  # log lines that a lost server did not take are no news for the terminal
    try:
        bury(home)
        with watched_by(listener):
            flow()
    except (UserError, StageFailure):
        flush()
        raise
    except Exception as error:
        # Prefect's own errors are many once its server is gone; besides its client's, what counts is whether it is.
        if not isinstance(error, httpx.HTTPError) and answers(server.api, 5.0):
            raise
        raise ServerLost(f"the Prefect server no longer answers ({type(error).__name__})") from error
    flush()


def flush() -> None:
    """Send what Prefect still holds back (log lines, task states) before the server is ended."""
    APILogWorker.drain_all(timeout=5)
    EventsWorker.drain_all(timeout=5)


def listener_for(run: str, node: str) -> runner.Listener:
    """Tells the UI and, where there is one, the terminal."""
    page, terminal = present.NodePage(run, node), _terminal.get()

    def listen(name: str, event: Event) -> None:
        page.listen(name, event)
        if terminal is not None:
            terminal(name, event)

    return listen


# Stages are cached by their manifests only: a task cache would see the path of an input, not its content.
@task(name="node", task_run_name="{node}", cache_policy=NO_CACHE, persist_result=False)
def build_node(home: str, run: str, node: str) -> tuple[str, bool]:
    """Build one node of a run in a child process, or reuse it; returns its key and whether it was reused."""
    place = Home(Path(home))
    state = existing_run(place, run)
    settings = launch.saved_settings(state)
    wanted = next(n for n in chain.nodes(settings) if n.name == node)
    built = runner.build(place, state, settings, wanted, listener_for(run, node))
    return built.artifact.key, built.reused


def build_stage(
    stage: str, run: str, home: str, overrides: Sequence[str] | None = None, force: bool = False
) -> dict[str, str]:
    """Build the nodes of one stage of an existing run, with the settings that the run has saved.

    Returns node -> key. Raises UserError or StageFailure, with one line.
    """
    place = Home(Path(home))
    with launch.locked(place, check_run_name(run)):
        state = existing_run(place, run)
        nodes = launch.amend(place, state, stage, overrides or (), force)
        built = []
        for node in nodes:
            key, reused = build_node(str(place.root), run, node.name)
            artifact = place.find(node.kind, key)
            assert artifact is not None  # just built
            built.append(runner.Built(node.name, artifact, reused))
        present.publish_stage(run, stage, built)
        if stage == "rescore":
            present.publish_noise(place, existing_run(place, run))
    return {entry.node: entry.artifact.key for entry in built}
