"""Builds one node in a process of its own: `python -m clha.stages.child --home H --run R --node N --key K`."""

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from clha.config import settings_from
from clha.errors import StageFailure
from clha.models import resolve_model
from clha.process import child_main
from clha.progress import Progress
from clha.runs import existing_run
from clha.stages.chain import nodes, plan_node
from clha.stages.work import Work
from clha.store import Artifact, ArtifactWriter, Home, kind_of


def main() -> NoReturn:
    """Build the node; errors go to the parent as one event."""
    parser = argparse.ArgumentParser()
    for name in ("--home", "--run", "--node", "--key"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    child_main(lambda progress: build_node(Home(Path(args.home)), args.run, args.node, args.key, progress))


def build_node(home: Home, run_name: str, node_name: str, key: str, progress: Progress) -> Artifact:
    """Build one node in this process, unless it is there already, holding its lock."""
    run = existing_run(home, run_name)
    settings = settings_from(run.settings, (), where=f"run {run_name}")
    node = next(n for n in nodes(settings) if n.name == node_name)
    with home.lock(f"{node.kind}-{key}", wait_seconds=settings.execution.timeout_minutes * 60):
        done = home.find(node.kind, key)
        if done:
            return done
        inputs = {}
        for name in node.inputs:
            artifact = home.find(kind_of(name), run.nodes.get(name, ""))
            if artifact is None:
                raise StageFailure(f"{node_name}: its input {name} is missing or damaged; run again to rebuild it")
            damage = artifact.damage(deep=True)
            if damage is not None:
                aside = home.put_aside(artifact)
                raise StageFailure(
                    f"{node_name}: its input {name} was damaged on disk ({damage}) and is put aside in {aside}; "
                    "run again to rebuild it"
                )
            inputs[name] = artifact
        planned = plan_node(home, run, settings, node, inputs)
        if planned.key != key:
            raise StageFailure(f"{node_name}: an input changed while it was being built; run again")
        models = {role: resolve_model(reference, home).path for role, reference in node.models.items()}
        writer = ArtifactWriter(home, node.kind, key)
        build: Callable[[Work], Artifact] = import_module(f"clha.stages.{node.stage}").build
        return build(Work(home, run_name, node_name, settings, planned.parts, inputs, models, writer, progress))


if __name__ == "__main__":
    main()
