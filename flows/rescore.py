"""The stage `rescore` as a Prefect flow."""

from prefect import flow

from flows.steps import build_stage


@flow(name="rescore", flow_run_name="{run} rescore")
def rescore(run: str, home: str = ".clha", overrides: list[str] | None = None, force: bool = False) -> dict[str, str]:
    """Score all candidates with the reward model and turn the scores into pair weights.

    Uses the saved settings of `run` with `overrides` ("a.b=value"); returns node -> key.
    """
    return build_stage("rescore", run, home, overrides, force)
