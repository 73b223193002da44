"""Reward models behind one small interface: prompts with responses in, rewards out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clha.errors import UserError
from clha.rewards.features import FrozenEncoder
from clha.rewards.head import load_head
from clha.rewards.interface import Done, RewardScorer, Scored, one_member, torch_dtype
from clha.rewards.scoring import Padding, lengths_mask, padded, run_batches
from clha.rewards.texts import RewardInput, encode_all, text_encoder
from clha.settings import RewardModel


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

    def _share(self, progress: Done | None, member: int, inputs: int) -> Done | None:
        """Progress over all members from that of one."""
        if progress is None:
            return None
        return lambda done: progress((inputs * member + done) // len(self._members))


def scoring_device() -> str:
    """Where reward models run: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def model_folders(models: Mapping[str, Path], role: str) -> Path | list[Path]:
    """The model folder of a reward model, or one for each member of an ensemble; `role`: "rescore.reward"."""
    members = sorted((r for r in models if r.startswith(f"{role}.")), key=lambda r: int(r.rsplit(".", 1)[1]))
    return models[role] if role in models else [models[r] for r in members]


def load_scorer(
    settings: RewardModel, model: Path | list[Path], fitted: Path | None, device: str | None = None
) -> RewardScorer:
    """Load the reward model that `settings` describe.

    Args:
        settings: `rescore.reward` or `evaluate.reward`.
        model: the model folder; for type `fitted` the encoder, for `ensemble` one folder for each member.
        fitted: for type `fitted`, the folder of the fit_reward artifact.
        device: "cpu", "cuda", "cuda:1"; default: a GPU if there is one.

    Raises UserError when the model is no reward model of that type.
    """
    device = device or scoring_device()
    if settings.type == "ensemble":
        assert isinstance(model, list)
        loaded = [load_scorer(m, f, fitted, device) for m, f in zip(settings.members, model, strict=True)]
        return Ensemble(loaded, [m.scale for m in settings.members])
    assert isinstance(model, Path)
    if settings.type == "fitted":
        if fitted is None:
            raise ValueError("a fitted reward model needs the folder of its artifact")
        return EncoderHead(fitted / "reward_model", model, settings, device)
    if settings.type == "gpt_neox_reward_model":
        from clha.rewards.gpt_neox import GptNeoxReward

        return GptNeoxReward(model, settings, device)
    if settings.type == "server":
        from clha.rewards.server import ServerReward

        return ServerReward(model, settings)
    return SequenceClassification(model, settings, device)
