"""Minibatches and the optimiser's step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from pyppo import _C, library
from pyppo.autograd import refuse_grad, refuse_tangents
from pyppo.library import device_errors, filled


def adam(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    learning_rate: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """One Adam step (Kingma and Ba 2015, arXiv 1412.6980) on a flat buffer, with global-norm clipping in the same call.

    As ``torch.nn.utils.clip_grad_norm_`` and ``torch.optim.AdamW`` (decoupled weight decay), to rounding, except that
    ``grads`` keep their unclipped values.

    Args:
        params, exp_avg, exp_avg_sq: [P] float32 or float64, updated in place.
        grads: [P].
        step: int64 [1], the number of steps applied so far; incremented.
        learning_rate: a number, or a 0-d tensor on the parameters' device.
        eps: added to the root of the second moment.
        weight_decay: the decay's rate, times the learning rate.
        max_grad_norm: gradients are scaled by min(1, max_grad_norm / (norm + 1e-6)); None: not.
        skip: bool [1]; where True, nothing changes, decided on the device.

    Returns:
        The gradients' norm before clipping, 0-d.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or range, or buffers that overlap.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas is {betas!r}; it must be a pair of numbers")
    if is_compiling():
        refuse_grad(params=params, grads=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        return library.adam(
            params, grads, exp_avg, exp_avg_sq, step, learning_rate, *betas, eps, weight_decay, max_grad_norm, skip
        )
    if forward_ad._current_level >= 0:
        refuse_tangents(**locals())
    norm = _C.adam(
        params, grads, exp_avg, exp_avg_sq, step, learning_rate, *betas, eps, weight_decay, max_grad_norm, skip
    )
    torch.autograd.graph.increment_version((params, exp_avg, exp_avg_sq, step))  # a graph that saved them must notice
    return norm


def permutation(
    n: int,
    *,
    seed: int,
    iteration: int = 0,
    epoch: int = 0,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
) -> Tensor:
    """A random order of 0 .. n - 1, int64 [n], counted: a function of (n, seed, iteration, epoch) on every device.

    A Feistel network keyed by Philox, with cycle walking (Black and Rogaway 2002).

    Args:
        n: how many numbers.
        seed, iteration, epoch: what the order is a function of.
        device: of the result; that of ``out`` where it is given.
        out: int64 [n] to write to instead of a new tensor.

    Raises:
        ValueError, TypeError: ``n`` is negative or not an int; ``seed`` is not in [0, 2^64), ``iteration`` or ``epoch``
            not in [0, 2^32); ``out`` has another shape or dtype.
    """
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool):
        raise TypeError(f"n is {type(n).__name__}; it must be an int")
    if not 0 <= n < 1 << 48:
        raise ValueError(f"n is {n}; it must be in [0, 2^48)")
    if out is not None:
        if not isinstance(out, Tensor):
            raise TypeError(f"out is {type(out).__name__}; it must be a tensor")
        if out.shape != (n,):
            raise ValueError(f"out has shape {list(out.shape)}; it must be [n] = [{n}]")
        device = out.device
    if is_compiling():
        new = library.permutation(n, seed, iteration, epoch, torch.device(device))
        return new if out is None else filled(out, new)
    order = torch.empty(int(n), dtype=torch.int64, device=device) if out is None else out
    _C.permutation(order, seed, iteration, epoch)
    if out is not None:
        torch.autograd.graph.increment_version(out)  # a graph that saved it must notice
    return order


def gather_minibatch(
    columns: Sequence[Tensor],
    rows: Tensor,
    order: Tensor,
    *,
    count: Tensor,
    part: Tensor,
    num_parts: int,
    out: Sequence[Tensor],
    weights: Tensor,
) -> None:
    """The rows of one minibatch out of many tensors, in one launch whose shape does not depend on how many there are.

    Part p of P holds the rows ``rows[order[i]]`` for i from count * p // P up to count * (p + 1) // P. It is written to
    the first slots of ``out``; the C slots suffice for any count. In a slot that is left, ``weights`` is 0 and ``out``
    repeats the part's first row (any valid row where the part is empty, row 0 where there is no valid row), so that it
    holds numbers that occur. On CUDA ``count`` and ``part`` are read on the device: a captured graph can be replayed as
    they change.

    Args:
        columns: 1 to 32 tensors [R, ...] of any dtype; R may differ, but each has the rows that are asked for.
        rows: int64 [capacity], the rows that count, of which the first ``count`` are used.
        order: int64 [capacity], of which the first ``count`` are a permutation of 0 .. count - 1.
        count: int64 [1], at most the capacity.
        part: int64 [1], p.
        num_parts: P, at least 1.
        out: one tensor [C, ...] for each column, of its dtype, with C = ceil(capacity / P).
        weights: float32 [C], 1 where a slot holds a row of the part, else 0.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or range, or outputs that overlap anything. On CUDA a count,
            part or index out of range is clamped and noted, see ``check_errors``.
    """
    if is_compiling():
        refuse_grad(**{f"columns[{i}]": column for i, column in enumerate(columns)})
        library.gather_minibatch(columns, rows, order, count, part, num_parts, out, weights)
        return
    if forward_ad._current_level >= 0:
        refuse_tangents(**{f"columns[{i}]": column for i, column in enumerate(columns)})
    _C.gather_minibatch(columns, rows, order, count, part, num_parts, out, weights, device_errors)
    torch.autograd.graph.increment_version((*out, weights))  # a graph that saved them must notice
