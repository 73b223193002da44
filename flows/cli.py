"""The command line `clha`. Prefect and all that is heavy is imported inside the commands that need it."""

import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer import Option

if TYPE_CHECKING:
    from clha.store import Home

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

HomeOption = Annotated[
    Path, Option("--home", envvar="CLHA_HOME", help="Folder for everything that runs make.", show_default=True)
]
ConfigOption = Annotated[Path, Option("--config", help="The settings file.")]
ProfileOption = Annotated[str | None, Option("--profile", help="A profile of the settings file [its default].")]
SetOption = Annotated[list[str] | None, Option("--set", metavar="A.B=VALUE", help="Change one setting; repeatable.")]
LatestRun = Annotated[str | None, Option("--run", help="Name of the run [the latest].")]
JsonOption = Annotated[bool, Option("--json", help="Print JSON.")]
PortOption = Annotated[int, Option("--port", help="Port of the Prefect server.")]
HostOption = Annotated[str, Option("--host", help="Address to listen on; others than 127.0.0.1 open it to a network.")]

HOME = Path(".clha")
CONFIG = Path("pipelines.yaml")


class Terminated(BaseException):
    """SIGTERM: unwinds the stack, so that children are ended on the way."""


@app.callback(invoke_without_command=True)
def about(
    context: typer.Context, version: Annotated[bool, Option("--version", help="Print the version.")] = False
) -> None:
    """Align a language model with ranked human preferences: prompts, candidates, rewards, training, evaluation."""
    if version:
        from clha import __version__

        typer.echo(f"clha {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    profile: ProfileOption = None,
    run: Annotated[str | None, Option("--run", help="Name of the run [the profile's name].")] = None,
    config: ConfigOption = CONFIG,
    set_: SetOption = None,
    from_stage: Annotated[
        str | None, Option("--from", metavar="STAGE", help="Take earlier stages as the run recorded them.")
    ] = None,
    only: Annotated[str | None, Option("--only", metavar="STAGE", help="Build this stage alone.")] = None,
    force: Annotated[bool, Option("--force", help="Build anew, under a new attempt number.")] = False,
    wait: Annotated[bool, Option("--wait", help="Wait for a run of the same name that is in progress.")] = False,
    prefect: Annotated[bool, Option("--prefect/--no-prefect", help="With or without the Prefect server.")] = True,
    home: HomeOption = HOME,
) -> None:
    """Run the chain: build what is missing or stale, reuse the rest, end with a report."""
    from clha.stages.report import report_is_fresh
    from flows import launch, running
    from flows.terminal import open_terminal

    began = time.monotonic()
    request = launch.Request(home, config.absolute(), profile, run, tuple(set_ or ()), from_stage, only, force)
    job = launch.accept(request)
    terminal = open_terminal()
    launch.announce_making(job.home, launch.model_references(job.settings), terminal.say)
    with launch.locked(job.home, job.name, _FOREVER if wait else 0):
        if wait:
            job = launch.retaken(job)
        planned = launch.plan(job)
        fresh = not force and all(entry.state == "fresh" for entry in planned)
        if fresh:
            state = launch.record_fresh(job, planned)
            if launch.wants_report(job) and not report_is_fresh(job.home, state):
                with terminal:
                    launch.build_report(job.home, job.name, job.settings, terminal.listen)
            terminal.say(f"run {job.name}: nothing to do, {_count(len(planned), 'node')} up to date")
        else:
            (running.with_prefect if prefect else running.without_prefect)(job, terminal)
        running.conclude(job, terminal, time.monotonic() - began, f"clha ui{_home_option(job.home)}")


_FOREVER = 1e9


def _home_option(home: "Home") -> str:
    """What must be added to a command so that it finds this home from the current folder."""
    default = os.environ.get("CLHA_HOME") or HOME
    return "" if Path(default).resolve() == home.root else f" --home {shlex.quote(str(home.root))}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@app.command("run-stage")
