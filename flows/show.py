"""What `clha status`, `why`, `runs` and `doctor` print."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clha.config import load_settings
from clha.errors import UserError
from clha.process import python_module
from clha.reporting.freshness import report_path
from clha.runs import Run, existing_run, load_run, run_names
from clha.settings import Settings
from clha.stages import chain, runner
from clha.stages.report import report_is_fresh
from clha.store import Home
from flows import launch, server


def chosen_run(home: Home, name: str | None) -> Run:
    """The run of that name, or the one that changed last. Raises UserError when there is none."""
    if name is None:
        names = run_names(home)
        if not names:
            raise UserError(f"no run under {home.root} yet; start one with `clha run`")
        name = names[-1]
    return existing_run(home, name)


def status(place: Path, name: str | None, *, as_json: bool) -> str:
    """Each node of a run by the run's own settings: key, state, rows, artifact folder."""
    home = Home(place)
    run = chosen_run(home, name)
    rows = runner.status(home, run, launch.saved_settings(run))
    report = report_path(home, run.name) if report_is_fresh(home, run) else None
    if as_json:
        body = {"run": run.name, "profile": run.profile, "report": str(report) if report else None, "nodes": rows}
        return json.dumps(body, indent=1, ensure_ascii=False)
    table = [["node", "state", "in", "out", "quarantined", "seconds", "artifact"]]
    for row in rows:
        figures = [row["rows_in"], row["rows_out"], row["rows_quarantined"]]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        folder = str(Path(row["folder"]).relative_to(home.root)) if row["folder"] else ""
        shown = ["" if figure is None else str(figure) for figure in figures]
        table.append([row["node"], row["state"], *shown, seconds, folder])
    lines = [f"run {run.name} (profile {run.profile}) in {home.root}", *_columns(table, right=range(2, 6))]
    lines += [f"{row['node']}: {row['reason']}" for row in rows if row["reason"]]
    lines.append(f"report: {report}" if report else "report: none for these artifacts yet")
    return "\n".join(lines)


def noise(place: Path, name: str | None, *, as_json: bool) -> str:
    """What a run's rewards and weights say about noise: one line for each figure."""
    from clha.reporting.noise_facts import noise_lines
    from clha.stages.report import noise_of_run

    home = Home(place)
    facts = noise_of_run(home, chosen_run(home, name))
    if as_json:
        return json.dumps(facts, indent=1, ensure_ascii=False)
    lines = _columns([list(line) for line in noise_lines(facts)], right=[])
    return "\n".join([f"noise of run {facts['run']}", *lines])


