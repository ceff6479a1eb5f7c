"""Synchronous advantage actor-critic: Mnih et al. 2016 (arXiv 1602.01783), all actors waiting for each other.

Each short rollout, one step of actor and critic together along the plain policy gradient, by RMSprop.

    python bench/paper/a2c.py ENV [--seed 1] [--steps 1000000]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from _loop import COMMON, PolicyGradientEngine, run_program
from torch import Tensor, nn

from pyppo import Config
from pyppo.actions import Distribution
from pyppo.engines import Schedule
from pyppo.policy import Minibatch

# RL Baselines3 Zoo, hyperparams/a2c.yml, what it tuned for PyBullet's locomotion tasks, with 8 environments for its 4,
# without its state-dependent noise, and with the initial weights and deviation that all the programs have (its own: not
# orthogonal, e^-2). Its value loss has no 1/2, so its vf_coef .4 is .8 here.
FIELDS: dict[str, Any] = {
    **COMMON,
    "num_steps": 8,
    "gae_lambda": 0.9,
    "norm_adv": "none",
    "learning_rate": 9.6e-4,
    "anneal_lr": True,
    "vf_coef": 0.8,
    "max_grad_norm": 0.5,
}


@dataclass(frozen=True)
class Settings:
    """A2C's own settings, RMSprop's: Mnih et al. 2016, section 5; values of Stable-Baselines3, and so the Zoo's."""

    decay: float = 0.99
    """Of the running mean of squared gradients."""
    eps: float = 1e-5
    """Added to its root, as torch's RMSprop does; under the root it would be another size of step."""


class A2CEngine(PolicyGradientEngine):
    """One gradient step of actor and critic."""

    def __init__(
        self, policy: nn.Module, config: Config, device: torch.device, distribution: Distribution, settings: Settings
    ) -> None:
        super().__init__(policy, config, device, distribution)
        self.rmsprop = torch.optim.RMSprop(policy.parameters(), alpha=settings.decay, eps=settings.eps)

    def improve(self, data: Minibatch, schedule: Schedule, iteration: int) -> dict[str, float]:
        """The step."""
        self.flat.grad.zero_()
        losses = self.losses(data, schedule)
        losses["loss"].backward()
        grad_norm = self.flat.grad.norm()
        if (longest := self.config.max_grad_norm) is not None:
            self.flat.grad.mul_((longest / (grad_norm + 1e-6)).clamp(max=1.0))
        self.rmsprop.param_groups[0]["lr"] = schedule.learning_rate
        self.rmsprop.step()
        measured = {name: float(x.detach()) for name, x in losses.items()}
        return {**measured, "grad_norm": float(grad_norm), "updates": 1.0}

    def losses(self, data: Minibatch, schedule: Schedule) -> dict[str, Tensor]:
        """-E[log pi(a) A], 0.5 E[(V - R)^2], the entropy, and their weighted sum `loss`."""
        params, values = self.policy.heads(data.obs)
        policy = self.distribution_of(params)
        policy_loss = -(policy.log_prob(data.actions) * data.advantages).mean()
        value_loss = 0.5 * (values - data.returns).square().mean()
        entropy = policy.entropy().mean()
        loss = policy_loss + self.config.vf_coef * value_loss - schedule.ent_coef * entropy
        return {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}


if __name__ == "__main__":
    run_program(__doc__, A2CEngine, Settings(), FIELDS)