def run_stage(
    stage: Annotated[str, typer.Argument(help="prepare, fit_reward, generate, rescore, train or evaluate.")],
    run: Annotated[str, Option("--run", help="Name of the run.")],
    set_: SetOption = None,
    force: Annotated[bool, Option("--force", help="Build anew, under a new attempt number.")] = False,
    profile: Annotated[
        str | None, Option("--profile", help="Begin the run with this profile when there is none of that name.")
    ] = None,
    config: ConfigOption = CONFIG,
    wait: Annotated[bool, Option("--wait", help="Wait for a run of the same name that is in progress.")] = False,
    home: HomeOption = HOME,
) -> None:
    """Build one stage of a run, without Prefect, with the settings that the run has saved."""
    from clha.runs import check_run_name, existing_run, load_run
    from clha.stages import runner
    from clha.store import Home
    from flows import launch
    from flows.terminal import open_terminal

    request = launch.Request(home, config.absolute(), profile, check_run_name(run), only=stage)
    request.stages()
    place = Home(home)
    if profile is not None and load_run(place, run) is None:
        job = launch.accept(replace(request, only=None, overrides=tuple(set_ or ())))
        with launch.locked(job.home, run):
            launch.begin(job)
    existing_run(place, run)
    with launch.locked(place, run, _FOREVER if wait else 0), open_terminal() as terminal:
        state = existing_run(place, run)
        launch.amend(place, state, stage, set_ or (), force)
        runner.run_stage(place, state, launch.saved_settings(state), stage, terminal.listen)


@app.command()
def noise(run: LatestRun = None, json: JsonOption = False, home: HomeOption = HOME) -> None:
    """Show what a run's rewards and weights say about noise: gaps, pairs kept, flipped labels, reward models."""
    from flows import show

    typer.echo(show.noise(home, run, as_json=json))


@app.command("noise-study")
def noise_study(
    run: LatestRun = None,
    rates: Annotated[str | None, Option("--rates", metavar="R,...", help="Shares of flipped labels.")] = None,
    seeds: Annotated[str | None, Option("--seeds", metavar="S,...", help="Which labels are flipped.")] = None,
    arms: Annotated[
        str | None, Option("--arms", metavar="A,...", help="Pairs of the reward model: clean, flipped.")
    ] = None,
    weights: Annotated[
        str | None,
        Option("--weights", metavar="W,...", help="none, calibrated, shuffled, length, oracle; '': detection only."),
    ] = None,
    set_: SetOption = None,
    profile: Annotated[
        str | None, Option("--profile", help="Begin the run with this profile when there is none of that name.")
    ] = None,
    config: ConfigOption = CONFIG,
    json: JsonOption = False,
    prefect: Annotated[bool, Option("--prefect/--no-prefect", help="With or without the Prefect server.")] = True,
    home: HomeOption = HOME,
) -> None:
    """Flip labels of a run's pairs on purpose, find them again, and train short runs with and without weights."""
    from flows import study
    from flows.terminal import open_terminal

    asked = {"rates": rates, "seeds": seeds, "arms": arms, "weights": weights}
    own = [f"noise_study.{name}=[{value}]" for name, value in asked.items() if value is not None]
    place, name, overrides = study.accept(home, run, profile, config.absolute(), set_ or (), own)
    terminal = open_terminal(sys.stderr if json else sys.stdout)
    if prefect:
        from flows import watched

        results = watched.study_with_prefect(place, name, overrides, terminal)
    else:
        with terminal:
            results = study.conduct(place, name, overrides, terminal.listen)
    if json:
        typer.echo(study.as_json(results))
        return
    for grid in study.study_grids(results):
        terminal.table(grid)
    terminal.say(f"tables: {study.result_path(place, name).with_suffix('.md')}")


@app.command()
def fetch(
    profile: ProfileOption = None, config: ConfigOption = CONFIG, set_: SetOption = None, home: HomeOption = HOME
) -> None:
    """Fetch or convert a profile's models ahead of a run: where the network is, or once for many runs."""
    from flows import launch
    from flows.terminal import open_terminal

    terminal = open_terminal()
    for reference, folder in launch.fetch_models(home, config.absolute(), profile, set_ or (), terminal.say):
        terminal.say(f"{reference}: {folder}")


@app.command()
def status(run: LatestRun = None, json: JsonOption = False, home: HomeOption = HOME) -> None:
    """Show each node of a run: key, state, rows in, out and quarantined, folder."""
    from flows import show

    typer.echo(show.status(home, run, as_json=json))


@app.command()
def why(
    stage: Annotated[str | None, typer.Argument(help="A stage or a node [all].")] = None,
    run: LatestRun = None,
    config: ConfigOption = CONFIG,
    set_: SetOption = None,
    home: HomeOption = HOME,
) -> None:
    """Say why nodes would be built by `clha run` now: which part of the key changed, old and new value."""
    from flows import show

    typer.echo(show.why(home, run, stage, config, set_ or ()))


