"""Small models and made-up ranked prompts, for the tests of training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

from clha.training.arguments import ClhaConfig
from clha.training.batches import RankedPrompt
from clha.training.trainer import ClhaTrainer

VOCABULARY = 99


class Prompts:
    """Ragged ranked prompts with random tokens, weights and lambdas, the same for the same seed."""

    def __init__(self, size: int, seed: int = 0, reference: bool = False) -> None:
        draw = np.random.default_rng(seed)
        self.items = [_prompt(draw, f"prompt-{seed}-{i}", reference) for i in range(size)]

    max_candidates = 4

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> RankedPrompt:
        return self.items[i]


def _prompt(draw: np.random.Generator, prompt_id: str, reference: bool) -> RankedPrompt:
    n = int(draw.integers(2, 5))
    return RankedPrompt(
        prompt_id=prompt_id,
        prompt=draw.integers(0, VOCABULARY, draw.integers(3, 20)).astype(np.int32),
        responses=[draw.integers(0, VOCABULARY, draw.integers(1, 12)).astype(np.int32) for _ in range(n)],
        rewards=-np.arange(n, dtype=np.float64),
        pair_weights=np.triu((draw.random((n, n)) > 0.3).astype(np.float32), 1),
        sft_index=0,
        sft_lambda=float(draw.random() > 0.3),
        reference_logps=-draw.random(n) * 20 if reference else None,
    )


def two_responses(size: int) -> Prompts:
    """Prompts that have two responses each, fewer than those of others."""
    made = Prompts(9 * size, seed=2, reference=True)
    made.items, made.max_candidates = [prompt for prompt in made.items if len(prompt) == 2][:size], 2
    assert len(made) == size
    return made


def small_llama(seed: int = 0, tied: bool = False, lora: bool = False) -> Any:
    """A random two-layer Llama in float32; `tied`: one matrix for input and output; `lora`: with an adapter."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def config(folder: Path, **settings: Any) -> ClhaConfig:
    """Four steps of eight prompts on the CPU, nothing saved, nothing printed."""
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return ClhaConfig(output_dir=str(folder), **(defaults | settings))


def trainer(
    folder: Path, *, model: Any = None, data: Any = None, evaluation: Any = None, **settings: Any
) -> ClhaTrainer:
    """A trainer on small prompts."""
    made = ClhaTrainer(
        model=small_llama() if model is None else model,
        args=config(folder, **settings),
        train_dataset=Prompts(30) if data is None else data,
        eval_dataset=Prompts(7, seed=1) if evaluation is None else evaluation,
    )
    made.remove_callback(PrinterCallback)
    return made


def weights(model: torch.nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative difference of two vectors."""
    return float((one - other).norm() / other.norm())


def timeless(rows: list[dict]) -> list[dict]:
    """Rows of metrics without what depends on how fast the machine was."""
    return [
        {k: v for k, v in r.items() if not k.startswith("perf/") and not k.endswith(("_second", "_runtime"))}
        for r in rows
    ]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
