"""What the tests share: the folder of real data and goldens beside the project, and quiet, offline libraries."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Goldens and real data that lie beside the project; tests that need them are skipped without."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs goldens and real data in ../shared, which are not part of the project")
    return folder
