"""Reward models behind one small interface: prompts with responses in, rewards out."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clha.errors import UserError
from clha.loading import load_whole
from clha.rewards.features import FrozenEncoder
from clha.rewards.head import WEIGHTS, fitted_config, load_head
from clha.rewards.interface import Done, InProcess, RewardScorer, Scored, one_member, torch_dtype
from clha.rewards.precision import head_in_float32
from clha.rewards.scoring import Padding, lengths_mask, padded, run_batches
from clha.rewards.texts import Encoded, RewardInput, encode_all, text_encoder
from clha.settings_rewards import RewardModel


class EncoderHead(InProcess):
    """What `fit_reward` makes, in this run or another: linear heads on frozen features of an encoder.

    Raises UserError when the head does not fit the encoder.
    """

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
        width = len(self.head.standardiser.mean)
        if width != self._encoder.width:
            raise UserError(f"reward model {fitted}: reads {width} features, {encoder.name} has {self._encoder.width}")

    @property
    def padding(self) -> Padding:
        return self._encoder.padding

    def score(self, inputs: Sequence[RewardInput], progress: Done | None = None) -> Scored:
        read = self._encoder.features(inputs, tokens_per_batch=self._tokens, progress=progress)
        members = self.head.rewards(read.values)
        return Scored(members.mean(axis=1), members, read.truncated, read.problems)


class SequenceClassification(InProcess):
    """A Hugging Face sequence classifier with one output, reading the conversation by its own chat template."""

    def __init__(self, model: Path, settings: RewardModel, device: str) -> None:
        """Raises UserError when the model has more than one output, or lacks weights."""
        from transformers import AutoModelForSequenceClassification

        self.padding = Padding()
        self._tokens = settings.tokens_per_batch
        self._texts = text_encoder(model, settings.max_tokens, closed=True)
        self._model: Any = load_whole(
            AutoModelForSequenceClassification,
            model,
            "reward model",
            "give a sequence classifier that was saved with its head",
            dtype=torch_dtype(settings.dtype),
        )
        outputs = int(self._model.config.num_labels)
        if outputs != 1:
            raise UserError(f"reward model {model}: has {outputs} outputs, a reward model has one")
        head_in_float32(self._model)
        self._model.to(torch.device(device)).eval()

    def score(self, inputs: Sequence[RewardInput], progress: Done | None = None) -> Scored:
        places, encoded, problems = encode_all(self._texts, inputs)
        rewards = classifier_rewards(
            self._model,
            encoded,
            self._texts.pad_id,
            tokens_per_batch=self._tokens,
            padding=self.padding,
            progress=progress,
        )
        return one_member(len(inputs), places, encoded, rewards, problems)


def classifier_rewards(
    model: Any,
    encoded: Sequence[Encoded],
    pad_id: int,
    *,
    tokens_per_batch: int,
    padding: Padding | None = None,
    progress: Done | None = None,
) -> NDArray[np.float64]:
    """Rewards [N] of a sequence classifier with one output; `pad_id` is the padding token of its tokenizer."""

    def run(rows: Sequence[int]) -> list[NDArray[np.float64]]:
        logits = classifier_logits(model, [encoded[i].ids for i in rows], pad_id)
        return list(logits.double().cpu().numpy())

    lengths = [len(e.ids) for e in encoded]
    out = run_batches(lengths, run, tokens_per_batch=tokens_per_batch, padding=padding, progress=progress)
    return np.array(out).reshape(-1)


def classifier_logits(model: Any, ids: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """The outputs (B, 1) of a sequence classifier for a batch of token IDs."""
    # A decoder's score is that of the last token that is no padding, so where the padding token may end a text, as EOS
    # does, a batch is filled up with another one that is not in it.
    pad = pad_id
    if any(i[-1] == pad_id for i in ids):
        present = set().union(*ids)
        pad = next(i for i in range(model.config.vocab_size) if i not in present)
    model.config.pad_token_id = pad
    # XLNet reads its score at the last place, be it padding or not.
    left = getattr(model.config, "summary_type", None) == "last"
    device = next(model.parameters()).device
    batch, mask = padded(ids, pad, device, left=left), lengths_mask(ids, device, left=left)
    # A cache of keys and values would be kept for nothing.
    options = {"use_cache": False} if getattr(model.config, "use_cache", None) else {}
    logits: torch.Tensor = model(input_ids=batch, attention_mask=mask, **options).logits
    return logits


class Ensemble:
    """Several reward models, each multiplied by its scale; the reward is their mean."""

    def __init__(self, members: Sequence[RewardScorer], scales: Sequence[float]) -> None:
        self._members, self._scales = members, np.array(scales)

    @property
    def padding(self) -> Padding:
        return Padding(sum(m.padding.tokens for m in self._members), sum(m.padding.padded for m in self._members))

    def score(self, inputs: Sequence[RewardInput], progress: Done | None = None) -> Scored:
        scored = [m.score(inputs, self._share(progress, i, len(inputs))) for i, m in enumerate(self._members)]
        members = np.stack([s.rewards for s in scored], axis=1) * self._scales
        truncated = np.any([s.truncated for s in scored], axis=0)
        problems = {row: why for s in scored for row, why in s.problems.items()}
        return Scored(members.mean(axis=1), members, truncated, problems)

    def close(self) -> None:
        for member in self._members:
            member.close()

    def _share(self, progress: Done | None, member: int, inputs: int) -> Done | None:
        """Progress over all members from that of one."""
        if progress is None:
            return None
        return lambda done: progress((inputs * member + done) // len(self._members))


def scoring_device() -> str:
    """Where reward models run: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class HeadFolders:
    """Where a head of type `encoder_head` lies, and the encoder that it reads."""

    head: Path
    encoder: Path


