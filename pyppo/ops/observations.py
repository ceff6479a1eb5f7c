"""Observations as a network takes them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from pyppo import _C, library
from pyppo.autograd import refuse_grad, refuse_tangents
from pyppo.library import filled


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float = 1e-8,
    clip: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps)``, clipped, in float32 from whatever ``x`` is stored as.

    Mean and 1 / sqrt(var + eps) are rounded to float32 first: a product, and the same bits for a number whatever its
    batch.

    Args:
        x: [n, ...] float32, float64, bool, uint8, int8, int16, int32 or int64.
        mean, var: float64 [...], statistics of each element of a row.
        eps: added to the variance, at least 0.
        clip: the result is held in [-clip, clip]; None: not. NaN stays.
        out: float32 [n, ...] to write to instead of a new tensor.

    Returns:
        float32 [n, ...].

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or range, or an argument that requires grad.
    """
    if is_compiling():
        refuse_grad(x=x)
        new = library.normalize(x, mean, var, eps, clip)
        return new if out is None else filled(out, new)
    if forward_ad._current_level >= 0:
        refuse_tangents(x=x)
    result = _C.normalize(x, mean, var, eps, clip, out)
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return result
