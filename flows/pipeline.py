"""The whole chain as one Prefect flow, with a subflow for each stage."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled, State

from clha.digests import seed_of
from clha.reporting.freshness import report_path
from clha.runs import Run, existing_run, load_run, save_run
from clha.stages import chain, runner
from clha.stages.report import report_is_fresh
from clha.store import Busy, Home
from flows import launch, present
from flows.evaluate import evaluate
from flows.fit_reward import fit_reward
from flows.generate import generate
from flows.prepare import prepare
from flows.rescore import rescore
from flows.server import Server
from flows.steps import call_watched, listener_for
from flows.train import train

StageFlow = Callable[..., dict[str, str]]

STAGE_FLOWS: dict[str, StageFlow] = {
    "prepare": prepare,
    "fit_reward": fit_reward,
    "generate": generate,
    "rescore": rescore,
    "train": train,
    "evaluate": evaluate,
}


def _flow_run_name() -> str:
    return str(runtime.flow_run.parameters.get("run") or scheduled_name())


@flow(name="pipeline", flow_run_name=_flow_run_name)
def pipeline(
    run: str | None = None,
    profile: str | None = None,
    config: str = "pipelines.yaml",
    home: str = ".clha",
    overrides: list[str] | None = None,
    from_stage: str | None = None,
    only: str | None = None,
    force: bool = False,
) -> dict[str, str] | State:
    """Prompts to an aligned model and the evidence whether it is better.

    Without `run` (a scheduled start) the run is named after deployment and time, and `schedule.fresh` says what is
    new; a second start in the same second is cancelled. Returns node -> key.
    """
    began = time.monotonic()
    request = launch.Request(Path(home), Path(config), profile, run, tuple(overrides or ()), from_stage, only, force)
    if run is None:
        request = scheduled(request, scheduled_name(), scheduled_time(), str(runtime.deployment.name or "pipeline"))
    job = launch.accept(request)
    with ExitStack() as held:
        try:
            held.enter_context(launch.locked(job.home, job.name))
        except Busy as busy:
            if run is None:
                return Cancelled(message=str(busy))
            raise
        fresh = all(entry.state == "fresh" for entry in launch.plan(job)) and not force
        launch.begin(job)
        for stage in job.stages:
            if chain.select_nodes(job.settings, [stage]):
                STAGE_FLOWS[stage](run=job.name, home=str(job.home.root))
        report = None
        if launch.wants_report(job):
            report = make_report(str(job.home.root), job.name)
        state = existing_run(job.home, job.name)
        metrics = launch.metrics_of(job.home, state) if launch.wants_report(job) else None
        if fresh:
            present.run_logger().info("nothing was new: every stage was reused")
        present.publish_result(job.name, metrics, report, time.monotonic() - began, fresh)
    return {node.name: state.nodes[node.name] for node in job.nodes}


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def make_report(home: str, run: str) -> str:
    """Build the report, unless it shows this very run already; returns its path."""
    place = Home(Path(home))
    state = existing_run(place, run)
    if report_is_fresh(place, state):
        return str(report_path(place, run))
    return str(launch.build_report(place, run, launch.saved_settings(state), listener_for(run, launch.REPORT)))


def scheduled_time() -> datetime:
    """When this flow run was meant to start."""
    return (runtime.flow_run.scheduled_start_time or datetime.now(UTC)).astimezone(UTC)


def scheduled_name() -> str:
    """The name of a run that was given none: its deployment and the time it was meant to start."""
    return f"{runtime.deployment.name or 'pipeline'}-{scheduled_time():%Y%m%dT%H%M%SZ}"


def scheduled(request: launch.Request, name: str, at: datetime, deployment: str) -> launch.Request:
    """A request for a scheduled run: its name, and what `schedule.fresh` asks to be new.

    `seed`: generate.seed follows from the time. Without `data`, the prompts are those of the deployment's last run;
    with it, the source is read as it is now.
    """
    request = replace(request, run=name)
    job = launch.accept(request)
    fresh = job.settings.schedule.fresh
    if "seed" in fresh:
        seed = seed_of(job.settings.generate.seed, at.isoformat())
        request = replace(request, overrides=(*request.overrides, f"generate.seed={seed}"))
    if "data" not in fresh and load_run(job.home, name) is None:
        last = last_run(job.home, deployment, "prepare")
        if last is not None:
            body = job.settings.model_dump(mode="json")
            save_run(job.home, Run(name, job.profile, body, {"prepare": last.nodes["prepare"]}))
            request = replace(request, from_stage="fit_reward")
    return request


def last_run(home: Home, deployment: str, node: str) -> Run | None:
    """The latest earlier run of a deployment that has finished `node`."""
    for path in sorted(home.runs.glob(f"{deployment}-*Z.json"), reverse=True):
        run = load_run(home, path.stem)
        if run is not None and home.find(node, run.nodes.get(node, "")):
            return run
    return None


def run_pipeline(job: launch.Job, server: Server, listener: runner.Listener) -> None:
    """Run the chain in this process, seen by both the server and `listener`; raises as `call_watched` does."""
    request = job.request
    call_watched(
        job.home,
        server,
        listener,
        lambda: pipeline(
            run=job.name,
            profile=job.profile,
            config=str(request.config),
            home=str(job.home.root),
            overrides=list(request.overrides),
            from_stage=request.from_stage,
            only=request.only,
            force=request.force,
        ),
    )
