"""The stage `evaluate` as a Prefect flow."""

from prefect import flow

from flows.steps import build_stage


@flow(name="evaluate", flow_run_name="{run} evaluate")
def evaluate(run: str, home: str = ".clha", overrides: list[str] | None = None, force: bool = False) -> dict[str, str]:
    """Let both policies answer the held-out prompts and judge the answers with the unseen reward model.

    Uses the saved settings of `run` with `overrides` ("a.b=value"); returns node -> key.
    """
    return build_stage("evaluate", run, home, overrides, force)
