"""The peak of a device: the best that plain matrix products of a model's own shapes reach on it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_of_own_shapes(model: Path, tokens: int, positions: int, device: str = "cpu", cpu_time: bool = False) -> float:
    """Operations per second of the model's own matrix products, best times, weighted by how much each is used.

    For each weight matrix: forward, gradient of the input, gradient of the weight, with `tokens` rows; for the output
    embedding with `positions` rows. In float32 on the CPU, in bfloat16 on a GPU.
    """
    import torch

    config = json.loads((model / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    body = [(hidden, queries, 1), (queries, hidden, 1), (hidden, keys, 2), (hidden, inner, 2), (inner, hidden, 1)]
    shapes = [(tokens, inputs, outputs, layers * times) for inputs, outputs, times in body]
    shapes.append((positions, hidden, config["vocab_size"], 1))
    as_here: dict[str, Any] = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    work = seconds = 0.0
    for rows, inputs, outputs, times in shapes:
        x, w, g = (torch.randn(*size, **as_here) for size in ((rows, inputs), (outputs, inputs), (rows, outputs)))
        y, dx, dw = torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)
        for product in (
            lambda y=y, x=x, w=w: torch.mm(x, w.t(), out=y),
            lambda dx=dx, g=g, w=w: torch.mm(g, w, out=dx),
            lambda dw=dw, g=g, x=x: torch.mm(g.t(), x, out=dw),
        ):
            best = _seconds_on_cpu(product, cpu_time) if device == "cpu" else _seconds_on_gpu(product)
            work += times * 2.0 * rows * inputs * outputs
            seconds += times * best
    return work / seconds


def _seconds_on_cpu(product: Callable[[], Any], cpu_time: bool) -> float:
    clock = time.process_time if cpu_time else time.perf_counter
    times = []
    for _ in range(4):
        start = clock()
        product()
        times.append(clock() - start)
    return min(times)


def _seconds_on_gpu(product: Callable[[], Any]) -> float:
    """Of one product in a row of several, which hides the launches: the best of four rows."""
    import torch

    product()
    times = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(8):
            product()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 8e3)
    return min(times)