@app.command()
def runs(json: JsonOption = False, home: HomeOption = HOME) -> None:
    """List the runs."""
    from flows import show

    typer.echo(show.runs(home, as_json=json))


@app.command()
def report(run: LatestRun = None, home: HomeOption = HOME) -> None:
    """Build the report of a run anew and print its path."""
    from clha.store import Home
    from flows import launch, show
    from flows.terminal import open_terminal

    place = Home(home)
    state = show.chosen_run(place, run)
    with launch.locked(place, state.name), open_terminal() as terminal:
        path = launch.build_report(place, state.name, launch.saved_settings(state), terminal.listen)
    typer.echo(str(path))


@app.command()
def ui(port: PortOption = 4200, host: HostOption = "127.0.0.1", home: HomeOption = HOME) -> None:
    """Start the Prefect server and its UI, until Ctrl-C; `clha run` finds it."""
    from clha.errors import UserError
    from clha.store import Home
    from flows import server

    place = Home(home)
    found = server.find_server(place)
    if found is not None:
        raise UserError(f"a Prefect server is running already: {found.ui}")
    server.check_port(host, port)
    typer.echo("starting the Prefect server")
    with server.running_server(place, host, port, remember=True) as started:
        typer.echo(f"UI: {started.ui} (Ctrl-C ends it)")
        try:
            started.wait()
        except KeyboardInterrupt:
            typer.echo("ended")


@app.command()
def deploy(
    profile: ProfileOption = None,
    config: ConfigOption = CONFIG,
    set_: SetOption = None,
    schedule: Annotated[bool, Option("--schedule/--no-schedule", help="Start the chain on its schedule.")] = True,
    port: PortOption = 4200,
    home: HomeOption = HOME,
) -> None:
    """Serve the chain and each stage as deployments, until Ctrl-C."""
    from contextlib import ExitStack

    from flows import launch, server

    job = launch.accept(launch.Request(home, config.absolute(), profile, None, tuple(set_ or ())))
    with ExitStack() as stack:
        found = server.find_server(job.home)
        if found is None:
            server.check_port("127.0.0.1", port)
            typer.echo("starting the Prefect server")
            found = stack.enter_context(server.running_server(job.home, "127.0.0.1", port, remember=True))
        os.environ.update(server.client_environment(job.home, found.api))
        from flows.deploy import deployments, serve_all

        made = deployments(job.home.root, config.absolute(), job.profile, job.settings, set_ or (), schedule=schedule)
        for deployment in made:
            typer.echo(f"serving {deployment.flow_name}/{deployment.name}")
        if schedule:
            typer.echo(f"schedule: {job.settings.schedule.cron} ({job.settings.schedule.timezone})")
        typer.echo(f"UI: {found.ui}/deployments (Ctrl-C ends serving)")
        serve_all(job.home, made)


@app.command()
def doctor(
    json: JsonOption = False, profile: ProfileOption = None, config: ConfigOption = CONFIG, home: HomeOption = HOME
) -> None:
    """Say what is installed, which devices there are, what would be used, and what is amiss."""
    from flows import show

    text, well = show.doctor(home, config, profile, as_json=json)
    typer.echo(text)
    if not well:
        raise typer.Exit(1)


_INTERRUPTED = "interrupted; the same command goes on from what is finished"


def main() -> int:
    """Entry of the console script: one line for what the user can mend (2) or for a failed stage (1)."""
    from clha.errors import DISK_FULL, StageFailure, UserError, says_disk_full

    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = int(app(standalone_mode=False) or 0)
        return _say_error(_INTERRUPTED, code) if code == 130 else code
    except UserError as error:
        return _say_error(str(error), 2)
    except StageFailure as error:
        return _say_error(str(error), 1)
    except typer.TyperException as error:
        return _say_error(error.format_message().replace("\n", " "), 2)
    except KeyboardInterrupt:
        return _say_error(_INTERRUPTED, 130)
    except Terminated:
        return _say_error(_INTERRUPTED, 143)
    except OSError as error:
        if not says_disk_full(error):
            raise
        return _say_error(DISK_FULL, 1)


def _say_error(message: str, code: int) -> int:
    with suppress(BrokenPipeError):
        sys.stderr.write(f"error: {message}\n")
    return code


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
