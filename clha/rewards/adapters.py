"""Reward models behind one small interface: prompts with responses in, rewards out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from clha.config import RewardModel
from clha.errors import UserError
from clha.rewards.features import FrozenEncoder
from clha.rewards.head import load_head
from clha.rewards.scoring import Padding, lengths_mask, padded, run_batches
from clha.rewards.texts import Encoded, RewardInput, encode_all, text_encoder

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
    Rewards may be NaN or infinite; who calls decides what that means. `progress` hears how many inputs are done.
    """

    def score(self, inputs: Sequence[RewardInput], progress: Done | None = None) -> Scored: ...

    @property
    def padding(self) -> Padding: ...


class EncoderHead:
    """What `fit_reward` makes: linear heads on frozen features of an encoder."""

    def __init__(self, fitted: Path, encoder: Path, settings: RewardModel, device: str) -> None:
        """`fitted`: the folder `reward_model` of a fit_reward artifact; `encoder`: the model it was fitted on."""
        self.head = load_head(fitted)
        config = self.head.config
        self._tokens = settings.tokens_per_batch
        self._encoder = FrozenEncoder(
            encoder,
            layer=config["layer"],
            pooling=config["pooling"],
            max_tokens=config["max_tokens"],
            device=device,
            dtype=torch_dtype(settings.dtype),
        )

    @property
    def padding(self) -> Padding:
        return self._encoder.padding

    def score(self, inputs: Sequence[RewardInput], progress: Done | None = None) -> Scored:
        read = self._encoder.features(inputs, tokens_per_batch=self._tokens, progress=progress)
        members = self.head.rewards(read.values)
        return Scored(members.mean(axis=1), members, read.truncated, read.problems)


class SequenceClassification:
    """A Hugging Face sequence classifier with one output, reading the conversation by its own chat template."""

    def __init__(self, model: Path, settings: RewardModel, device: str) -> None:
        """Raises UserError when the model has more than one output."""
        from transformers import AutoModelForSequenceClassification

        self.padding = Padding()
        self._tokens = settings.tokens_per_batch
        self._device = torch.device(device)
        self._texts = text_encoder(model, settings.max_tokens, closed=True)
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch_dtype(settings.dtype))
        outputs = int(self._model.config.num_labels)
        if outputs != 1:
            raise UserError(f"reward model {model}: has {outputs} outputs, a reward model has one")
        self._model.to(self._device).eval()

    def score(self, inputs: Sequence[RewardInput], progress: Done | None = None) -> Scored:
        places, encoded, problems = encode_all(self._texts, inputs)
        pad = self._free_pad_id([e.ids for e in encoded])
        self._model.config.pad_token_id = pad

        def run(rows: Sequence[int]) -> list[NDArray[np.float64]]:
            ids = [encoded[i].ids for i in rows]
            mask = lengths_mask(ids, self._device)
            logits: torch.Tensor = self._model(input_ids=padded(ids, pad, self._device), attention_mask=mask).logits
            return list(logits.double().cpu().numpy())

        out = run_batches(
            [len(e.ids) for e in encoded],
            run,
            tokens_per_batch=self._tokens,
            padding=self.padding,
            progress=progress,
        )
        return one_member(len(inputs), places, encoded, np.array(out).reshape(-1), problems)

    def _free_pad_id(self, sequences: Sequence[Sequence[int]]) -> int:
        """The ID that fills up batches. A decoder's score is that of the last token that is no padding, so where the
        padding token may end a text, as EOS does, another one is taken that no text holds."""
        pad = self._texts.pad_id
        if not any(s[-1] == pad for s in sequences):
            return pad
        present = set().union(*sequences)
        return next(i for i in range(self._model.config.vocab_size) if i not in present)


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


def scoring_device() -> str:
    """Where reward models run: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_scorer(settings: RewardModel, model: Path, fitted: Path | None, device: str | None = None) -> RewardScorer:
    """Load the reward model that `settings` describe.

    Args:
        settings: `rescore.reward` or `evaluate.reward`.
        model: the model folder; for type `fitted` the encoder.
        fitted: for type `fitted`, the folder of the fit_reward artifact.
        device: "cpu", "cuda", "cuda:1"; default: a GPU if there is one.

    Raises UserError when the model is no reward model of that type.
    """
    device = device or scoring_device()
    if settings.type == "fitted":
        if fitted is None:
            raise ValueError("a fitted reward model needs the folder of its artifact")
        return EncoderHead(fitted / "reward_model", model, settings, device)
    return SequenceClassification(model, settings, device)
