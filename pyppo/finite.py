"""Whether every number is finite, asked with one sum and one look at the device; and if not, which one is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "NotFiniteError", "check_finals", "check_observations", "check_rewards", "find_bad_output", "find_bad_parameter",
    "find_cause", "find_not_finite", "not_finite",
]  # fmt: skip


class NotFiniteError(FloatingPointError):
    """Training came upon a number that is not finite; what would be saved then is what went wrong."""


def not_finite(what: str, where: str, learning_rate: float) -> NotFiniteError:
    """The error to raise, with usual causes.

    Args:
        what: which number. where: the iteration. learning_rate: the settings'.
    """
    return NotFiniteError(
        f"{where}: every number must be finite; {what}. Usual causes: learning_rate ({learning_rate}) too high, "
        "rewards or observations of a large scale (see norm_reward, norm_obs), max_grad_norm off, an environment that "
        "breaks. Nothing of this iteration was saved"
    )


def _total(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of all float tensors, not waited for: finite only if all of them are.

    A sum takes a twentieth of the time of the test of each number. One that overflows only asks for a closer look.
    """
    sums = [x.detach().sum() for x in tensors if x.is_floating_point()]
    total = sums[0] if sums else torch.zeros(())
    for x in sums[1:]:
        total = total + x.to(total.device)
    return total


# --- observations and rewards ---------------------------------------------------------------------------------------


def find_not_finite(obs: Mapping[str, Tensor], used: Tensor | None = None) -> str | None:
    """Says which environment gave which observation that is not finite; None if none did.

    Args:
        obs: entries `[T+1, N, ...]`. used: bool `[T+1, N]` on the CPU, the rows to look at; None: all.
    """
    if math.isfinite(float(_total(obs.values()))):
        return None
    for name, x in obs.items():
        if not x.is_floating_point() or bool(x.isfinite().all()):
            continue
        wrong = ~x.isfinite().flatten(2).all(2).cpu() if x.dim() > 2 else ~x.isfinite().cpu()
        if len(rows := (wrong if used is None else wrong & used).nonzero()):
            t, row = rows[0].tolist()
            return f"environment {row} gave an observation {name!r} that is not finite, row {t} of the rollout"
    return None


def check_observations(obs: Mapping[str, Tensor], valid: np.ndarray, terminated: np.ndarray, same_step: bool) -> None:
    """Every observation must be finite that something is made of: what follows a step, unless nothing does.

    Args:
        obs: entries `[T+1, N, ...]`. valid, terminated: `[T, N]`.

    Raises:
        ValueError: one is not.
    """
    if find_not_finite(obs) is None:
        return
    follows = np.ones_like(valid) if same_step else ~terminated
    used = torch.from_numpy(np.concatenate([valid[:1], follows]))
    if (found := find_not_finite(obs, used)) is not None:
        raise ValueError(f"{found}; it must be finite")


def check_rewards(rewards: np.ndarray) -> None:
    """Rewards `[T, N]` must be finite: ValueError."""
    if not math.isfinite(rewards.sum()) and not np.isfinite(rewards).all():
        t, row = (int(i) for i in np.argwhere(~np.isfinite(rewards))[0])
        raise ValueError(f"environment {row} gave reward {rewards[t, row]} at step {t}; it must be finite")


def check_finals(obs: Mapping[str, Tensor], where: Sequence[tuple[int, int]]) -> None:
    """Final observations `[n, ...]`, on the CPU, must be finite, for their values are part of advantages: ValueError.

    Args:
        where: step and environment of each.
    """
    for name, x in obs.items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            wrong = int((~x.flatten(1).isfinite().all(1) if x.dim() > 1 else ~x.isfinite()).nonzero()[0])
            t, row = where[wrong]
            raise ValueError(
                f"environment {row} gave a final observation {name!r} that is not finite at step {t}; it must be finite"
            )


# --- policies -------------------------------------------------------------------------------------------------------


def find_bad_parameter(policy: nn.Module) -> str | None:
    """Names a parameter that is not finite, or a buffer that holds NaN; None if there is none.

    Infinity is no fault in a buffer, it may be a mask; running statistics turn it into NaN.
    """
    parameters, buffers = dict(policy.named_parameters()), dict(policy.named_buffers())
    totals = _total(parameters.values()).double(), _total(buffers.values()).double()
    of_parameters, of_buffers = torch.stack([x.to(totals[0].device) for x in totals]).tolist()
    if math.isfinite(of_parameters) and not math.isnan(of_buffers):
        return None
    for name, x in parameters.items():
        if not bool(x.isfinite().all()):
            return f"parameter {name}"
    for name, buffer in buffers.items():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            return f"buffer {name}"
    return None


@torch.no_grad()
def find_bad_output(policy: Any, obs: Mapping[str, Tensor]) -> str | None:
    """Names what a policy puts out that is not finite, of finite parameters and observations; None if all of it is.

    Args:
        policy: asked only if it has `heads` and no state.
        obs: entries `[T+1, N, ...]`, a row at a time.
    """
    if not hasattr(policy, "heads") or getattr(policy, "state_shape", None) is not None:
        return None
    for t in range(len(next(iter(obs.values())))):
        row = {key: x[t] for key, x in obs.items()}
        params, value = policy.heads(policy.prepare(row) if hasattr(policy, "prepare") else row)
        for name, x in {**params, "value": value}.items():
            if not bool(x.isfinite().all()):
                return f"the policy's {name}, of finite parameters and observations,"
    return None


# --- a rollout ------------------------------------------------------------------------------------------------------


def find_cause(policy: nn.Module, obs: Mapping[str, Tensor]) -> str | None:
    """Says what is not finite where a rollout was refused: observations `[T+1, N, ...]`, or the policy; None if all of
    it is finite."""
    if (found := find_not_finite(obs)) is not None:
        return found
    bad = find_bad_parameter(policy) or find_bad_output(policy, obs)
    return None if bad is None else f"{bad} is not"
