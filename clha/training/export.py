"""What training leaves: a plain Hugging Face folder, the metrics as a table and as TensorBoard events."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from clha.chat import Chat
from clha.training import policy


def save_model(model: Any, tokenizer: Any, folder: Path, *, dtype: str, card: str, merge_adapter: bool = False) -> None:
    """Write weights (safetensors), config, generation settings, tokenizer with chat template and README.md.

    Args:
        model: as it was trained; it is changed (own attention again, `dtype`), so train no further with it.
        tokenizer: with the chat template that responses were written by.
        folder: replaced.
        dtype: float32, bfloat16 or float16.
        merge_adapter: merge a LoRA adapter into the weights; else the adapter alone is written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    policy.detach(model)
    if merge_adapter and hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    stop_at_turn_end(model, tokenizer)
    model.to(getattr(torch, dtype))
    config = policy.causal_model(model).config
    config.dtype = getattr(torch, dtype)
    config._name_or_path = ""  # a path of this machine would be written
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def stop_at_turn_end(model: Any, tokenizer: Any) -> None:
    """Let generation stop where responses ended in training, besides where it stopped already.

    A base model with a ChatML template has learned <|im_end|>, and its settings may name <|endoftext|> alone.
    """
    generation, end = getattr(policy.causal_model(model), "generation_config", None), Chat(tokenizer).end_id
    if generation is None:
        return
    stops = generation.eos_token_id
    known = list(stops) if isinstance(stops, list | tuple) else [stops] * (stops is not None)
    if end not in known:
        generation.eos_token_id = [*known, end] if known else end


def metrics_table(rows: Sequence[Mapping[str, float]]) -> pa.Table:
    """The metrics as a table: step int64, then every metric as float64, null where a step has none."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    columns = {"step": pa.array([int(row["step"]) for row in rows], pa.int64())}
    for name in names:
        columns[name] = pa.array([row.get(name) for row in rows], pa.float64())
    return pa.table(columns)


def write_events(rows: Sequence[Mapping[str, float]], folder: Path) -> bool:
    """Write the metrics as TensorBoard events; False where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(log_dir=str(folder)) as writer:
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, int(row["step"]))
    return True
