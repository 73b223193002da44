"""Layers of a model on the CPU, with fewer passes over memory and less kept for backward.

PyTorch computes RMSNorm and SwiGLU as half a dozen operations each, every one of which reads and writes whole tensors
and keeps what it read. Here they work in place where they can, and backward starts from the inputs alone. Inside
`adding_in_place`, gradients of weights are added to those of earlier micro-batches by the matrix product itself. For
float32 on the CPU; everything else goes the model's own way.
"""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MARK = "_clha_fused"
_in_place = False


def fuse(model: torch.nn.Module, accumulate: bool = False) -> None:
    """Let the layers of `model` that are known here be computed by this module. Undo with `unfuse`.

    Known are RMSNorm with weights w or 1 + w and MLPs of down_proj(silu(gate_proj(x)) * up_proj(x)), which are tried on
    made-up states. Layers whose forward somebody else has replaced are left alone.

    Args:
        model: its modules get another forward.
        accumulate: linear layers and embeddings too, so that `adding_in_place` reaches all weights.
    """
    for module in model.modules():
        if "forward" in vars(module):
            continue
        forward = _norm_forward(module) or _mlp_forward(module)
        if forward is None and accumulate:
            forward = _matrix_forward(module)
        if forward is not None:
            replace_forward(module, forward)


def replace_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """Let `forward` compute the module, until `unfuse`; a method, which a copy of the model binds to its own module."""
    setattr(module, _MARK, True)
    module.forward = types.MethodType(forward, module)


def unfuse(model: torch.nn.Module) -> None:
    """Give the modules their own forward back."""
    for module in model.modules():
        if vars(module).pop(_MARK, None) is not None:
            del module.forward


@contextlib.contextmanager
def adding_in_place() -> Iterator[None]:
    """Backward inside adds gradients of matrices to the `.grad` that they have, behind autograd's back.

    One pass over memory instead of three. For a plain `loss.backward()` of one process: the hooks of data parallelism
    wait for gradients to arrive. Weights with hooks and those in checkpointed blocks are left to autograd.
    """
    global _in_place
    before, _in_place = _in_place, True
    try:
        yield
    finally:
        _in_place = before


def adds_in_place(weight: Tensor) -> bool:
    """Whether the gradient of `weight` is to be added to its `.grad`, and None returned to autograd."""
    if not (_in_place and weight.is_leaf and weight.grad is not None and weight.dtype == torch.float32):
        return False
    return not (weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))


class RmsNorm(torch.autograd.Function):
    """gain * x / sqrt(mean(x^2) + eps) over the last dimension of x [..., D], with gain [D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (x * scale).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, scale = ctx.saved_tensors
        (grad,) = grads
        # With n = x * scale: dgain = sum(g * n), dx = scale * (g * gain - n * mean(g * gain * n)).
        normed = x * scale
        product = grad * normed
        for_gain = product.reshape(-1, x.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        mean = (product @ gain).div_(-x.shape[-1])[..., None]
        return normed.mul_(mean).addcmul_(grad, gain).mul_(scale), for_gain, None


class Swiglu(torch.autograd.Function):
    """silu(gate) * up, elementwise."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _gate_gradient(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


