"""What the Prefect UI shows of a run: log lines, progress, a summary and tables for each stage.

Publishing never fails a run: the first error of a server that is gone turns it off and is logged once.
"""

import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import MissingContextError, PrefectException
from prefect.logging import get_run_logger

from clha.digests import digest_of
from clha.errors import StageFailure, UserError, reason_of
from clha.progress import Event
from clha.runs import Run
from clha.stages.runner import Built
from clha.store import Home
from clha.study.tables import markdown, study_grids
from flows import launch

_PROGRESS_SECONDS = 3.0
_LINES_PER_NODE = 1000
_CURVE_ROWS = 60

_off: set[str] = set()  # the reason why publishing is off in this process


def run_logger() -> "logging.Logger | logging.LoggerAdapter[Any]":
    """The logger of the current flow or task run."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("clha")


def artifact_key(run: str, *parts: str) -> str:
    """An artifact key from a run's name and names of ours: lowercase letters, digits and dashes.

    A run whose name has other characters gets a few digits of its digest: `a.b`, `a-b` and `A_B` stay apart.
    """
    name = _dashed(run)
    if name != run:
        name = f"{name}-{digest_of(run)[:6]}"
    return "-".join([name, *map(_dashed, parts)])


def _dashed(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def publish(call: Callable[[], Any]) -> Any:
    """Call the server, or return None when it is gone; says so once."""
    if _off:
        return None
    try:
        return call()
    except (httpx.HTTPError, PrefectException, OSError) as error:
        _off.add(type(error).__name__)
        run_logger().warning(
            f"the Prefect server takes no artifacts ({type(error).__name__}: {error}); the run goes on without them"
        )
        return None


class NodePage:
    """One node in the UI: its output as log lines, its progress as an artifact that is updated every few seconds."""

    def __init__(self, run: str, node: str) -> None:
        self._key = artifact_key(run, node, "progress")
        self._logger = run_logger()
        self._lines = 0
        self._artifact: UUID | None = None
        self._last = 0.0
        self._percent = -1.0

    def listen(self, node: str, event: Event) -> None:
        """Show one event of the node (see clha.progress and clha.stages.runner)."""
        kind = event["event"]
        if kind == "output":
            self._line(event["line"].rsplit("\r", 1)[-1])
        elif kind == "log":
            self._logger.info(event["message"])
        elif kind == "metrics":
            shown = " ".join(f"{name}={value:.4g}" for name, value in sorted(event["values"].items()))
            self._line(f"step {event['step']}: {shown}")
        elif kind == "progress":
            self._progress(event)
        elif kind == "node":
            self._logger.info(f"{node}: {event['state']}" + (f" ({event['key']})" if "key" in event else ""))

    def _line(self, line: str) -> None:
        if not line.strip():
            return
        self._lines += 1
        if self._lines <= _LINES_PER_NODE:
            self._logger.info(line)
        elif self._lines == _LINES_PER_NODE + 1:
            self._logger.info(f"more than {_LINES_PER_NODE} lines: the rest is in the log file only")

    def _progress(self, event: Event) -> None:
        now, done, total = time.monotonic(), event["done"], max(1, event["total"])
        percent = min(100.0, 100.0 * done / total)
        if percent == self._percent or (done < total and now - self._last < _PROGRESS_SECONDS):
            return
        self._last, self._percent = now, percent
        text = f"{done} of {event['total']} {event['unit']} {event['note']}".strip()
        artifact = self._artifact
        if artifact is None:
            self._artifact = publish(lambda: create_progress_artifact(percent, key=self._key, description=text))
        else:
            publish(lambda: update_progress_artifact(artifact, percent, description=text))


def publish_stage(run: str, stage: str, built: Sequence[Built]) -> None:
    """A markdown summary of a stage, and its tables: quarantined rows by reason, the learning curve, the metrics."""
    publish(
        lambda: create_markdown_artifact(
            stage_summary(run, stage, built), key=artifact_key(run, stage), description=f"{stage} of run {run}"
        )
    )
    for entry in built:
        for name, rows in _tables(entry):
            key = artifact_key(run, entry.node, name)
            publish(
                lambda key=key, rows=rows, name=name, node=entry.node: create_table_artifact(  # type: ignore[misc]
                    rows, key=key, description=f"{node}: {name}"
                )
            )


def stage_summary(run: str, stage: str, built: Sequence[Built]) -> str:
    """Markdown: what became of each node of a stage, and where its artifact lies."""
    lines = [
        f"## {stage} of run `{run}`",
        "",
        "| node | | in | out | quarantined | seconds | tokens/s | device |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for entry in built:
        m = entry.artifact.manifest
        speed = f"{m['tokens_per_second']:.0f}" if m.get("tokens_per_second") else ""
        lines.append(
            f"| {entry.node} | {'reused' if entry.reused else 'built'} | {m['rows_in']} | {m['rows_out']} | "
            f"{m['rows_quarantined']} | {m['seconds']:.1f} | {speed} | {m['device']} |"
        )
    lines += ["", *(f"- {entry.node}: `{entry.artifact.folder}`" for entry in built)]
    return "\n".join(lines)


def _tables(entry: Built) -> list[tuple[str, list[dict[str, Any]]]]:
    tables: list[tuple[str, list[dict[str, Any]]]] = []
    quarantined = entry.artifact.manifest["quarantined"]
    if quarantined:
        tables.append(("quarantine", [{"reason": r, "rows": n} for r, n in sorted(quarantined.items())]))
    if entry.artifact.shards("metrics"):
        rows = entry.artifact.rows("metrics")
        step = max(1, len(rows) // _CURVE_ROWS)
        kept = [row for i, row in enumerate(rows) if i % step == 0 or i == len(rows) - 1]
        tables.append(("learning-curve", [{name: _number(v) for name, v in row.items()} for row in kept]))
    return tables


def _number(value: Any) -> Any:
    """NaN and infinity are no JSON."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else None
    return value


