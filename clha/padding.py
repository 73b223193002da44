"""How wide the rows of a padded batch are."""

import torch


def row_width(tokens: int, device: torch.device) -> int:
    """Tokens of the rows of a batch whose longest text has `tokens`.

    On CUDA some get one more. PyTorch's memory-efficient attention with a mask returns wrong values, without a word,
    for a model with a single key-value head where the keys are 1, 33, 65, ... (its issue 191937; seen with PyTorch
    2.13 on an H200, rewards off by 0.2).
    """
    return tokens + 1 if device.type == "cuda" and tokens % 32 == 1 else tokens
