"""Norms and gated activations of a model on the CPU, a block of rows at a time, which stays in the cache.

PyTorch computes RMSNorm and SwiGLU as half a dozen operations each, every one of which reads and writes whole tensors
and keeps its result for backward. Here all operations of a block of rows follow each other, and backward starts from
the inputs alone. For float32 on the CPU; everything else goes the model's own way.
"""

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Bytes of one tensor's block: a few of them fit into the second-level caches of two cores.
_BLOCK_BYTES = 768 * 1024
_PATCHED = "_clha_own_forward"


def fuse(model: torch.nn.Module) -> None:
    """Let the norms and gated MLPs of `model` that are known here be computed in blocks. Undo with `unfuse`.

    Known is what gives the same numbers on made-up states: RMSNorm with weights w or 1 + w, and MLPs of
    down_proj(silu(gate_proj(x)) * up_proj(x)).
    """
    for module in model.modules():
        forward = _norm_forward(module) or _mlp_forward(module)
        if forward is not None:
            setattr(module, _PATCHED, module.forward)
            module.forward = types.MethodType(forward, module)


def unfuse(model: torch.nn.Module) -> None:
    """Give the modules their own forward back."""
    for module in model.modules():
        if module.__dict__.pop(_PATCHED, None) is not None:
            del module.__dict__["forward"]


class RmsNorm(torch.autograd.Function):
    """gain * x / sqrt(mean(x^2) + eps) over the last dimension of x [..., D], with gain [D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, scale = torch.empty_like(rows), rows.new_empty(rows.shape[0], 1)
        for own in _blocks(rows):
            norm = torch.linalg.vector_norm(rows[own], dim=-1, keepdim=True, out=scale[own])
            norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul(rows[own], norm, out=out[own]).mul_(gain)
        ctx.save_for_backward(x, gain, scale)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, scale = ctx.saved_tensors
        rows, grad = (states.reshape(-1, x.shape[-1]) for states in (x, grads[0]))
        out, for_gain = torch.empty_like(rows), torch.zeros_like(gain)
        for own in _blocks(rows):
            # With n = x * scale: dgain = sum(g * n), dx = scale * (g * gain - n * mean(g * gain * n)).
            normed = rows[own] * scale[own]
            product = grad[own] * normed
            for_gain += product.sum(0)
            mean = (product @ gain).div_(x.shape[-1])[:, None]
            torch.mul(grad[own], gain, out=out[own]).addcmul_(normed, mean, value=-1).mul_(scale[own])
        return out.view(x.shape), for_gain, None


class Swiglu(torch.autograd.Function):
    """silu(gate) * up, elementwise."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        g, u, o = (states.reshape(-1, gate.shape[-1]) for states in (gate, up, out))
        for own in _blocks(g):
            torch.ops.aten.silu.out(g[own], out=o[own]).mul_(u[own])
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        g, u, grad = (states.reshape(-1, gate.shape[-1]) for states in (gate, up, grads[0]))
        for_gate, for_up = torch.empty_like(g), torch.empty_like(u)
        for own in _blocks(g):
            torch.ops.aten.silu.out(g[own], out=for_up[own]).mul_(grad[own])
            torch.ops.aten.silu_backward.grad_input(grad[own] * u[own], g[own], grad_input=for_gate[own])
        return for_gate.view(gate.shape), for_up.view(up.shape)


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows [N, D]."""
    size = max(1, _BLOCK_BYTES // (rows.element_size() * rows.shape[1]))
    return (slice(start, start + size) for start in range(0, rows.shape[0], size))


def _plain(*states: Tensor) -> bool:
    """Whether states are for these functions: float32 on the CPU."""
    device_autocast = torch.is_autocast_enabled("cpu")
    return not device_autocast and all(s.dtype == torch.float32 and s.device.type == "cpu" for s in states)


def _norm_forward(module: Any) -> Callable[..., Tensor] | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float) or not isinstance(weight, Tensor):
        return None
    own = module.forward
    states = _made_up(weight.shape[0]) if weight.dim() == 1 and _plain(weight) else None
    if states is None:
        return None
    for offset in (0.0, 1.0):

        def forward(self: Any, x: Tensor, offset: float = offset) -> Tensor:
            if not _plain(x, self.weight):
                return own(x)  # type: ignore[no-any-return]
            return RmsNorm.apply(x, self.weight + offset if offset else self.weight, eps)

        with torch.no_grad():
            if torch.allclose(forward(module, states), own(states), rtol=1e-5, atol=1e-6):
                return forward
    return None


def _mlp_forward(module: Any) -> Callable[..., Tensor] | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    if not silu or not all(isinstance(p, torch.nn.Module) for p in parts) or not _plain(*module.parameters()):
        return None
    own = module.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not _plain(gate, up):
            return self.down_proj(self.act_fn(gate) * up)  # type: ignore[no-any-return]
        return self.down_proj(Swiglu.apply(gate, up))  # type: ignore[no-any-return]

    states = _made_up(getattr(parts[0], "in_features", 0))
    with torch.no_grad():
        alike = states.shape[1] > 0 and torch.allclose(forward(module, states), own(states), rtol=1e-4, atol=1e-5)
    return forward if alike else None


def _made_up(width: int) -> Tensor:
    """[3, width] states around 1, the same each time, drawn without the global generator."""
    return torch.randn(3, width, generator=torch.Generator().manual_seed(0))
