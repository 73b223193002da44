"""The stage `generate` as a Prefect flow."""

from prefect import flow

from flows.steps import build_stage


@flow(name="generate", flow_run_name="{run} generate")
def generate(run: str, home: str = ".clha", overrides: list[str] | None = None, force: bool = False) -> dict[str, str]:
    """Sample candidates for every prompt with vLLM.

    Uses the saved settings of `run` with `overrides` ("a.b=value"); returns node -> key.
    """
    return build_stage("generate", run, home, overrides, force)
