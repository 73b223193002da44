"""Small reward models in the layouts that adapters read, and texts for them."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from clha.rewards.adapters import Folders, HeadFolders, load_scorer
from clha.rewards.interface import RewardScorer
from clha.rewards.texts import RewardInput
from clha.settings_rewards import RewardModel

WORDS = "tea rain bread warm kind rude exact boring maps trains whatever gladly because often".split()  # noqa: SIM905


def inputs(count: int, seed: int = 0) -> list[RewardInput]:
    """Prompts of one to five turns, some of them shared, with responses of 1 to 40 words."""
    draw = random.Random(seed)

    def words(k: int) -> str:
        return " ".join(draw.choices(WORDS, k=k))

    out: list[RewardInput] = []
    while len(out) < count:
        turns = draw.choice([1, 1, 3, 5])
        messages = [{"role": ("user", "assistant")[i % 2], "content": words(draw.randint(2, 20))} for i in range(turns)]
        if draw.random() < 0.3:
            messages.insert(0, {"role": "system", "content": words(4)})
        out += [RewardInput(messages, words(draw.randint(1, 40))) for _ in range(draw.randint(1, 4))]
    return out[:count]


def neox_folder(tiny_model: Path, folder: Path, pooling: str) -> Path:
    """A random model in the layout that OpenAssistant publishes: gpt_neox.*, out_proj.*, pooling in the config."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXModel

    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|prompter|>", "<|assistant|>", "<|endoftext|>", "<|system|>"]}
    )
    tokenizer.save_pretrained(folder)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    body, out = GPTNeoXModel(config), torch.nn.Linear(32, 1)
    state = {f"gpt_neox.{k}": v.contiguous() for k, v in body.state_dict().items()}
    state |= {f"out_proj.{k}": v.detach() for k, v in out.state_dict().items()}
    state["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)  # older checkpoints carry such buffers
    save_file(state, folder / "model.safetensors")
    settings = config.to_dict() | {"model_type": "gpt_neox_reward_model", "pooling": pooling}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def classifier_of(config: Any, tokenizer_of: Path, folder: Path) -> Path:
    """A random sequence classifier of that configuration, on the tokenizer of a folder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


class Loader:
    """Loads one reward model, with a token budget and from folders whose tokenizers pad on one side or the other."""

    def __init__(self, folder: Folders | list[Folders], fitted: Path | None, scratch: Path, **settings: Any) -> None:
        self._folder, self._fitted, self._scratch, self._settings = folder, fitted, scratch, settings

    def __call__(self, budget: int, side: str = "right", device: str = "cpu") -> RewardScorer:
        settings = RewardModel(**({"tokens_per_batch": budget, "max_tokens": 400} | self._settings))
        folders = [self._padding(f, side) for f in (self._folder if isinstance(self._folder, list) else [self._folder])]
        fitted = self._fitted and self._copy(self._fitted, side)
        return load_scorer(settings, folders if isinstance(self._folder, list) else folders[0], fitted, device)

    def _padding(self, folder: Folders, side: str) -> Folders:
        if isinstance(folder, HeadFolders):
            return HeadFolders(self._copy(folder.head, side), self._copy(folder.encoder, side))
        return self._copy(folder, side)

    def _copy(self, folder: Path, side: str) -> Path:
        """The folder, the tokenizers in it padding on that side."""
        copy = self._scratch / side / folder.name
        if not copy.exists():
            shutil.copytree(folder, copy)
            for path in copy.rglob("tokenizer_config.json"):
                path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": side}))
        return copy
