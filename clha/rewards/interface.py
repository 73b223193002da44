"""The one small interface of all reward models: prompts with responses in, rewards out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from clha.rewards.scoring import Padding
from clha.rewards.texts import Encoded, RewardInput

# Hears how many inputs are done.
Done = Callable[[int], None]


@dataclass(frozen=True)
class Scored:
    """Rewards [N], those of each member [N, M] (the reward is their mean), and who was cut on the left [N].

    `problems`: {row: why it could not be read}; its reward is NaN.
    """

    rewards: NDArray[np.float64]
    members: NDArray[np.float64]
    truncated: NDArray[np.bool_]
    problems: Mapping[int, str] = field(default_factory=dict)


class RewardScorer(Protocol):
    """A loaded reward model.

    `score` depends on each input alone: batches, order and neighbours change rewards by less than 1e-5 in float32.
    Rewards may be NaN or infinite; who calls decides what that means. `padding` counts the tokens computed so far, also
    after `close`, which whoever loaded it calls at the end.
    """

    @property
    def padding(self) -> Padding: ...

    def score(self, inputs: Sequence[RewardInput], progress: Done | None = None) -> Scored: ...

    def close(self) -> None: ...


class InProcess:
    """A reward model in this process holds nothing but memory: there is nothing to close."""

    def close(self) -> None:
        pass


def one_member(
    count: int, places: list[int], encoded: list[Encoded], rewards: NDArray[np.float64], problems: Mapping[int, str]
) -> Scored:
    """The result of a single model for `count` inputs of which those at `places` could be read."""
    members, truncated = np.full((count, 1), np.nan), np.zeros(count, dtype=bool)
    members[places, 0] = rewards
    truncated[places] = [e.truncated for e in encoded]
    return Scored(members[:, 0], members, truncated, problems)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of torch with that name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
