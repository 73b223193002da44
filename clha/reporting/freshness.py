"""Whether the report on disk is that of a run's artifacts of today; imports nothing that draws."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clha.digests import digest_of
from clha.runs import Run
from clha.store import Artifact, Home

# Raise it when the report says other things about the same run: reports are then written anew.
REPORT_VERSION = 5


def report_path(home: Home, run_name: str) -> Path:
    """Where the report of a run lies."""
    return home.reports / run_name / "report.html"


def made_of(run: Run, nodes: Mapping[str, Artifact]) -> dict[str, Any]:
    """What a report of these finished artifacts depends on: the content of its `report.json`."""
    return {
        "version": REPORT_VERSION,
        "nodes": {name: artifact.key for name, artifact in nodes.items()},
        "settings": digest_of(run.settings),
    }


def is_fresh(home: Home, run: Run, nodes: Mapping[str, Artifact]) -> bool:
    """Whether the page is there and shows just these artifacts."""
    page = report_path(home, run.name)
    try:
        recorded = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return page.is_file() and bool(recorded == made_of(run, nodes))
