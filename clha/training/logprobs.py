"""Log-probabilities of response tokens from hidden states, without keeping the logits of all tokens.

The logits of one chunk of positions exist at a time; backward computes them again. Where all of them fit into the
memory allowed, they are kept as log-probabilities instead, which saves that work.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clha.training.layers import adds_in_place

# Logits of all positions are kept for backward up to this many bytes; chunks are at most this large as well.
LOGITS_BYTES = 256 * 1024 * 1024


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_row: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    logits_bytes: int = LOGITS_BYTES,
) -> Tensor:
    """log softmax(z)[target] per response token, with z = softcap * tanh(y / softcap) and y = scale * (h W^T + b).

    Args:
        hidden: [U, D], states of the positions that predict something.
        weight: [V, D], the output embedding.
        target_row: [N], ascending, which of the U states predicts each token (one state may predict several).
        targets: [N], token IDs.
        bias: [V] or None.
        scale: factor on the logits.
        softcap: bound on the logits, or None.
        logits_bytes: memory for logits, see the module's description.

    Returns:
        [N] float32, in nats.
    """
    return _TokenLogprobs.apply(hidden, weight, bias, target_row, targets, scale, softcap, logits_bytes)


def sum_by_response(token_logps: Tensor, target_cell: Tensor, batch: int, n: int) -> Tensor:
    """Sum token log-probabilities [N] into [batch, n] by response; absent cells get 0."""
    sums = token_logps.new_zeros(batch * n)
    return sums.index_add(0, target_cell, token_logps).view(batch, n)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_row: Tensor,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        logits_bytes: int,
    ) -> Tensor:
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        positions, vocabulary = hidden.shape[0], weight.shape[0]
        rows = max(1, logits_bytes // (4 * vocabulary))
        keep = positions <= rows and any(ctx.needs_input_grad[:3]) and softcap is None
        bounds = _chunks(positions, rows, target_row)
        out = torch.empty(targets.shape[0], dtype=torch.float32, device=hidden.device)
        kept: Tensor | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            projection = weight.to(dtype)
            for a, b, lo, hi in bounds:
                logps = _log_softmax(_logits(hidden[a:b].to(dtype), projection, bias, scale, softcap))
                out[lo:hi] = logps[target_row[lo:hi] - a, targets[lo:hi]]
                kept = logps if keep else None
                del logps
        ctx.save_for_backward(hidden, weight, bias, target_row, targets, kept)
        ctx.settings = (dtype, bounds, scale, softcap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_row, targets, kept = ctx.saved_tensors
        dtype, bounds, scale, softcap = ctx.settings
        (grad,) = grads
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        projection = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        in_place = dtype == torch.float32 and adds_in_place(weight)
        grad_weight: Tensor | None = weight.grad if in_place else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        for a, b, lo, hi in bounds:
            states = hidden[a:b].to(dtype)
            if kept is not None:
                logits, slope = kept, None
            else:
                raw = _logits(states, projection, bias, scale, softcap)
                slope = 1 - (raw / softcap) ** 2 if softcap is not None else None
                logits = _log_softmax(raw)
            rows = target_row[lo:hi] - a
            per_row = torch.zeros(b - a, dtype=torch.float32, device=grad.device).index_add_(0, rows, grad[lo:hi])
            # d logp[target] / d logits = onehot(target) - softmax, summed over the targets of each position.
            by_logit = logits.exp_().mul_(-per_row[:, None])
            by_logit.index_put_((rows, targets[lo:hi]), grad[lo:hi], accumulate=True)
            if slope is not None:
                by_logit.mul_(slope)
            if scale != 1.0:
                by_logit.mul_(scale)
            if grad_bias is not None:
                grad_bias += by_logit.sum(0)
            by_logit = by_logit.to(dtype)
            if grad_hidden is not None:
                grad_hidden[a:b] = by_logit @ projection
            if need_weight:
                if grad_weight is None:
                    grad_weight = torch.mm(by_logit.t(), states).float()
                elif dtype == torch.float32:
                    grad_weight.addmm_(by_logit.t(), states)
                else:
                    grad_weight += by_logit.t() @ states
            del logits, by_logit
        if grad_weight is not None:
            grad_weight = None if in_place else grad_weight.to(weight.dtype)
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *[None] * 5


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = torch.mm(states, weight.t()).float()
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _log_softmax(logits: Tensor) -> Tensor:
    """In place: the kernel reads a row before it writes it."""
    return torch.log_softmax(logits, dim=-1, out=logits) if not logits.requires_grad else logits.log_softmax(-1)


def _chunks(positions: int, rows: int, target_row: Tensor) -> list[tuple[int, int, int, int]]:
    """(first position, end, first target, end) of each chunk, about equally large."""
    count = max(1, -(-positions // rows))
    edges = [positions * i // count for i in range(count + 1)]
    cuts = torch.searchsorted(target_row, torch.tensor(edges, device=target_row.device)).tolist()
    return [(edges[i], edges[i + 1], cuts[i], cuts[i + 1]) for i in range(count)]
