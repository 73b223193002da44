"""How much arithmetic a step needs, and how much of it the device can do in a second."""

import time
from typing import Any

import torch

from clha.training.batches import MicroBatch, causal_pairs
from clha.windows import layer_windows


def training_flops(model: Any, batch: MicroBatch) -> float:
    """Floating-point operations of forward and backward that `batch` needs.

    Counted: products with weight matrices for every token that had to be computed, the output embedding where a
    response token is predicted, attention over the pairs that each layer's window leaves. Backward takes twice the
    forward, of a frozen matrix (under an adapter) once, for its inputs alone. Recomputation does not count.
    """
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    skipped = {id(embedding.weight)} | ({id(head.weight)} if head is not None else set())
    matrices = [p for p in model.base_model.parameters() if p.dim() == 2 and id(p) not in skipped]
    body = sum(_per_row(p) for p in matrices)
    output = _per_row(head.weight) if head is not None else 0
    return float(batch.tokens * body + len(batch.predict_at) * output) + attention_flops(model, batch)


def attention_flops(model: Any, batch: MicroBatch) -> float:
    """Those of `training_flops` that attention takes: queries with keys, probabilities with values; backward twice."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    windows = layer_windows(config)
    pairs = sum(_pairs(batch, window) * windows.count(window) for window in set(windows))
    return 3.0 * 2 * 2 * pairs * heads * width


def _per_row(matrix: torch.Tensor) -> int:
    """Operations of its products with one row: forward, for the gradient of the row, and for its own if trained."""
    return 2 * matrix.numel() * (3 if matrix.requires_grad else 2)


def _pairs(batch: MicroBatch, window: int | None) -> int:
    """Pairs of query and key in one layer."""
    if batch.segments is not None:
        return batch.segments.attended_pairs(window)
    assert batch.attention_mask is not None
    return sum(causal_pairs(0, length, window) for length in batch.attention_mask.sum(1).tolist())


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
