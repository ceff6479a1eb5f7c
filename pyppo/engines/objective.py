"""What the settings say about the loss, and what an update reports of it: the same for every engine."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.engines import Schedule

STATS = ("loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "kl")
"""What a loss kernel's statistics [8] are, but for the last, which is the number of rows."""
APPROX_KL = STATS.index("approx_kl")


def loss_settings(config: Config, schedule: Schedule) -> dict[str, Any]:
    """The keyword arguments of the loss that settings and schedules decide."""
    return {
        "objective": config.objective,
        "clip_coef": schedule.clip_coef,
        "clip_coef_high": config.clip_coef_high,
        "dual_clip": config.dual_clip,
        "value_clip_coef": schedule.clip_coef if config.clip_vloss else None,
        "kl_coef": schedule.kl_coef if config.objective == "kl" else 0.0,
        "ent_coef": schedule.ent_coef,
        "vf_coef": config.vf_coef,
        "norm_adv": config.norm_adv == "minibatch",
    }


def kl_limit(config: Config) -> float | None:
    """The approximate KL of a minibatch above which an update stops; None: it never does."""
    return None if config.target_kl is None else 1.5 * config.target_kl


def dist_shapes(config: Config, distribution: Distribution, has_heads: bool) -> dict[str, tuple[int, ...]] | None:
    """The acting distribution's parameters that a KL objective or schedule needs again: name to shape of one row.

    Raises:
        ValueError: they are needed of a policy without `heads`.
    """
    wants = [name for name in ("kl_target", "adaptive_lr_kl") if getattr(config, name) is not None]
    wants += ["objective='kl'"] if config.objective == "kl" else []
    if not wants:
        return None
    if not has_heads:
        raise ValueError(f"{wants[0]} needs the exact KL, so the policy must have heads(); it has only evaluate()")
    names = ("mean", "log_std") if distribution.kind == "normal" else ("logits",)
    return dict.fromkeys(names, (distribution.num_params,))


def mean_metrics(stats: Tensor, grad_norms: Tensor, applied: Tensor) -> dict[str, float]:
    """An update's metrics: means over the rows of the minibatches that were applied, NaN where there was none.

    Args:
        stats: float64 [M, 8], each minibatch's loss statistics.
        grad_norms: float64 [M], before clipping.
        applied: bool [M], whether its step was taken.
    """
    names = (*STATS, "grad_norm")
    if len(stats) == 0:
        return {**dict.fromkeys(names, math.nan), "updates": 0.0}
    rows = torch.where(applied, stats[:, len(STATS)], 0.0)
    table = torch.cat([stats[:, : len(STATS)], grad_norms[:, None]], dim=1)
    weighted = torch.where(applied[:, None], rows[:, None] * table, 0.0)
    *values, updates = torch.cat([weighted.sum(0) / rows.sum(), applied.sum()[None]]).tolist()
    return {**dict(zip(names, values, strict=True)), "updates": updates}
