"""Actions drawn from distributions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from pyppo import _C, library
from pyppo.autograd import refuse_grad, refuse_tangents
from pyppo.library import device_errors
from pyppo.ops.losses import Family
from pyppo.results import Sample


def sample(
    *,
    logits: Tensor | None = None,
    mean: Tensor | None = None,
    log_std: Tensor | None = None,
    distribution: Family | None = None,
    nvec: Sequence[int] | None = None,
    action_mask: Tensor | None = None,
    seed: int,
    step: int | Tensor = 0,
    row_offset: int = 0,
    deterministic: bool = False,
) -> Sample:
    """Draws an action from each row's distribution, with counted noise.

    The noise of a row is Philox4x32-10 (Salmon et al. 2011) of key ``seed`` and counter (row_offset + row, step): the
    same action whatever the batch, thread count or device.

    Args:
        logits, mean, log_std, distribution, nvec, action_mask: as in ``ppo_loss``; none may require grad.
        seed: in [0, 2^64).
        step: a number, or int64 [B], each row's own.
        row_offset: the first row's number; rows are below 2^32.
        deterministic: take the mode instead: the likeliest action, the mean.

    Returns:
        actions: int64 [B] (categorical), int64 [B, K] (multi_categorical), int64 [B, D] of 0 and 1 (bernoulli), or
        floating [B, D] (normal); their log-probs [B]; the distributions' entropies [B].

    Raises:
        ValueError, TypeError: as ``ppo_loss``; on the CPU also where a row's distribution is NaN or allows no action.
    """
    if is_compiling():
        refuse_grad(logits=logits, mean=mean, log_std=log_std)
        return Sample(
            *library.sample(
                distribution, logits, mean, log_std, nvec, action_mask, seed, step, row_offset, deterministic
            )
        )
    if forward_ad._current_level >= 0:
        refuse_tangents(**locals())
    drawn = _C.sample(
        distribution, logits, mean, log_std, nvec, action_mask, seed, step, row_offset, deterministic, device_errors
    )
    return tuple.__new__(Sample, drawn)
