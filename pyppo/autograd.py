"""A loss that a kernel has computed with its gradients, as torch's autograd sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from pyppo._C import is_one

__all__ = ["differentiable", "refuse_grad", "refuse_tangents"]


class _Loss(torch.autograd.Function):
    """The kernel's loss, whose backward only scales the gradients that the kernel has computed as well.

    One result and few arguments, since autograd's bookkeeping for each costs more than a small kernel: the kernel's
    results come as one tuple. The gradients are saved as tensors, so that they are freed with the graph, and a leaf
    takes them over without a copy.
    """

    @staticmethod
    def forward(ctx: Any, result: tuple[Tensor | None, Tensor, tuple[Tensor | None, ...]], *inputs: Any) -> Tensor:
        loss, stats, grads = result
        ctx.save_for_backward(*grads)
        return stats[0].clone() if loss is None else loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        # once_differentiable makes a second derivative an error; its own cost is worth saving where none can follow.
        return _scale_once(ctx, *grad_outputs) if torch.is_grad_enabled() else _scale(ctx, *grad_outputs)


def _scale(ctx: Any, by: Tensor) -> tuple[Any, ...]:
    if is_one(by):  # loss.backward() itself: spare a pass over the gradients
        return (None, *ctx.saved_tensors)
    scaled = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
    return (None, *[grad * by if need else None for grad, need in scaled])


_scale_once = once_differentiable(_scale)

# differentiable(a kernel's result, its differentiable inputs): the loss. `Function.apply` in Python prepares its
# arguments for functorch, whose tensors no kernel takes, and then calls this `apply`, of its C++ base class.
differentiable: Callable[..., Tensor] = getattr(super(torch.autograd.Function, _Loss), "apply", _Loss.apply)


def refuse_grad(**tensors: Any) -> None:
    """While compiling, what ``_C`` refuses in eager calls: a gradient that would be lost in silence."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(f"{name} requires grad; it must not, since no gradient flows to it: detach it")


def refuse_tangents(**tensors: Any) -> None:
    """Within ``forward_ad.dual_level``: a derivative that would be lost in silence."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{name} has a tangent; it must not, since no forward derivative flows from it: detach it")
