"""The stage `prepare` as a Prefect flow."""

from prefect import flow

from flows.steps import build_stage


@flow(name="prepare", flow_run_name="{run} prepare")
def prepare(run: str, home: str = ".clha", overrides: list[str] | None = None, force: bool = False) -> dict[str, str]:
    """Read the sources, give every prompt its id and split, quarantine bad rows.

    Uses the saved settings of `run` with `overrides` ("a.b=value"); returns node -> key.
    """
    return build_stage("prepare", run, home, overrides, force)
