"""What `clha run` does around the stages, without Prefect: settings, lock, plan, report, verdict."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clha.config import load_settings, settings_from
from clha.errors import StageFailure, UserError
from clha.evaluation.verdict import digits_for, signed, verdict
from clha.models import check_reference, resolve_model
from clha.reporting.freshness import report_path
from clha.runs import Run, check_run_name, existing_run, load_run, run_lock, save_run
from clha.settings import Settings
from clha.sources.files import local_files, source_paths
from clha.stages import chain, runner
from clha.store import Artifact, Home

REPORT = "report"  # listed among the nodes on the terminal, though it is no artifact


@dataclass(frozen=True)
class Request:
    """What a run was asked for, as it stands on the command line or in a deployment's parameters."""

    home: Path
    config: Path
    profile: str | None = None
    run: str | None = None
    overrides: tuple[str, ...] = ()
    from_stage: str | None = None
    only: str | None = None
    force: bool = False

    def stages(self) -> tuple[str, ...]:
        """The stages to build; the others are taken as the run recorded them. Raises UserError."""
        if self.from_stage and self.only:
            raise UserError("--from and --only exclude each other: --only S builds S alone, --from S also what follows")
        for stage in (self.from_stage, self.only):
            if stage is not None and stage not in chain.STAGES:
                raise UserError(f"no stage `{stage}`; there are {', '.join(chain.STAGES)}")
        if self.only:
            return (self.only,)
        return chain.STAGES[chain.STAGES.index(self.from_stage) if self.from_stage else 0 :]


@dataclass(frozen=True)
class Job:
    """A request with its settings checked. Nothing has been written for it yet."""

    request: Request
    home: Home
    name: str
    profile: str
    settings: Settings
    stages: tuple[str, ...]

    @property
    def nodes(self) -> list[chain.Node]:
        """The nodes to build."""
        return chain.select_nodes(self.settings, self.stages)


def accept(request: Request) -> Job:
    """Check a request as far as that is possible without writing anything. Raises UserError."""
    stages = request.stages()
    profile, settings = load_settings(request.config, request.profile, request.overrides)
    name = check_run_name(request.run or profile)
    home = Home(request.home)
    if stages[0] != "prepare":
        existing_run(home, name)  # it must have recorded what comes before
    previous = load_run(home, name) if len(stages) < len(chain.STAGES) else None
    if previous is not None:
        settings = _with_taken(settings, previous, stages, request.overrides)
    _check_inputs(settings, stages)
    if not chain.select_nodes(settings, stages):
        raise UserError(f"--only {request.only}: nothing to build, the settings give the reward models themselves")
    lora = settings.train.lora
    if "evaluate" in stages and lora is not None and not lora.merge:
        raise UserError("train.lora.merge is false: an adapter alone cannot be evaluated; merge it, or use --only")
    home.create()
    return Job(request, home, name, profile, settings, stages)


def retaken(job: Job) -> Job:
    """The job after a wait for the run: what it takes from the run is as the run says now. Raises UserError."""
    run = load_run(job.home, job.name)
    if run is None or len(job.stages) == len(chain.STAGES):
        return job
    return replace(job, settings=_with_taken(job.settings, run, job.stages, job.request.overrides))


def _with_taken(settings: Settings, run: Run, stages: Sequence[str], overrides: Sequence[str]) -> Settings:
    """Today's settings for the stages to build, the run's own for those that are taken as it recorded them.

    The run file then says what its artifacts were made from. Raises UserError when an override is for one that is
    taken and says something else.
    """
    today = settings.model_dump(mode="json")
    taken = {stage: run.settings.get(stage) for stage in chain.STAGES if stage not in stages}
    for override in overrides:
        path = override.partition("=")[0].split(".")
        group = path[0]
        if group in taken and _at(today, path) != _at(taken, path):
            raise UserError(
                f"--set {override}: {group} is not built now but taken as run {run.name} recorded it; "
                f"leave the setting out, or build {group} too"
            )
    return settings_from(today | taken, (), where=f"run {run.name}")


