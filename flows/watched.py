"""Commands watched in the Prefect UI: with the server that is running, or one of their own."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from clha.store import Home
from flows import server, study
from flows.terminal import Terminal


@contextmanager
def prefect_for(home: Home, what: str, say: Callable[[str], None]) -> Iterator[server.Server]:
    """The Prefect server that is running, or one for as long as this lasts; Prefect is imported for it."""
    with ExitStack() as stack:
        found = server.find_server(home)
        if found is None:
            say("starting a Prefect server for this run")
            # Prefect is imported while its server starts.
            own = server.running_server(
                home, "127.0.0.1", server.free_port(), remember=False, meanwhile=lambda it: _import_prefect(home, it)
            )
            found = stack.enter_context(own)
        say(f"{what}: watch it at {found.ui}")
        _import_prefect(home, found)
        yield found


def _import_prefect(home: Home, found: server.Server) -> None:
    """Prefect reads its environment once, when it is imported."""
    os.environ.update(server.client_environment(home, found.api) | server.quiet_console())
    import flows.pipeline  # noqa: F401


def study_with_prefect(home: Home, name: str, overrides: Sequence[str], terminal: Terminal) -> dict[str, Any]:
    """The noise study of a run as a Prefect flow; without one where its server goes away."""
    with study.locked(home, name):
        try:
            with prefect_for(home, f"noise study of run {name}", terminal.say) as found:
                from flows.noise_study import run_study

                with terminal:
                    run_study(home, name, list(overrides), found, terminal.listen)
            return study.results(home, name)
        except server.ServerLost as lost:
            terminal.say(f"{lost}; the study goes on without it")
            with terminal:
                return study.conduct(home, name, overrides, terminal.listen)
