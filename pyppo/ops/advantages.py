"""Advantages and returns."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from pyppo import _C, library
from pyppo.autograd import refuse_grad, refuse_tangents
from pyppo.library import filled


@overload
def gae(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    valid: Tensor | None = None,
    final_values: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    valid: np.ndarray | None = None,
    final_values: np.ndarray | None = None,
    out: tuple[np.ndarray, np.ndarray] | None = None,
    moments: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]: ...
def gae(
    rewards: Any,
    values: Any,
    terminated: Any,
    truncated: Any,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    valid: Any = None,
    final_values: Any = None,
    out: Any = None,
    moments: Any = None,
) -> Any:
    """Generalized advantage estimates and lambda-returns (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma (1 - terminated_t) V(next_t) - V(s_t)
        A_t     = delta_t + gamma gae_lambda (1 - terminated_t) (1 - truncated_t) A_{t+1}

    A terminated step has no future. A truncated one has, of which the value of the episode's *final* observation tells:
    ``final_values[t]`` where given (same-step autoreset), else ``values[t + 1]`` (next-step autoreset, where the row
    after a done row holds that observation). Terminated wins where both are set. Rows that are not ``valid`` are no
    experience: outputs are 0 there, and the next valid row's value and advantage carry across them. What a cut or an
    invalid row hides does not matter, not even NaN.

    Args:
        rewards: [T, N] float32 or float64, T steps of N environments.
        values: [T + 1, N], the value of each step's observation, and in the last row that of the one after.
        terminated, truncated: [T, N] bool or uint8.
        gamma, gae_lambda: discount and trace decay, in [0, 1].
        valid: [T, N] bool or uint8; None: all rows are valid.
        final_values: [T, N], read only where truncated.
        out: (advantages, returns) to write to instead of new tensors.
        moments: float64 [2, 3] to fill: of the advantages at valid rows, and of the returns, how many there are, their
            mean (0 where there are none), and the sum of squared deviations from it. In a fixed order: the same input
            gives the same bits.

    Returns:
        advantages [T, N] and returns [T, N] = advantages + values. Torch tensors for tensors, NumPy arrays for arrays.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range, or requires grad.
    """
    if not isinstance(rewards, Tensor):
        return _gae_numpy(rewards, values, terminated, truncated, gamma, gae_lambda, valid, final_values, out, moments)
    if is_compiling():
        refuse_grad(rewards=rewards, values=values, final_values=final_values)
        inputs = (rewards, values, terminated, truncated, valid, final_values, gamma, gae_lambda)
        new = library.gae(*inputs) if moments is None else library.gae_moments(*inputs, moments)
        return new if out is None else tuple(filled(to, x) for to, x in zip(_pair(out, Tensor), new, strict=True))
    if forward_ad._current_level >= 0:
        refuse_tangents(**locals())
    pair: tuple[Any, Any] = (None, None) if out is None else _pair(out, Tensor)
    new = _C.gae(rewards, values, terminated, truncated, valid, final_values, *pair, gamma, gae_lambda, moments)
    if out is not None:
        torch.autograd.graph.increment_version(pair)  # a graph that saved them must notice
    if moments is not None:
        torch.autograd.graph.increment_version(moments)
    return new


def _pair(out: Any, kind: type) -> tuple[Any, Any]:
    if isinstance(out, (tuple, list)) and len(out) == 2 and isinstance(out[0], kind) and isinstance(out[1], kind):
        return out[0], out[1]
    what = [type(x).__name__ for x in out] if isinstance(out, (tuple, list)) else type(out).__name__
    raise TypeError(f"out is {what}; it must be a pair (advantages, returns) of {kind.__name__}")


def _gae_numpy(
    rewards: Any, values: Any, terminated: Any, truncated: Any, gamma: float, gae_lambda: float, valid: Any,
    finals: Any, out: Any, moments: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    if not isinstance(rewards, np.ndarray):
        raise TypeError(f"rewards is {type(rewards).__name__}; it must be a torch tensor or a NumPy array")
    advantages, returns = (
        (np.empty_like(rewards, order="C", subok=False) for _ in range(2)) if out is None else _pair(out, np.ndarray)
    )
    _C.gae(rewards, values, terminated, truncated, valid, finals, advantages, returns, gamma, gae_lambda, moments)
    return advantages, returns
