"""What stops a training run before it does harm."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clha.errors import StageFailure, UserError
from clha.training.checkpoints import is_complete


def check_generator_logps(token_logps: Tensor, generator_logps: Tensor, tolerance: float) -> str:
    """Compare log-probabilities with those that the generator reported for the same tokens; returns one line.

    Args:
        token_logps: [N] of the policy that is about to be trained, in nats.
        generator_logps: [N], NaN where the generator did not report any.
        tolerance: largest mean absolute difference, nats per token.

    Raises:
        UserError: the policy is not the one that generated, or it sees other tokens.
    """
    known = ~torch.isnan(generator_logps)
    if not bool(known.any()):
        return "no generated responses in the first batch: log-probabilities not compared with the generator"
    gaps = (token_logps.detach().cpu().float()[known] - generator_logps[known]).abs()
    mean, largest = float(gaps.mean()), float(gaps.max())
    line = f"log-probabilities differ from the generator's by {mean:.2g} nats per token (largest {largest:.2g})"
    if not mean <= tolerance:
        raise UserError(
            f"train: {line}, more than train.logprob_tolerance = {tolerance:g}: these candidates are not this "
            "policy's, or it sees other tokens; generate again with this policy, or raise the tolerance"
        )
    return line


def rounding_note(model: torch.nn.Module) -> str:
    """One line where weights that are trained have 16 bits, or "": AdamW's step may be below their last bit."""
    kinds = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    if not kinds:
        return ""
    names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    return (
        f"the weights that are trained are {names}: small steps are lost to rounding; load the model with "
        "dtype=torch.float32, bf16=True computes in bfloat16 over them"
    )


@torch.no_grad()
def largest_weights(model: torch.nn.Module) -> Tensor:
    """The largest absolute weight of each parameter that is trained, summed, float64; not finite where one is not.

    Of sharded parameters this process's part is looked at.
    """
    total = torch.zeros((), dtype=torch.float64)
    for parameter in model.parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if parameter.requires_grad and own.numel():
            total += torch.stack(torch.aminmax(own)).abs().max().cpu().double()
    return total


def check_finite(value: float, what: str, step: int, prompt_ids: Sequence[str], checkpoints: Path) -> None:
    """Raises StageFailure when `value` (a loss, a gradient norm, weights that would be saved) is not finite.

    It is called before anything is overwritten.
    """
    if math.isfinite(value):
        return
    good = [p for p in checkpoints.glob("checkpoint-*") if _is_good(p)]
    last = max(good, key=lambda p: int(p.name.rpartition("-")[2])).name if good else "none"
    prompts = f"prompts {', '.join(prompt_ids)}; " if prompt_ids else ""
    raise StageFailure(
        f"train: {what} is {value} in step {step}; {prompts}"
        f"last good checkpoint: {last}; lower the learning rate or look at these prompts"
    )


def _is_good(checkpoint: Path) -> bool:
    try:
        return is_complete(checkpoint)
    except OSError:  # what stops the run is told first; a checkpoint that cannot be read is told on resuming
        return False
