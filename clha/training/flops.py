"""How much arithmetic a step needs, and how much of it the device can do in a second."""

import time
from typing import Any

import torch

from clha.training.batches import MicroBatch


def training_flops(model: Any, batch: MicroBatch) -> float:
    """Floating-point operations of forward and backward (3 times forward) that `batch` needs.

    Counted: products with weight matrices for every token that had to be computed, the output embedding where a
    response token is predicted, attention over the pairs that are attended to. Recomputation does not count.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    skipped = {id(embedding.weight)} | ({id(head.weight)} if head is not None else set())
    body = sum(p.numel() for p in model.base_model.parameters() if p.dim() == 2 and id(p) not in skipped)
    output = head.weight.numel() if head is not None else 0
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if batch.segments is not None:
        pairs = batch.segments.attended_pairs()
    else:
        assert batch.attention_mask is not None
        lengths = batch.attention_mask.sum(1)
        pairs = int((lengths * (lengths + 1) // 2).sum())
    attention = 2 * pairs * heads * width * config.num_hidden_layers
    return 6.0 * (batch.tokens * body + len(batch.predict_at) * output + attention)


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32, rows: int = 1024, width: int = 1024) -> float:
    """Operations per second of a matrix product on this device, the best of a few."""
    # A generator of its own: dropout goes on with the global one, also in a run that was resumed.
    draw = torch.Generator(device).manual_seed(0)
    a = torch.randn(rows, width, device=device, dtype=dtype, generator=draw)
    b = torch.randn(width, width, device=device, dtype=dtype, generator=draw)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(2):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 2)
    return 2.0 * rows * width * width / best