class SwigluProjected(torch.autograd.Function):
    """(silu(gate) * up) W^T with gate and up [..., I] and W [D, I] -> [..., D]; the product is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.silu(gate).mul_(up) @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        activated = F.silu(gate)
        inner = torch.mul(activated, up)
        rows = inner.view(-1, weight.shape[1])
        for_weight = _weight_gradient(weight, grad, rows) if ctx.needs_input_grad[2] else None
        torch.mm(grad, weight, out=rows)
        for_up = activated.mul_(inner)
        return _gate_gradient(inner.mul_(up), gate), for_up, for_weight


class Linear(torch.autograd.Function):
    """x W^T + b with x [..., I], W [O, I] and b [O] or None -> [..., O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad = grads[0].reshape(-1, weight.shape[0])
        for_x = (grad @ weight).view(*grads[0].shape[:-1], -1) if need_x else None
        for_weight = _weight_gradient(weight, grad, x.reshape(-1, weight.shape[1])) if need_weight else None
        return for_x, for_weight, grad.sum(0) if need_bias else None


class Embedding(torch.autograd.Function):
    """Rows of W [V, D] at ids [...] -> [..., D]; the row `padding` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding = padding
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids, weight = ctx.saved_tensors
        in_place = adds_in_place(weight)
        target = weight.grad if in_place else torch.zeros_like(weight)
        grad = grads[0] if ctx.padding is None else grads[0].masked_fill((ids == ctx.padding)[..., None], 0.0)
        target.index_add_(0, ids.reshape(-1), grad.reshape(-1, weight.shape[1]))
        return None, None if in_place else target, None


def _weight_gradient(weight: Tensor, grad: Tensor, rows: Tensor) -> Tensor | None:
    """grad^T rows, the gradient [O, I] of a weight from those of its output [N, O] and its input [N, I]."""
    if adds_in_place(weight):
        assert weight.grad is not None
        weight.grad.addmm_(grad.t(), rows)
        return None
    return grad.t() @ rows


def _gate_gradient(grad: Tensor, gate: Tensor) -> Tensor:
    """Gradient of silu at `gate` times `grad`, in the memory of `grad`."""
    torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad)
    return grad


def _plain(*states: Tensor) -> bool:
    """Whether states are for these functions: float32 on the CPU."""
    device_autocast = torch.is_autocast_enabled("cpu")
    return not device_autocast and all(s.dtype == torch.float32 and s.device.type == "cpu" for s in states)


def _own(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What the module's own forward gives."""
    return type(module).forward(module, *args, **kwargs)  # type: ignore[no-any-return]


def _single(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one argument of a layer, which architectures name differently."""
    (x,) = (*args, *kwargs.values())
    return x  # type: ignore[no-any-return]


def _norm_forward(module: Any) -> Callable[..., Tensor] | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float) or not isinstance(weight, Tensor):
        return None
    if weight.dim() != 1 or not _plain(weight):
        return None
    forwards = (_norm_with(eps, offset) for offset in (0.0, 1.0))
    return next((f for f in forwards if _gives_the_same(module, f, weight.shape[0])), None)


def _norm_with(eps: float, offset: float) -> Callable[..., Tensor]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x = _single(args, kwargs)
        if not _plain(x, self.weight):
            return _own(self, x)
        return RmsNorm.apply(x, self.weight + offset if offset else self.weight, eps)  # type: ignore[no-any-return]

    return forward


def _mlp_forward(module: Any) -> Callable[..., Tensor] | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    gated_by_silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    if not gated_by_silu or not all(isinstance(p, torch.nn.Module) for p in parts) or not _plain(*module.parameters()):
        return None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x = _single(args, kwargs)
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        if not _plain(gate, up):
            return down(self.act_fn(gate) * up)  # type: ignore[no-any-return]
        if type(down) is torch.nn.Linear and down.bias is None and not _hooked(down):
            return SwigluProjected.apply(gate, up, down.weight)  # type: ignore[no-any-return]
        return down(Swiglu.apply(gate, up))  # type: ignore[no-any-return]

    return forward if _gives_the_same(module, forward, getattr(parts[0], "in_features", 0)) else None


def _matrix_forward(module: Any) -> Callable[..., Tensor] | None:
    if type(module) is torch.nn.Linear and _plain(module.weight):

        def linear(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            x = _single(args, kwargs)
            if not _plain(x, self.weight):
                return _own(self, x)
            return Linear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]

        return linear
    plain_rows = (
        type(module) is torch.nn.Embedding
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )
    if not plain_rows or not _plain(module.weight):
        return None

    def embedding(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        ids = _single(args, kwargs)
        if not _plain(self.weight):
            return _own(self, ids)
        return Embedding.apply(ids, self.weight, self.padding_idx)  # type: ignore[no-any-return]

    return embedding


def _hooked(module: torch.nn.Module) -> bool:
    """Whether somebody wants to see the module's calls."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


@torch.no_grad()
def _gives_the_same(module: torch.nn.Module, forward: Callable[..., Tensor], width: int) -> bool:
    """Whether `forward` gives what the module gives, on small, usual and large states, with its dropout and without."""
    if width == 0:
        return False
    modes = {part: part.training for part in module.modules()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        states = torch.randn(3, width) * torch.tensor([[1e-3], [1.0], [1e2]])

        def same(training: bool) -> bool:
            module.train(training)
            found = []
            for function in (forward, _own):
                torch.manual_seed(1)  # the same dropout
                found.append(function(module, states))
            return torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-6)

        try:
            return same(False) and same(True)
        finally:
            for part, training in modes.items():
                part.training = training
