"""A loss that a kernel has computed with its gradients, as torch's autograd sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
        ctx.inputs = inputs  # what `_Once` refuses derivatives with respect to
        return stats[0].clone() if loss is None else loss

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Any, ...]:
        scaled = _scale(ctx, by)
        if not torch.is_grad_enabled():
            return scaled
        through = [by, *(x for x, need in zip(ctx.inputs, ctx.needs_input_grad[1:], strict=True) if need)]
        return tuple(None if grad is None else _Once.apply(grad, *through) for grad in scaled)


def _scale(ctx: Any, by: Tensor) -> tuple[Any, ...]:
    if is_one(by):  # loss.backward() itself: spare a pass over the gradients
        return (None, *ctx.saved_tensors)
    scaled = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
    return (None, *[grad * by if need else None for grad, need in scaled])


class _Once(torch.autograd.Function):
    """A gradient as it is, while its own graph is made (`create_graph=True`); whoever goes through that is refused.

    torch's `once_differentiable` would not do: it leaves a gradient without a graph where the incoming one has none,
    and a Hessian of zeros is wrong.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *through: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        raise RuntimeError(
            "pyppo's losses have a first derivative only: their kernels compute no second one. pyppo.reference has the "
            "same losses in plain torch, which can be differentiated twice"
        )


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