def _at(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _check_inputs(settings: Settings, stages: Sequence[str]) -> None:
    """Raises UserError for data and models of these stages that are not there, before anything is written."""
    if "prepare" in stages:
        for path in source_paths(settings.prepare):
            if not path.startswith("hub:"):
                local_files(path)
    for reference in model_references(settings, stages):
        check_reference(reference)


def model_references(settings: Settings, stages: Sequence[str] = chain.STAGES) -> list[str]:
    """All models that these stages load, each once."""
    return sorted({ref for node in chain.select_nodes(settings, stages) for ref in node.models.values()})


def models_to_make(home: Home, references: Sequence[str]) -> list[str]:
    """The bundled models among `references` that have not been converted yet."""
    bundled = [r for r in references if r.startswith("bundled:")]
    return [r for r in bundled if not (home.models / r.removeprefix("bundled:") / "config.json").is_file()]


def announce_making(home: Home, references: Sequence[str], say: Callable[[str], None]) -> None:
    """Name the models that will be converted: what comes next takes that long."""
    for reference in models_to_make(home, references):
        say(f"converting {reference} (once, up to half a minute)")


def fetch_models(
    home: Path, config: Path, profile: str | None, overrides: Sequence[str], say: Callable[[str], None]
) -> Iterator[tuple[str, Path]]:
    """Fetch or convert the models of a profile; yields each reference and its folder. Raises UserError."""
    _, settings = load_settings(config, profile, overrides)
    references, place = model_references(settings), Home(home)
    for reference in references:
        check_reference(reference)
    place.create()
    for reference in references:
        announce_making(place, [reference], say)
        yield reference, resolve_model(reference, place).path


_held: dict[tuple[Path, str], bool] = {}  # runs that this process holds the lock of -> whether they have begun


@contextmanager
def locked(home: Home, name: str, wait_seconds: float = 0) -> Iterator[None]:
    """The run's lock; a stage flow inside a pipeline of the same process shares it. Raises Busy."""
    mark = (home.root, name)
    if mark in _held:
        yield
        return
    with run_lock(home, name, wait_seconds):
        _held[mark] = False
        try:
            yield
        finally:
            del _held[mark]


def plan(job: Job) -> list[chain.Planned]:
    """The nodes to build with their keys and states; other inputs are taken as the run recorded them."""
    for reference in model_references(job.settings, job.stages):
        resolve_model(reference, job.home)  # a model that cannot be fetched is said now, not hours later
    run = load_run(job.home, job.name) or Run(job.name, job.profile, {})
    known = {node.name: node for node in chain.nodes(job.settings)}
    done: dict[str, Artifact] = {}
    planned: list[chain.Planned] = []
    selected = {node.name for node in job.nodes}
    for node in job.nodes:
        for name in node.inputs:
            if name not in selected and name not in done:
                artifact = chain.taken_node(job.home, run, known[name]).artifact
                assert artifact is not None
                done[name] = artifact
        if all(name in done for name in node.inputs):
            entry = chain.plan_node(job.home, run, job.settings, node, done)
        else:
            entry = chain.Planned(node, "waiting")
        if entry.artifact is not None:
            done[node.name] = entry.artifact
        planned.append(entry)
    return planned


def begin(job: Job) -> Run:
    """Save today's settings in the run file before any work; `force` counts a new attempt for each node to build.

    Happens once while the run's lock is held: the command line begins a run, then the flow that it calls.
    """
    mark = (job.home.root, job.name)
    if _held.get(mark):
        return existing_run(job.home, job.name)
    if mark in _held:
        _held[mark] = True
    run = runner.start_run(job.home, job.name, job.profile, job.settings, load_run(job.home, job.name))
    if job.request.force:
        for node in job.nodes:
            run.attempts[node.name] = run.attempts.get(node.name, 0) + 1
        run.note("forced", nodes=[node.name for node in job.nodes])
        save_run(job.home, run)
    return run


def record_fresh(job: Job, planned: Sequence[chain.Planned]) -> Run:
    """Record a run of which every node is there already. Writes nothing when the run file says the same."""
    keys = {entry.node.name: entry.key for entry in planned if entry.key}
    previous = load_run(job.home, job.name)
    same = previous is not None and previous.settings == job.settings.model_dump(mode="json")
    if previous is not None and same and all(previous.nodes.get(n) == k for n, k in keys.items()):
        return previous
    run = runner.start_run(job.home, job.name, job.profile, job.settings, previous)
    for name, key in keys.items():
        run.nodes[name] = key
        run.note("reused", node=name, key=key)
    save_run(job.home, run)
    return run


def saved_settings(run: Run, overrides: Sequence[str] = ()) -> Settings:
    """The settings that a run was started with, with `overrides` applied. Raises UserError."""
    return settings_from(run.settings, overrides, where=f"run {run.name}")


def amend(home: Home, run: Run, stage: str, overrides: Sequence[str], force: bool) -> list[chain.Node]:
    """Apply `--set` and `--force` to a run's own settings before one of its stages is built; returns its nodes."""
    settings = saved_settings(run, overrides)
    _check_inputs(settings, [stage])
    nodes = chain.select_nodes(settings, [stage])
    if not nodes:
        raise UserError(f"{stage}: nothing to build, the settings of run {run.name} give the reward models themselves")
    if overrides or force:
        run.settings = settings.model_dump(mode="json")
        for node in nodes if force else ():
            run.attempts[node.name] = run.attempts.get(node.name, 0) + 1
        run.note("amended", stage=stage, set=list(overrides), force=force)
        save_run(home, run)
    return nodes


def run_stages(job: Job, listener: runner.Listener) -> list[runner.Built]:
    """Build the job's stages in this process, without Prefect; what is finished already is reused."""
    run = existing_run(job.home, job.name)
    return [built for stage in job.stages for built in runner.run_stage(job.home, run, job.settings, stage, listener)]


def wants_report(job: Job) -> bool:
    """Whether the job ends with a report: it does when `evaluate` is among its stages."""
    return "evaluate" in job.stages


def build_report(home: Home, name: str, settings: Settings, listener: runner.Listener) -> Path:
    """Build the report in a child process (it needs matplotlib) and note in the run what it shows.

    Raises UserError or StageFailure, with one line.
    """
    listener(REPORT, {"event": "node", "state": "started"})
    log = runner.run_module(
        "clha.stages.report",
        ["--home", str(home.root), "--run", name],
        name=REPORT,
        log=home.logs / name / f"{REPORT}.log",
        settings=settings,
        minutes=settings.execution.timeout_minutes,
        listener=listener,
    )
    path = report_path(home, name)
    if not path.is_file():
        raise StageFailure(f"report: its process ended well but left no {path.name}; log: {log}")
    run = existing_run(home, name)
    run.note(REPORT)
    save_run(home, run)
    listener(REPORT, {"event": "node", "state": "built"})
    return path


def metrics_of(home: Home, run: Run) -> dict[str, Any] | None:
    """`metrics.json` of the run's evaluation, or None when it has none."""
    artifact = home.find("evaluate", run.nodes.get("evaluate", ""))
    if artifact is None:
        return None
    metrics: dict[str, Any] = json.loads((artifact.folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def outcome(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """Held-out reward before and after with its interval, and what that says, one line each."""
    reward = metrics["reward"]
    low, high = reward["interval"]
    digits = digits_for(low, high)
    figures = (
        f"held-out reward {reward['base']:.{digits}f} before, {reward['trained']:.{digits}f} after, "
        f"gain {signed(reward['gain'], digits)} [{signed(low, digits)}, {signed(high, digits)}]"
    )
    return figures, verdict(metrics).sentence
