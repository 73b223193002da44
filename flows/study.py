"""What `clha noise-study` does around the study, without Prefect: settings, the prepared data, the child process."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clha.errors import UserError
from clha.runs import Run, check_run_name, existing_run, load_run
from clha.settings import Settings
from clha.stages import runner
from clha.stages.study_cells import count_cells
from clha.store import Busy, Home
from clha.study.tables import study_grids as study_grids
from flows import launch
from flows.show import chosen_run

NAME = "noise-study"  # listed among the nodes on the terminal

# What can be set for the study of a run that has prepared its data.
_OWN = ("noise_study", "fit_reward", "policy", "execution")


def result_path(home: Home, run: str) -> Path:
    """Where the results of a run's study lie, as JSON; the same as tables beside it, with the suffix .md."""
    return home.reports / run / "noise-study.json"


def accept(
    place: Path, name: str | None, profile: str | None, config: Path, sets: Sequence[str], own: Sequence[str]
) -> tuple[Home, str, list[str]]:
    """Check what a study was asked for and begin its run where `profile` is given and there is none of that name.

    `sets` are settings of such a new run; of a run that is there they are, like `own`, for the study only. Returns
    the home, the name of the run and the settings for the study only. Raises UserError.
    """
    if profile is not None and (name is None or load_run(Home(place), check_run_name(name)) is None):
        request = launch.Request(place, config, profile, name, tuple(sets))
        job = launch.accept(request)
        if load_run(job.home, job.name) is None:
            study_settings(Run(job.name, profile, job.settings.model_dump(mode="json")), own)
            with launch.locked(job.home, job.name):
                launch.begin(job)
            return job.home, job.name, list(own)
        name = job.name
    home = Home(place)
    run = chosen_run(home, name)
    overrides = [*sets, *own]
    study_settings(run, overrides)
    return home, run.name, overrides


def study_settings(run: Run, overrides: Sequence[str]) -> Settings:
    """The run's own settings with `overrides`, for a study only: the run keeps its own.

    Raises UserError when they change what the study takes from the run as it is.
    """
    own, settings = launch.saved_settings(run), launch.saved_settings(run, overrides)
    changed = [g for g in type(own).model_fields if g not in _OWN and getattr(own, g) != getattr(settings, g)]
    if changed:
        raise UserError(
            f"noise-study: run {run.name} has other settings for {changed[0]}; its study can change "
            f"{', '.join(_OWN)} only: for the rest begin a run of another name with --profile"
        )
    return settings


_held: set[tuple[Path, str]] = set()  # studies that this process holds the lock of


@contextmanager
def locked(home: Home, name: str) -> Iterator[None]:
    """The lock of a run's study, one of its own: the chain may go on beside it. Raises Busy naming the run.

    A flow in the process of the command that holds it shares it.
    """
    mark = (home.root, check_run_name(name))
    if mark in _held:
        yield
        return
    try:
        with home.lock(f"study-{name}"):
            _held.add(mark)
            try:
                yield
            finally:
                _held.remove(mark)
    except Busy as busy:
        if f"study-{name} " not in str(busy):
            raise
        raise Busy(f"the noise study of run {name} is in progress in another process; wait for it") from None


def conduct(home: Home, name: str, overrides: Sequence[str], listener: runner.Listener) -> dict[str, Any]:
    """Prepare the run's data where that is still to be done, and make the cells of the study that are missing.

    Returns the results, which lie in `result_path` too. Raises UserError or StageFailure, with one line.
    """
    with locked(home, name):
        run = existing_run(home, name)
        settings = study_settings(run, overrides)
        if home.find("prepare", run.nodes.get("prepare", "")) is None:
            with launch.locked(home, name):
                run = existing_run(home, name)  # another process may have had the lock
                runner.run_stage(home, run, launch.saved_settings(run), "prepare", listener)
                settings = study_settings(run, overrides)
        studied = (run.nodes["prepare"], settings)
        sets = [word for override in overrides for word in ("--set", override)]

        def make_cells() -> None:
            now = existing_run(home, name)
            if (now.nodes.get("prepare"), study_settings(now, overrides)) != studied:
                raise UserError(f"noise-study: run {name} was given other settings meanwhile; start the study again")
            runner.run_module(
                "clha.stages.noise_study",
                ["--home", str(home.root), "--run", name, *sets],
                name=NAME,
                log=home.logs / name / f"{NAME}.log",
                settings=settings,
                minutes=settings.execution.timeout_minutes * count_cells(settings.noise_study),
                listener=listener,
            )

        listener(NAME, {"event": "node", "state": "started"})
        runner.retried(settings, make_cells, NAME, listener)
        listener(NAME, {"event": "node", "state": "built"})
        return results(home, name)


def results(home: Home, name: str) -> dict[str, Any]:
    """What the last study of a run found."""
    body: dict[str, Any] = json.loads(result_path(home, name).read_text(encoding="utf-8"))
    return body


def as_json(results: dict[str, Any]) -> str:
    """Results as the text that `result_path` holds."""
    return json.dumps(results, indent=1)
