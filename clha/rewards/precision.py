"""Rewards in float32 from models of fewer bits: the layer that gives the reward keeps what the body's dtype would not.

bfloat16 has 8 bits: rewards between 8 and 16 would come in steps of 0.06, and unlike responses would tie.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def head_in_float32(model: Any) -> None:
    """Let the outputs of a classifier of transformers, inside a peft wrapper too, be computed in float32."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = set(getattr(inner, inner.base_model_prefix).modules())
    for module in inner.modules():
        if isinstance(module, nn.Linear) and module.out_features == 1 and module not in body:
            module.forward = partial(float32_linear, module)  # type: ignore[method-assign]


def float32_linear(layer: nn.Linear, states: Tensor) -> Tensor:
    """What the layer gives for states (..., D), computed in float32 under autocast too."""
    with torch.autocast(states.device.type, enabled=False):
        bias = None if layer.bias is None else layer.bias.float()
        return nn.functional.linear(states.float(), layer.weight.float(), bias)
