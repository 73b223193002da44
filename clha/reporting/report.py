"""Writes the report of a run: one HTML file that needs nothing else, and each figure as PNG."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clha.reporting import overview, sections
from clha.reporting.freshness import is_fresh, made_of, report_path
from clha.reporting.text import duration, literal, number, percent, size, typeset
from clha.runs import Run
from clha.store import Artifact, Home, write_atomic

# No script at all, nothing from elsewhere: whatever a model wrote, the page only shows it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def build_report(home: Home, run: Run, nodes: Mapping[str, Artifact]) -> Path:
    """Write reports/<run>/report.html, figures/*.png and report.json, unless they are those of the same artifacts.

    `nodes`: the run's finished artifacts by node, in the order of the chain; sections whose artifacts are missing are
    left out. Each file is replaced in one step, report.json last.
    """
    page = report_path(home, run.name)
    folder = page.parent
    if is_fresh(home, run, nodes):
        return page
    parts = _parts(run, nodes)
    figures = sections.all_figures(parts)
    html = _render(run, nodes, parts)
    (folder / "report.json").unlink(missing_ok=True)
    for figure in figures:
        write_atomic(folder / "figures" / f"{figure.name}.png", figure.png)
    for stale in {*folder.glob("figures/*.png")} - {folder / "figures" / f"{f.name}.png" for f in figures}:
        stale.unlink()
    write_atomic(page, html.encode("utf-8", "replace"))
    write_atomic(folder / "report.json", json.dumps(made_of(run, nodes), indent=1).encode())
    return page


def _parts(run: Run, nodes: Mapping[str, Artifact]) -> dict[str, sections.Section | None]:
    return {
        "result": sections.result_section(nodes, run),
        "noise": sections.noise_section(nodes),
        "training": sections.training_section(nodes),
        "rewards": sections.reward_section(nodes),
        "data": sections.data_section(nodes),
        "making": sections.making_section(nodes, run),
    }


def _render(run: Run, nodes: Mapping[str, Artifact], parts: Mapping[str, sections.Section | None]) -> str:
    environment = Environment(
        loader=PackageLoader("clha.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (percent, duration, size, literal, typeset)
    environment.filters |= {"num": number, **{f.__name__: f for f in filters}}
    style = environment.loader.get_source(environment, "report.css")[0] if environment.loader else ""
    return environment.get_template("report.html.jinja").render(
        policy=_POLICY,
        style=Markup(style),  # our own file
        run=run.name,
        profile=literal(run.profile, 100),
        model=literal(re.split(r"[:/]", str(run.settings["policy"]["model"]))[-1], 100),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        tiles=overview.tiles(parts["result"], parts["noise"], parts["training"]),
        chain_doubts=overview.chain_doubts(parts["noise"], parts["training"], nodes),
        svg=lambda figure: Markup(figure.svg),  # drawn by matplotlib, which escapes its texts
        **parts,
    )
