"""The noise study of a run as a Prefect flow."""

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from clha.runs import check_run_name
from clha.stages import runner
from clha.store import Home
from flows import present, study
from flows.server import Server
from flows.steps import call_watched, listener_for


@flow(name="noise-study", flow_run_name="{run} noise-study")
def noise_study(run: str, home: str = ".clha", overrides: list[str] | None = None) -> str:
    """Flip labels on purpose, find them with reward models, train with and without weights.

    Uses the saved settings of `run` with `overrides` ("noise_study.rates=[0.2]"); returns where the results lie.
    """
    place = Home(Path(home))
    results = make_cells(str(place.root), check_run_name(run), list(overrides or ()))
    present.publish_study(run, results)
    return str(study.result_path(place, run))


@task(name=study.NAME, task_run_name=study.NAME, cache_policy=NO_CACHE, persist_result=False)
def make_cells(home: str, run: str, overrides: list[str]) -> dict[str, Any]:
    """Make the cells that are missing, in a child process; returns the results."""
    return study.conduct(Home(Path(home)), run, overrides, listener_for(run, study.NAME))


def run_study(home: Home, run: str, overrides: list[str], server: Server, listener: runner.Listener) -> None:
    """Conduct the study in this process, seen by both the server and `listener`; raises as `call_watched` does."""
    call_watched(home, server, listener, lambda: noise_study(run=run, home=str(home.root), overrides=overrides))
