"""The report of a run, from the artifacts that the run recorded: `python -m clha.stages.report --home H --run R`."""

import argparse
import sys
from pathlib import Path

from clha.config import settings_from
from clha.errors import StageFailure, UserError
from clha.runs import existing_run
from clha.store import Artifact, Home, kind_of


def make_report(home: Home, run_name: str) -> Path:
    """Write the report of a run, or leave it as it is when nothing changed; returns its path.

    Nodes that are not built are left out. Raises UserError when there is no such run, or it has built nothing.
    """
    from clha.reporting.report import build_report
    from clha.stages.chain import nodes

    run = existing_run(home, run_name)
    settings = settings_from(run.settings, (), where=f"run {run_name}")
    built: dict[str, Artifact] = {}
    for node in nodes(settings):
        artifact = home.find(kind_of(node.name), run.nodes.get(node.name, ""))
        if artifact is not None:
            built[node.name] = artifact
    if not built:
        raise UserError(f"run {run_name} has built nothing yet; start it with `clha run --run {run_name}`")
    return build_report(home, run, built)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--home", "--run"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    try:
        sys.stdout.write(f"{make_report(Home(Path(args.home)), args.run)}\n")
    except (UserError, StageFailure) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
