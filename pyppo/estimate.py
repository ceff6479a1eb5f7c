"""From rewards and values to advantages and returns, and how good the values were."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyppo import ops

if TYPE_CHECKING:
    from pyppo.config import Config
    from pyppo.storage import Rollout

__all__ = ["estimate"]


def estimate(rollout: Rollout, config: Config) -> Tensor:
    """Fill advantages (Schulman et al. 2015, eq. 16) and returns, from rewards, flags and values `[T+1, N]`.

    With `norm_adv="batch"` the advantages are brought to mean 0 and deviation 1 over the valid rows.

    Returns:
        the share of the returns' variance that the values explain, a float64 scalar on the rollout's device, which
        nobody has waited for; NaN where there are fewer than two valid rows or the returns do not vary.
    """
    ops.gae(
        rollout.rewards,
        rollout.values,
        rollout.terminated,
        rollout.truncated,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        valid=rollout.valid,
        final_values=rollout.final_values,
        out=(rollout.advantages, rollout.returns),
    )
    rows = rollout.valid_rows()
    if len(rows) < 2:
        return torch.tensor(math.nan, dtype=torch.float64)
    advantages, returns = (x.reshape(-1)[rows].double() for x in (rollout.advantages, rollout.returns))
    if config.norm_adv == "batch":
        rollout.advantages.sub_(advantages.mean()).div_(advantages.std() + 1e-8)
    variance = returns.var()
    return torch.where(variance > 0, 1.0 - advantages.var() / variance, math.nan)
