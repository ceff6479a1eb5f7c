"""Vanilla policy gradient with adaptive step size, as figure 3 of Schulman et al. 2017 (arXiv 1707.06347) has it.

Each rollout, one step of Adam along the plain policy gradient of the whole rollout. "After each batch of data, the Adam
stepsize is adjusted based on the KL divergence of the original and updated policy" (the paper's note on its figure 3).

    python bench/paper/vpg.py ENV [--seed 1] [--steps 1000000]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from _loop import COMMON, CriticFit, PolicyGradientEngine, run_program
from torch import nn

from pyppo import Config
from pyppo.actions import Distribution
from pyppo.engines import Schedule
from pyppo.policy import Minibatch

# The 2017 paper's rollouts (table 3: T 2048, gamma .99, lambda .95). The learning rate is where the step starts.
FIELDS: dict[str, Any] = {
    **COMMON,
    "num_steps": 256,
    "gae_lambda": 0.95,
    "norm_adv": "batch",
    "learning_rate": 1e-3,
    "anneal_lr": False,
}


@dataclass(frozen=True)
class Settings:
    """Its own settings: those of the implementation that the paper's note names, homework 4 of Berkeley's course on
    deep reinforcement learning (CS 294, 2017); the critic's minibatches are those of TRPO."""

    desired_kl: float = 2e-3
    """The step grows below half of this KL(old || new) and shrinks above twice."""
    factor: float = 1.5
    """By how much."""
    bounds: tuple[float, float] = (1e-8, 1.0)
    """Between which Adam's step size stays; the implementation has no bounds."""
    critic_epochs: int = 10
    """Passes over the rollout that fit the critic."""
    critic_minibatch: int = 64
    """Rows of a step of the critic."""
    critic_learning_rate: float = 1e-3
    """Adam's, for the critic."""


def adapted(step_size: float, kl: float, settings: Settings) -> float:
    """The next step size: shorter where the last was too long a way, longer where it was too short."""
    low, high = settings.bounds
    if kl > 2.0 * settings.desired_kl:
        return max(low, step_size / settings.factor)
    if kl < settings.desired_kl / 2.0:
        return min(high, step_size * settings.factor)
    return step_size


class VPGEngine(PolicyGradientEngine):
    """One step of the policy, whose length moves on the KL, then a fit of the critic.

    Attributes:
        step_size: Adam's, for the next update.
    """

    def __init__(
        self, policy: nn.Module, config: Config, device: torch.device, distribution: Distribution, settings: Settings
    ) -> None:
        super().__init__(policy, config, device, distribution)
        self.settings, self.step_size = settings, config.learning_rate
        self.adam = torch.optim.Adam(self.actor_parameters, eps=1e-5)
        self.fit_critic = CriticFit(
            self, settings.critic_epochs, settings.critic_minibatch, settings.critic_learning_rate
        )

    def improve(self, data: Minibatch, schedule: Schedule, iteration: int) -> dict[str, float]:
        """Both; beside the metrics the `step_size` that was taken."""
        old = self.snapshot(data.obs)
        self.flat.grad.zero_()
        policy_loss = -(self.policy_at(data.obs).log_prob(data.actions) * data.advantages).mean()
        policy_loss.backward()
        grad_norm = self.flat.grad.norm()
        taken = self.adam.param_groups[0]["lr"] = self.step_size
        self.adam.step()
        compared = self.compare(old, data)
        if math.isfinite(compared["kl"]):
            self.step_size = adapted(taken, compared["kl"], self.settings)
        value_loss = self.fit_critic(data, iteration)
        return {
            "loss": float(policy_loss.detach()) + value_loss,
            "policy_loss": float(policy_loss.detach()),
            "value_loss": value_loss,
            **compared,
            "grad_norm": float(grad_norm),
            "updates": 1.0,
            "step_size": taken,
        }


if __name__ == "__main__":
    run_program(__doc__, VPGEngine, Settings(), FIELDS)
