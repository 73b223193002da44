"""The stage `train` as a Prefect flow."""

from prefect import flow

from flows.steps import build_stage


@flow(name="train", flow_run_name="{run} train")
def train(run: str, home: str = ".clha", overrides: list[str] | None = None, force: bool = False) -> dict[str, str]:
    """Train the policy with CLHA.

    Uses the saved settings of `run` with `overrides` ("a.b=value"); returns node -> key.
    """
    return build_stage("train", run, home, overrides, force)