Folders = Path | HeadFolders


def model_folders(models: Mapping[str, Path], role: str) -> Folders | list[Folders]:
    """The folder of a reward model, or one for each member of an ensemble; `role`: "rescore.reward"."""

    def one(name: str) -> Folders:
        encoder = models.get(f"{name}.encoder")
        return models[name] if encoder is None else HeadFolders(models[name], encoder)

    if role in models:
        return one(role)
    numbers = (r.removeprefix(f"{role}.") for r in models if r.startswith(f"{role}."))
    return [one(f"{role}.{i}") for i in sorted(int(n) for n in numbers if n.isdigit())]


def load_scorer(
    settings: RewardModel, model: Folders | list[Folders], fitted: Path | None, device: str | None = None
) -> RewardScorer:
    """Load the reward model that `settings` describe.

    Args:
        settings: `rescore.reward` or `evaluate.reward`.
        model: the model folder; for type `fitted` the encoder, for `ensemble` one for each member (`model_folders`).
        fitted: for type `fitted`, the folder of the fit_reward artifact.
        device: "cpu", "cuda", "cuda:1"; default: a GPU if there is one.

    Raises UserError when the model is no reward model of that type.
    """
    device = device or scoring_device()
    if settings.type == "ensemble":
        assert isinstance(model, list)
        with ExitStack() as opened:  # where one cannot be loaded, those before it are closed
            loaded = [
                opened.enter_context(closing(load_scorer(m, f, fitted, device)))
                for m, f in zip(settings.members, model, strict=True)
            ]
            opened.pop_all()
        return Ensemble(loaded, [m.scale for m in settings.members])
    if isinstance(model, HeadFolders):
        return EncoderHead(model.head, model.encoder, settings, device)
    assert isinstance(model, Path)
    if settings.type == "fitted":
        if fitted is None:
            raise ValueError("a fitted reward model needs the folder of its artifact")
        own = fitted / "reward_model"
        if (own / WEIGHTS).is_file():
            return EncoderHead(own, model, settings, device)
        read_as_fitted = settings.model_copy(update={"max_tokens": fitted_config(own)["max_tokens"]})
        return SequenceClassification(own, read_as_fitted, device)
    if settings.type == "gpt_neox_reward_model":
        from clha.rewards.gpt_neox import GptNeoxReward

        return GptNeoxReward(model, settings, device)
    if settings.type == "server":
        from clha.rewards.server import ServerReward

        return ServerReward(model, settings)
    return SequenceClassification(model, settings, device)
