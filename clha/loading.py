"""Models read from their files, whole: transformers draws what the files lack at random, and only logs it."""

from pathlib import Path
from typing import Any

from clha.errors import UserError


def load_whole(auto: Any, folder: Path | str, what: str, remedy: str, *, new_head: bool = False, **options: Any) -> Any:
    """`auto.from_pretrained(folder, **options)`, all weights from the files.

    Args:
        auto: AutoModelForCausalLM and its like.
        what, remedy: for the error: "policy", "give the folder of a whole model".
        new_head: what the body's hidden states do not depend on may be drawn at random.

    Raises UserError where the files lack a weight or have one of another shape.
    """
    model, found = auto.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
    )
    for name, stored, needed in sorted(found["mismatched_keys"]):
        raise UserError(f"{what} {folder}: its {name} has shape {list(stored)}, {list(needed)} is needed; {remedy}")
    lost = sorted(n for n in found["missing_keys"] if not (new_head and _in_head(model, n)))
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(f"{what} {folder}: has no {lost[0]}{more}, which would be drawn at random; {remedy}")
    return model


def load_policy(folder: Path | str, *, bf16: bool = False) -> Any:
    """A causal language model in float32 (bfloat16 where nothing of it is trained), all its weights from the files.

    Raises UserError as `load_whole`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    remedy = "give a causal language model that was saved with all its weights"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return load_whole(AutoModelForCausalLM, folder, "policy", remedy, dtype=dtype)


def _in_head(model: Any, name: str) -> bool:
    """Whether a weight is none of the body, or one of its pooler, which reads the last hidden states."""
    body = model.base_model is model or name.startswith(f"{model.base_model_prefix}.")
    return not body or "pooler" in name.split(".")
