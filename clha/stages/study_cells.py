"""Cells of a noise study: artifacts of their own kinds, found again by what they were made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clha.digests import digest_of
from clha.progress import Progress
from clha.schema import SCHEMA_VERSION
from clha.stages.work import find_or_make
from clha.store import Artifact, ArtifactWriter, Home
from clha.versions import package_version

if TYPE_CHECKING:
    from clha.settings import NoiseStudy
    from clha.settings_rewards import RewardFit

CODE_VERSION = {"noise_detection": 5, "noise_training": 6}

# Packages whose versions change a cell: features, heads and fits of the flip rate go into weights too.
_PACKAGES = ("torch", "transformers", "numpy", "scipy")

# Ways to weight that go by a reward model's judgement of the labels.
JUDGED = frozenset({"calibrated", "shuffled"})


@dataclass(frozen=True)
class StudyInput:
    """What a study works on: prompts with labelled pairs, the policy and the reward model's encoder."""

    prepare: Artifact
    policy: Path
    encoder: Path
    models: dict[str, str]  # role -> digest
    chat_template: str = "model"  # of the policy; see `load_chat`


class CellProgress(Progress):
    """The progress of a study: that of its cells, and which of them it is."""

    def __init__(self, whole: Progress, cells: int) -> None:
        super().__init__()
        self._whole = whole
        self._cells = cells
        self._begun: set[str] = set()

    def begin(self, key: str) -> None:
        """A cell is wanted, for the first time or again."""
        self._begun.add(key)

    def update(self, done: int, total: int, unit: str, note: str = "") -> None:
        self._whole.update(done, total, unit, f"cell {len(self._begun)} of {self._cells}  {note}".rstrip())

    def log(self, message: str) -> None:
        self._whole.log(message)


def count_cells(settings: NoiseStudy) -> int:
    """How many cells a study has: the features, its detections, the policies, and the policy as it was."""
    judged = {(rate, arm) for rate in settings.rates for arm in settings.arms}
    if JUDGED & set(settings.weights):
        judged |= {(rate, settings.train_arm) for rate in settings.trained_rates}
    trained = len(settings.trained_rates) * len(settings.weights)
    return 1 + len(settings.seeds) * (len(judged) + trained) + bool(trained)


@dataclass
class Study:
    """A study under way."""

    home: Home
    settings: NoiseStudy
    fit: RewardFit
    given: StudyInput
    progress: CellProgress

    def cell(self, kind: str, what: dict[str, Any], make: Callable[[ArtifactWriter], dict[str, Any]]) -> Artifact:
        """The finished artifact of a cell; `make` writes its files and returns facts, `rows` among them."""
        parts = {
            "kind": kind,
            "schema_version": SCHEMA_VERSION,
            "code_version": CODE_VERSION[kind],
            "inputs": {"prepare": self.given.prepare.content_of(("reward_train", "train", "test"))},
            "models": self.given.models,
            "settings": what,
            "versions": {name: package_version(name) for name in _PACKAGES},
        }
        self.progress.begin(digest_of(parts))
        return find_or_make(self.home, parts, {"prepare": self.given.prepare.key}, make)
