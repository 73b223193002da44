"""The blocks of a model compiled by `torch.compile`, where that is asked for."""

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from clha.errors import UserError
from clha.training import layers


def compile_blocks(model: torch.nn.Module) -> None:
    """Let the blocks of `model` be compiled by `torch.compile`, all by one program. Undo with `layers.unfuse`.

    Around attention: that is called between two compiled parts. What wraps blocks (checkpoints, hooks of sharding)
    stays outside. Rows may have any length. Raises UserError where the model has no blocks that are known as such.
    """
    # Kinds of layers, precisions, with gradients and without: more than the eight programs of PyTorch's own limit,
    # beyond which it would go on uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and "forward" not in vars(m)]
    if not blocks:
        raise UserError(
            f"torch_compile: {type(model).__name__} has no blocks that are known here, or others have replaced their "
            "forward (a device_map does); leave it out"
        )
    for block in blocks:
        layers.replace_forward(block, torch.compile(type(block).forward, dynamic=True))


def check_compiler(device: torch.device) -> None:
    """Raises UserError where `torch.compile` cannot work on `device`: on a CPU it needs a C++ compiler."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "torch_compile: a CPU needs a C++ compiler for it and there is none; install g++ (or name one in CXX), "
            "or leave torch_compile out"
        ) from None
