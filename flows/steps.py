"""What all stage flows share: a node as a Prefect task, a stage as its nodes, the listener of both UI and terminal."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from clha.progress import Event
from clha.runs import check_run_name, existing_run
from clha.stages import chain, runner
from clha.store import Home
from flows import launch, present

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
    return {entry.node: entry.artifact.key for entry in built}
