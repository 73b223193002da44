"""Deployments: the chain on its schedule, each stage and the noise study on demand, served from this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Cron, Schedule
from prefect.types.entrypoint import EntrypointType
from pydantic import ValidationError

from clha.errors import UserError
from clha.settings import Settings
from clha.store import Home
from flows.noise_study import noise_study
from flows.orphans import bury
from flows.pipeline import STAGE_FLOWS, pipeline


def deployments(
    home: Path, config: Path, profile: str, settings: Settings, overrides: Sequence[str], *, schedule: bool
) -> list[RunnerDeployment]:
    """The chain, on the profile's schedule; the stages and the noise study, which work on a run that is there already.

    A run that starts while another of the same deployment is under way is cancelled, so that schedules do not pile
    up; two deployments that meet in one run are kept apart by the run's lock.
    """
    limit = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    when = _schedule(settings.schedule.cron, settings.schedule.timezone) if schedule else None
    chain_parameters = {"home": str(home), "config": str(config), "profile": profile, "overrides": list(overrides)}
    served: list[tuple[Any, dict[str, Any], Schedule | None]] = [(pipeline, chain_parameters, when)]
    served += [(flow, {"home": str(home), "run": profile}, None) for flow in (*STAGE_FLOWS.values(), noise_study)]
    return [
        flow.to_deployment(
            profile,
            parameters=parameters,
            schedule=start,
            paused=False,  # ending `clha deploy` pauses the schedule; starting it again resumes
            concurrency_limit=limit,
            tags=["clha"],
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for flow, parameters, start in served
    ]


def _schedule(cron: str, timezone: str) -> Schedule:
    try:
        CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        example = 'such as cron "0 3 * * *", timezone Europe/Berlin'
        raise UserError(f"schedule.{first['loc'][0]}: {reason}; {example}") from None
    return Cron(cron, timezone=timezone)


def serve_all(home: Home, made: Sequence[RunnerDeployment]) -> None:
    """Serve the deployments until this process is interrupted."""
    bury(home)
    serve(*made, print_starting_message=False, limit=len(made))
