"""The stage `fit_reward` as a Prefect flow."""

from prefect import flow

from flows.steps import build_stage


@flow(name="fit_reward", flow_run_name="{run} fit_reward")
def fit_reward(
    run: str, home: str = ".clha", overrides: list[str] | None = None, force: bool = False
) -> dict[str, str]:
    """Fit the reward model that rescoring uses and the one that only evaluation sees.

    Uses the saved settings of `run` with `overrides` ("a.b=value"); returns node -> key.
    """
    return build_stage("fit_reward", run, home, overrides, force)