def publish_result(run: str, metrics: dict[str, Any] | None, report: str | None, seconds: float, reused: bool) -> None:
    """The end of a run: verdict, metrics per subset, where the report lies."""
    text = result_summary(run, metrics, report, seconds, reused)
    publish(lambda: create_markdown_artifact(text, key=artifact_key(run, "result"), description="result"))
    rows = metrics_rows(metrics) if metrics else []
    if rows:
        publish(lambda: create_table_artifact(rows, key=artifact_key(run, "metrics"), description="reward per subset"))


def result_summary(run: str, metrics: dict[str, Any] | None, report: str | None, seconds: float, reused: bool) -> str:
    """Markdown: how a run ended."""
    lines = [f"## run `{run}`", ""]
    if reused:
        lines += ["Nothing was new: every stage was reused.", ""]
    if metrics is not None:
        figures, sentence = launch.outcome(metrics)
        lines += [f"**{sentence}**", "", f"{figures[0].upper()}{figures[1:]}.", ""]
        lines += [f"Wins {metrics['wins']}, ties {metrics['ties']}, losses {metrics['losses']}.", ""]
    if report:
        lines += [f"Report: `{report}`", ""]  # a browser follows no file: link from a page that came by http
    lines.append(f"{seconds:.0f} seconds.")
    return "\n".join(lines)


def publish_noise(home: Home, run: Run) -> None:
    """What a run's rewards and weights say about noise; the stage is done, whatever becomes of it."""
    publish(lambda: _send_noise(home, run))


def _send_noise(home: Home, run: Run) -> None:
    """The table of figures, the pairs trusted least and most, and the reliability of the rewards where it is known."""
    from clha.stages.report import noise_tables_of_run

    try:
        tables = noise_tables_of_run(home, run)
    except (UserError, StageFailure, LookupError, ValueError, OSError) as error:
        run_logger().warning(f"no table about noise for the UI: {reason_of(error)}")
        return
    rows = [{"figure": what, "value": value} for what, value in tables.figures]
    create_table_artifact(rows, key=artifact_key(run.name, "noise"), description=f"noise of run {run.name}")
    if tables.pairs:  # Markdown with its texts escaped: the UI reads Markdown in the cells of a table artifact, too
        key = artifact_key(run.name, "noise", "pairs")
        create_markdown_artifact(tables.pairs, key=key, description=f"least and most trusted pairs of run {run.name}")
    if tables.reliability:
        create_table_artifact(
            tables.reliability,
            key=artifact_key(run.name, "noise", "reliability"),
            description=f"reliability of run {run.name} before and after calibration, each pair in both orders",
        )


def publish_study(run: str, results: dict[str, Any]) -> None:
    """The tables of a noise study, as one markdown artifact and as tables."""
    grids = study_grids(results)
    key = artifact_key(run, "noise-study")
    publish(lambda: create_markdown_artifact(markdown(grids), key=key, description=f"noise study of run {run}"))
    for grid in grids:
        rows = [dict(zip(grid.columns, row, strict=True)) for row in grid.rows]
        name = artifact_key(run, "noise-study", grid.title)
        publish(lambda rows=rows, name=name, title=grid.title: create_table_artifact(rows, name, title))  # type: ignore[misc]


def metrics_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The held-out reward of all prompts and of each subset, as rows of a table."""
    parts = {"all": metrics, **metrics.get("subsets", {})}
    rows = []
    for name, part in parts.items():
        reward = part.get("reward", {})
        numbers = {k: _number(reward.get(k)) for k in ("base", "trained", "gain", "prompts")}
        low, high = reward.get("interval", (None, None))
        rows.append({"subset": name, **numbers, "low": _number(low), "high": _number(high)})
    return rows
