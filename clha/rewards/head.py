"""A fitted reward model on disk: linear heads as safetensors, and what is known about them as JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from clha.errors import StageFailure, UserError
from clha.rewards.fitting import Standardiser

Floats = NDArray[np.float64]

WEIGHTS, CONFIG = "head.safetensors", "config.json"


@dataclass(frozen=True)
class Head:
    """M linear heads over standardised features of width D; rewards are in log-odds (calibrated).

    `members` [M, D] hold the calibration factor already: sigmoid(difference of two rewards) is the probability that
    the first response is preferred. Zero is the average response of the split that the heads were fitted on.
    `config` says: encoder (digest), layer, pooling, max_tokens, threshold (SFT), calibration.
    """

    standardiser: Standardiser
    members: Floats
    config: dict[str, Any]

    def rewards(self, features: Floats) -> Floats:
        """Rewards of all members, [N, M], for raw features [N, D]."""
        return self.standardiser(features) @ self.members.T

    @property
    def threshold(self) -> float:
        """The reward above which a best response is good enough for the SFT part."""
        return float(self.config["threshold"])

    def files(self) -> dict[str, bytes]:
        """File name -> content."""
        arrays = {"mean": self.standardiser.mean, "scale": self.standardiser.scale, "members": self.members}
        contiguous = {name: np.ascontiguousarray(a, dtype=np.float64) for name, a in arrays.items()}
        config = json.dumps(self.config, indent=1, ensure_ascii=False, sort_keys=True)
        return {WEIGHTS: save(contiguous), CONFIG: config.encode()}


def load_head(folder: Path) -> Head:
    """Read what `Head.files` wrote. Raises StageFailure when it is not there or damaged."""
    try:
        arrays = load_file(folder / WEIGHTS)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return Head(Standardiser(arrays["mean"], arrays["scale"]), arrays["members"], config)
    except (OSError, ValueError, KeyError) as error:
        raise StageFailure(f"{folder}: no readable reward model ({error})") from error


# Where the configuration of a whole model, which is Hugging Face's, keeps what a head's file says.
OWN_CONFIG = "clha"


def fitted_config(folder: Path) -> dict[str, Any]:
    """What fit_reward says of its reward model, a head or a whole model: encoder, max_tokens, threshold, ...

    Raises StageFailure when it is not there or damaged.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        own: dict[str, Any] = config.get(OWN_CONFIG, config)
        return own
    except (OSError, ValueError) as error:
        raise StageFailure(f"{folder}: no readable reward model ({error})") from error


def check_encoder(folder: Path, digest: str, role: str) -> None:
    """Raises UserError when `folder` holds no linear head, or one that was fitted on another encoder than `digest`.

    `role`: whose setting it is, "rescore.reward".
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{role}.model: {folder} has no {WEIGHTS}; give the folder reward_model of a fit_reward artifact (what "
            "method: lora makes is of type sequence_classification)"
        )
    config = fitted_config(folder)
    if config.get("encoder") != digest:
        raise UserError(
            f"{role}.encoder is another model than the one that the head in {folder} was fitted on "
            f"({config.get('encoder_name', 'unknown')}, {str(config.get('encoder'))[:12]})"
        )
