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
    moments = torch.empty(2, 3, dtype=torch.float64, device=rollout.advantages.device)
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
        moments=moments,
    )
    if rollout.num_valid < 2:
        return torch.tensor(math.nan, dtype=torch.float64)
    (count, mean, squares), (_, _, squares_of_returns) = moments
    if config.norm_adv == "batch":
        rollout.advantages.sub_(mean).div_((squares / (count - 1)).sqrt() + 1e-8)
    return torch.where(squares_of_returns > 0, 1.0 - squares / squares_of_returns, math.nan)
