"""Layers of a model on the CPU, with fewer passes over memory and less kept for backward.

PyTorch computes RMSNorm and SwiGLU as half a dozen operations each, every one of which reads and writes whole tensors
and keeps what it read. Here they work in place where they can, and backward starts from the inputs alone. Gradients of
weights are added to those of earlier micro-batches by the matrix product itself. For float32 on the CPU; everything
else goes the model's own way.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PATCHED = "_clha_own_forward"


def fuse(model: torch.nn.Module, accumulate: bool = False) -> None:
    """Let the layers of `model` that are known here be computed by this module. Undo with `unfuse`.

    Known are RMSNorm with weights w or 1 + w and MLPs of down_proj(silu(gate_proj(x)) * up_proj(x)), which is tried on
    made-up states, and plain linear layers and embeddings.

    Args:
        model: its modules get another forward.
        accumulate: add gradients of matrices in place to a `.grad` that is there, see `_weight_gradient`. Not with data
            parallelism, whose hooks wait for gradients to arrive.
    """
    for module in model.modules():
        forward = _norm_forward(module) or _mlp_forward(module, accumulate)
        if forward is None and accumulate:
            forward = _matrix_forward(module)
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
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (x * scale).mul_(gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, scale = ctx.saved_tensors
        (grad,) = grads
        # With n = x * scale: dgain = sum(g * n), dx = scale * (g * gain - n * mean(g * gain * n)).
        normed = x * scale
        product = grad * normed
        for_gain = product.flatten(0, -2).sum(0)
        mean = (product @ gain).div_(-x.shape[-1])[..., None]
        return normed.mul_(mean).addcmul_(grad, gain).mul_(scale), for_gain, None


class Swiglu(torch.autograd.Function):
    """silu(gate) * up, elementwise."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _gate_gradient(grads[0] * up, gate), silu(gate).mul_(grads[0])


class SwigluProjected(torch.autograd.Function):
    """(silu(gate) * up) W^T with gate and up [..., I] and W [D, I] -> [..., D]; the product is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, accumulate: bool) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.accumulate = accumulate
        return silu(gate).mul_(up) @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        activated = silu(gate)
        inner = torch.mul(activated, up)
        rows = inner.view(-1, weight.shape[1])
        for_weight = weight_gradient(weight, grad, rows, ctx.accumulate) if ctx.needs_input_grad[2] else None
        torch.mm(grad, weight, out=rows)
        for_up = activated.mul_(inner)
        return _gate_gradient(inner.mul_(up), gate), for_up, for_weight, None


class Linear(torch.autograd.Function):
    """x W^T + b with x [..., I], W [O, I] and b [O] or None -> [..., O]; gradients are added in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad = grads[0].reshape(-1, weight.shape[0])
        for_x = (grad @ weight).view(x.shape) if need_x else None
        rows = x.reshape(-1, weight.shape[1])
        for_weight = weight_gradient(weight, grad, rows, True) if need_weight else None
        return for_x, for_weight, grad.sum(0) if need_bias else None


class Embedding(torch.autograd.Function):
    """Rows of W [V, D] at ids [...] -> [..., D]; gradients are added in place."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids, weight = ctx.saved_tensors
        there = weight.grad if adds_in_place(weight) else None
        target = torch.zeros_like(weight) if there is None else there
        target.index_add_(0, ids.view(-1), grads[0].reshape(-1, weight.shape[1]))
        return None, target if there is None else None


def adds_in_place(weight: Tensor) -> bool:
    """Whether a gradient may be added to `weight.grad` behind autograd's back."""
    hooked = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return weight.grad is not None and not hooked


def weight_gradient(weight: Tensor, grad: Tensor, rows: Tensor, accumulate: bool) -> Tensor | None:
    """grad^T rows, the gradient [O, I] of a weight from those of its output [N, O] and its input [N, I].

    With `accumulate`, and where the weight has a gradient already, it is added to that, and None is returned: one
    pass over memory instead of three. Autograd then has nothing to add; a weight with hooks is left to it.
    """
    if accumulate and adds_in_place(weight):
        assert weight.grad is not None
        weight.grad.addmm_(grad.t(), rows)
        return None
    return grad.t() @ rows


silu = torch.nn.functional.silu


def _gate_gradient(grad: Tensor, gate: Tensor) -> Tensor:
    """Gradient of silu at `gate` times `grad`, in the memory of `grad`."""
    torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad)
    return grad


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


def _mlp_forward(module: Any, accumulate: bool) -> Callable[..., Tensor] | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    if not silu or not all(isinstance(p, torch.nn.Module) for p in parts) or not _plain(*module.parameters()):
        return None
    own = module.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        if not _plain(gate, up):
            return down(self.act_fn(gate) * up)  # type: ignore[no-any-return]
        if type(down) is torch.nn.Linear and down.bias is None and not _hooked(down):
            return SwigluProjected.apply(gate, up, down.weight, accumulate)
        return down(Swiglu.apply(gate, up))  # type: ignore[no-any-return]

    states = _made_up(getattr(parts[0], "in_features", 0))
    with torch.no_grad():
        alike = states.shape[1] > 0 and torch.allclose(forward(module, states), own(states), rtol=1e-4, atol=1e-5)
    return forward if alike else None


def _matrix_forward(module: Any) -> Callable[..., Tensor] | None:
    if type(module) is torch.nn.Linear and _plain(module.weight):

        def linear(self: Any, x: Tensor) -> Tensor:
            if not _plain(x, self.weight):
                return torch.nn.functional.linear(x, self.weight, self.bias)
            return Linear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]

        return linear
    plain_rows = (
        type(module) is torch.nn.Embedding
        and module.padding_idx is None
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )
    if not plain_rows or not _plain(module.weight):
        return None

    def embedding(self: Any, ids: Tensor) -> Tensor:
        return Embedding.apply(ids, self.weight)  # type: ignore[no-any-return]

    return embedding


def _hooked(module: torch.nn.Module) -> bool:
    """Whether somebody wants to see the module's calls."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _made_up(width: int) -> Tensor:
    """[3, width] states around 1, the same each time, drawn without the global generator."""
    return torch.randn(3, width, generator=torch.Generator().manual_seed(0))
