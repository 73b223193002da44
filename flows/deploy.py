"""Deployments: the chain on its schedule and each stage on demand, served from this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Cron

from clha.config import Settings
from flows.pipeline import STAGE_FLOWS, pipeline


def deployments(
    home: Path, config: Path, profile: str, settings: Settings, overrides: Sequence[str], *, schedule: bool
) -> list[RunnerDeployment]:
    """The chain, on the profile's schedule, and the stages, which work on a run that is there already.

    A run that starts while another of the same deployment is under way is cancelled, so that schedules do not pile
    up; two deployments that meet in one run are kept apart by the run's lock.
    """
    limit = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    when = Cron(settings.schedule.cron, timezone=settings.schedule.timezone) if schedule else None
    chain_parameters: dict[str, Any] = {
        "home": str(home),
        "config": str(config),
        "profile": profile,
        "overrides": list(overrides),
    }
    made = [
        pipeline.to_deployment(
            profile, parameters=chain_parameters, schedule=when, concurrency_limit=limit, tags=["clha"]
        )
    ]
    for flow in STAGE_FLOWS.values():
        made.append(
            flow.to_deployment(  # type: ignore[attr-defined]
                profile, parameters={"home": str(home), "run": profile}, concurrency_limit=limit, tags=["clha"]
            )
        )
    return made


def serve_all(made: Sequence[RunnerDeployment]) -> None:
    """Serve the deployments until this process is interrupted."""
    serve(*made, print_starting_message=False, limit=len(made))
