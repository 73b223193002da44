"""The reward models of OpenAssistant (`gpt_neox_reward_model`), which no library carries: a GPT-NeoX body, one output.

Layout of the published weights: `gpt_neox.*` and `out_proj.*` (hidden -> 1); config: `pooling`, last or mean.
Input: `<|prompter|>{turn}<|endoftext|><|assistant|>{turn}<|endoftext|>...`, cut on the left.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clha.errors import UserError
from clha.rewards.interface import Done, InProcess, Scored, one_member, torch_dtype
from clha.rewards.precision import float32_linear
from clha.rewards.scoring import Padding, lengths_mask, padded, run_batches
from clha.rewards.texts import (
    Encoded,
    Message,
    RewardInput,
    check_readable,
    cut_left,
    encode_all,
    whole_turns,
)
from clha.settings_rewards import RewardModel

_END = "<|endoftext|>"
_ROLES = {"user": "<|prompter|>", "assistant": "<|assistant|>", "system": "<|system|>"}

# Buffers of older checkpoints that the model computes itself.
_COMPUTED = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


class GptNeoxRewardModel(nn.Module):
    """A GPT-NeoX body and a linear output on the pooled last hidden states."""

    def __init__(self, config: Any, pooling: str) -> None:
        """`config`: a GPTNeoXConfig; `pooling`: last (the last token) or mean (of all tokens)."""
        from transformers import GPTNeoXModel

        super().__init__()
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = nn.Linear(config.hidden_size, 1)
        self.pooling = pooling

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T] token IDs and mask (padding on the right) -> [B] rewards."""
        states = self.gpt_neox(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, T, D)
        if self.pooling == "mean":
            weights = mask[..., None].float()
            pooled = (states * weights).sum(dim=1) / weights.sum(dim=1)
        else:
            pooled = states[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1]
        return float32_linear(self.out_proj, pooled).squeeze(-1)


def load_gpt_neox(folder: Path, dtype: torch.dtype) -> GptNeoxRewardModel:
    """Read a model folder in the published layout. Raises UserError when it is none."""
    from safetensors.torch import load_file
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pooling = settings.get("pooling", "last")
    if settings.get("model_type") != "gpt_neox_reward_model" or pooling not in ("last", "mean"):
        raise UserError(
            f"reward model {folder}: is no gpt_neox_reward_model with pooling last or mean "
            f"(model_type {settings.get('model_type')}, pooling {pooling})"
        )
    config = GPTNeoXConfig(**{k: v for k, v in settings.items() if k != "model_type"})
    with torch.device("meta"):  # no random weights beside those that are read
        model = GptNeoxRewardModel(config, pooling)
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    state = {name: t for name, t in state.items() if not name.endswith(_COMPUTED)}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}"
        raise UserError(f"reward model {folder}: its weights do not fit ({what}); gpt_neox.* and out_proj.* are needed")
    model.to(dtype)
    # Its frequencies are no weights: they are computed here, and in float32, or distant tokens would turn too far.
    model.gpt_neox.rotary_emb = GPTNeoXRotaryEmbedding(config)
    return model


class PrompterText:
    """`<|prompter|>...<|endoftext|><|assistant|>...<|endoftext|>`; text of users can never become a control token."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        """Raises UserError when the tokenizer lacks the control tokens."""
        self._tokenizer, self.max_tokens = tokenizer, max_tokens
        vocabulary = tokenizer.get_vocab()
        needed = [_END, _ROLES["user"], _ROLES["assistant"]]
        missing = [t for t in needed if t not in vocabulary]
        if missing:
            raise UserError(f"reward model: its tokenizer has no {missing[0]}, which gpt_neox_reward_model reads")
        self._control = {t: vocabulary[t] for t in (*needed, _ROLES["system"]) if t in vocabulary}
        self.pad_id: int = self._control[_END]

    def encode(self, item: RewardInput) -> Encoded:
        """Drops the same turns as the policy's prompt would lose, then tokens on the left.

        Raises Unreadable for an empty response and for text that is no Unicode.
        """
        check_readable(item)
        response = self._tokens(item.response)
        end = [self._control[_END]]
        room = self.max_tokens - len(response) - len(end)
        prompt, turns = whole_turns(item.messages, self._prompt, room)
        return cut_left(prompt, response, end, self.max_tokens, truncated=turns > 0)

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        for m in messages:
            # Models without a system token read its text as the user's.
            role = self._control.get(_ROLES.get(m["role"], ""), self._control[_ROLES["user"]])
            ids += [role, *self._tokens(m["content"]), self._control[_END]]
        return [*ids, self._control[_ROLES["assistant"]]]

    def _tokens(self, text: str) -> list[int]:
        read = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(read["input_ids"])


class GptNeoxReward(InProcess):
    """The adapter: see `clha.rewards.adapters.RewardScorer`."""

    def __init__(self, folder: Path, settings: RewardModel, device: str) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        self.padding = Padding()
        self._tokens = settings.tokens_per_batch
        self._device = torch.device(device)
        if (folder / "tokenizer.json").is_file():  # AutoTokenizer would look at the unknown model_type
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        self._texts = PrompterText(tokenizer, settings.max_tokens)
        self._model = load_gpt_neox(folder, torch_dtype(settings.dtype)).to(self._device).eval()

    def score(self, inputs: Sequence[RewardInput], progress: Done | None = None) -> Scored:
        places, encoded, problems = encode_all(self._texts, inputs)

        def run(rows: Sequence[int]) -> list[NDArray[np.float64]]:
            ids = [encoded[i].ids for i in rows]
            batch = padded(ids, self._texts.pad_id, self._device)
            rewards = self._model(batch, lengths_mask(ids, self._device))
            return list(rewards.double().cpu().numpy())

        lengths = [len(e.ids) for e in encoded]
        out = run_batches(lengths, run, tokens_per_batch=self._tokens, padding=self.padding, progress=progress)
        return one_member(len(inputs), places, encoded, np.array(out), problems)