def _columns(table: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def why(place: Path, name: str | None, what: str | None, config: Path, overrides: Sequence[str]) -> str:
    """One line for each part of a key that `clha run` would find changed, for the nodes of `what` or for all.

    Compares with today's settings file (the run's profile of it, and `overrides`); where there is no such file, with
    the settings that the run has saved.
    """
    home = Home(place)
    run = chosen_run(home, name)
    if config.exists():
        _, settings = load_settings(config, run.profile, overrides)
    else:
        settings = launch.saved_settings(run, overrides)
    nodes = chain.nodes(settings)
    known = {node.name for node in nodes} | set(chain.STAGES)
    if what is not None and what not in known:
        raise UserError(f"no stage or node `{what}`; there are {', '.join(sorted(known))}")
    lines: list[str] = []
    for planned in chain.plan(home, run, settings):
        if what in (None, planned.node.stage, planned.node.name):
            lines += chain.why(run, home, planned)
    return "\n".join(lines)


def runs(place: Path, *, as_json: bool) -> str:
    """All runs: profile, when last worked on, how many nodes are recorded, whether there is a report."""
    home = Home(place)
    rows = []
    for name in sorted(run_names(home)):
        run = load_run(home, name)
        if run is None:
            continue
        last = run.history[-1] if run.history else {"at": "", "event": ""}
        rows.append(
            {
                "run": run.name,
                "profile": run.profile,
                "nodes": len(run.nodes),
                "last": last["at"],
                "event": " ".join(filter(None, (last["event"], last.get("node")))),
                "report": str(report_path(home, run.name)) if report_is_fresh(home, run) else None,
            }
        )
    if as_json:
        return json.dumps(rows, indent=1)
    if not rows:
        return f"no run under {home.root} yet"
    table = [["run", "profile", "nodes", "last", "event", "report"]]
    table += [[str(value if value is not None else "") for value in row.values()] for row in rows]
    return "\n".join(_columns(table, right=[2]))


def doctor(place: Path, config: Path, profile: str | None, *, as_json: bool) -> tuple[str, bool]:
    """What is installed, which devices there are, what would be used; and whether all is well."""
    home = Home(place)
    found = _probe()
    problems: list[str] = list(found.pop("problems"))
    settings, models = _profile_models(home, config, profile, problems)
    disk_place = next(p for p in (home.root, *home.root.parents) if p.exists())
    free = shutil.disk_usage(disk_place).free / 1e9
    if settings is not None and free < settings.execution.min_free_disk_gb:
        problems.append(
            f"disk: {free:.1f} GB free, {settings.execution.min_free_disk_gb:g} GB wanted (execution.min_free_disk_gb)"
        )
    gpus = sum(device.startswith("cuda:") for device in found["devices"])
    if settings is not None and settings.train.processes > gpus > 0:
        problems.append(f"train.processes is {settings.train.processes}, GPUs: {gpus}")
    try:
        running = server.find_server(home)
    except UserError as error:
        running = None
        problems.append(str(error))
    found |= {
        "home": str(home.root),
        "free_disk_gb": round(free, 1),
        "models": models,
        "server": running.ui if running else None,
        "problems": problems,
    }
    if as_json:
        return json.dumps(found, indent=1), not problems
    lines = [
        f"python    {found['python']}",
        f"packages  {', '.join(f'{n} {v}' for n, v in found['packages'].items())}",
        f"cpu       {found['cpus']} cores, {found['memory_gb']:.1f} GB memory, {' '.join(found['instruction_sets'])}",
        *[f"device    {device}" for device in found["devices"]],
        f"uses      {found['uses']}",
        f"home      {home.root}, {free:.1f} GB free",
        *[f"model     {name}: {state}" for name, state in models.items()],
        f"server    {running.ui if running else 'none; `clha run` starts its own, `clha ui` one that stays'}",
        *[f"problem   {problem}" for problem in problems],
        "all is well" if not problems else f"{len(problems)} problem(s)",
    ]
    return "\n".join(lines), not problems


def _probe() -> dict[str, Any]:
    """Ask a child process: the command line itself stays free of torch."""
    done = subprocess.run(python_module("clha.devices"), capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the installed packages do not work together: {last}; `make env` builds the environment")
    body: dict[str, Any] = json.loads(done.stdout)
    return body


def _profile_models(
    home: Home, config: Path, profile: str | None, problems: list[str]
) -> tuple[Settings | None, dict[str, str]]:
    try:
        _, settings = load_settings(config, profile)
    except UserError as error:
        problems.append(str(error))
        return None, {}
    references = launch.model_references(settings)
    waiting = launch.models_to_make(home, references)
    states: dict[str, str] = {}
    for reference in references:
        if reference in waiting:
            states[reference] = "converted by the first run or `clha fetch`"
        elif reference.startswith("bundled:"):
            states[reference] = str(home.models / reference.removeprefix("bundled:"))
        elif reference.startswith("hub:"):
            states[reference] = "fetched from the Hub, or its cache"
        else:
            states[reference] = "there" if (Path(reference) / "config.json").is_file() else "missing"
            if states[reference] == "missing":
                problems.append(f"model {reference}: no model folder there")
    return settings, states
