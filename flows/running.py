"""What `clha run` does once it knows its job: the chain with Prefect or without it, and the lines at the end."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.launch import Job
    from flows.terminal import Terminal


def with_prefect(job: "Job", terminal: "Terminal") -> None:
    """The chain as Prefect flows; where the server is lost, the run goes on without it."""
    from flows import launch, server, watched

    try:
        with watched.prefect_for(job.home, f"run {job.name}", terminal.say) as found:
            from flows.pipeline import run_pipeline

            launch.begin(job)  # only now: a server that cannot be used leaves the run as it was
            with terminal:
                run_pipeline(job, found, terminal.listen)
    except server.ServerLost as lost:
        terminal.say(f"{lost}; the run goes on without it")
        without_prefect(job, terminal)


def without_prefect(job: "Job", terminal: "Terminal") -> None:
    """The chain by itself, and its report."""
    from clha.runs import existing_run
    from clha.stages.report import report_is_fresh
    from flows import launch

    launch.begin(job)
    with terminal:
        launch.run_stages(job, terminal.listen)
        if launch.wants_report(job) and not report_is_fresh(job.home, existing_run(job.home, job.name)):
            launch.build_report(job.home, job.name, job.settings, terminal.listen)


def conclude(job: "Job", terminal: "Terminal", seconds: float, ui_command: str) -> None:
    """The lines that a finished run ends with: verdict, report, where to look, how long it took."""
    from clha.reporting.freshness import report_path
    from clha.runs import existing_run
    from flows import launch

    state = existing_run(job.home, job.name)
    metrics = launch.metrics_of(job.home, state)
    if launch.wants_report(job):
        if metrics is not None:
            figures, sentence = launch.outcome(metrics)
            terminal.say(f"verdict: {sentence}")
            terminal.say(f"         {figures}")
        terminal.say(f"report:  {report_path(job.home, job.name)}")
        terminal.say(f"UI:      {ui_command}")
    minutes, rest = divmod(round(seconds, 1), 60)
    terminal.say(f"time:    {f'{minutes:.0f} min ' if minutes else ''}{rest:.1f} s")
