"""The report of a run, from the artifacts that the run recorded: `python -m clha.stages.report --home H --run R`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clha.config import settings_from
from clha.errors import UserError
from clha.runs import Run, existing_run
from clha.store import Artifact, Home, kind_of

if TYPE_CHECKING:
    from clha.reporting.noise_tables import NoiseTables


def make_report(home: Home, run_name: str) -> Path:
    """Write the report of a run, or leave it as it is when nothing changed; returns its path.

    Nodes that are not built are left out. Raises UserError when there is no such run, or it has built nothing.
    """
    from clha.reporting.report import build_report

    run = existing_run(home, run_name)
    built = built_nodes(home, run)
    if not built:
        raise UserError(f"run {run_name} has built nothing yet; start it with `clha run --run {run_name}`")
    return build_report(home, run, built)


def report_is_fresh(home: Home, run: Run) -> bool:
    """Whether the report shows the artifacts that the run points at now."""
    from clha.reporting.freshness import is_fresh

    try:
        return is_fresh(home, run, built_nodes(home, run))
    except UserError:  # its settings are those of another version
        return False


def built_nodes(home: Home, run: Run) -> dict[str, Artifact]:
    """The run's finished artifacts by node, in the order of the chain."""
    from clha.stages.chain import nodes

    settings = settings_from(run.settings, (), where=f"run {run.name}")
    found = {n.name: home.find(kind_of(n.name), run.nodes.get(n.name, "")) for n in nodes(settings)}
    return {name: artifact for name, artifact in found.items() if artifact is not None}


def noise_of_run(home: Home, run: Run) -> dict[str, Any]:
    """What the run's rewards and weights say about noise; see `clha.reporting.noise_facts`.

    Raises UserError when the run has not rescored yet.
    """
    from clha.reporting.noise_facts import noise_facts, read_noise

    built = _rescored(home, run)
    return {"run": run.name} | noise_facts(built, read_noise(built))


def noise_tables_of_run(home: Home, run: Run) -> "NoiseTables":
    """The same as tables, with the pairs trusted least and most and the reliability of the rewards."""
    from clha.reporting.noise_facts import noise_facts, noise_lines, read_noise
    from clha.reporting.noise_tables import NoiseTables, pairs_markdown, reliability_rows

    built = _rescored(home, run)
    data = read_noise(built)
    lines = noise_lines(noise_facts(built, data))
    return NoiseTables(lines, pairs_markdown(built, data), reliability_rows(built))


def _rescored(home: Home, run: Run) -> dict[str, Artifact]:
    """The run's artifacts. Raises UserError when those of rescoring are not among them."""
    from clha.reporting.noise_facts import NOISE_NODES

    built = built_nodes(home, run)
    missing = [name for name in NOISE_NODES if name not in built]
    if missing:
        raise UserError(
            f"run {run.name} has no finished {missing[0]}; `clha run --run {run.name}` or `clha run-stage` builds it"
        )
    return built


if __name__ == "__main__":
    from clha.process import child_main

    parser = argparse.ArgumentParser()
    for name in ("--home", "--run"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    child_main(lambda progress: sys.stdout.write(f"{make_report(Home(Path(args.home)), args.run)}\n"))
