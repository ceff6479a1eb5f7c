"""Trust region policy optimisation: Schulman et al. 2015 (arXiv 1502.05477).

Each rollout, one step of the policy: as far as possible along the natural gradient F^-1 g, F the Fisher matrix and g
the gradient of the surrogate E[ratio * A], with mean KL(old || new) at most `max_kl`. F is the second derivative of
that KL. It is never formed: conjugate gradient needs only its products with vectors, each a second backward pass.

    python bench/paper/trpo.py ENV [--seed 1] [--steps 1000000]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from _loop import COMMON, CriticFit, PolicyGradientEngine, assign, flatten, run_program
from torch import Tensor, nn

from pyppo import Config
from pyppo.actions import Distribution
from pyppo.engines import Schedule
from pyppo.policy import Minibatch

# OpenAI Baselines, trpo_mpi/defaults.py, mujoco(): 1024 steps a batch, gamma .99, lambda .98.
FIELDS: dict[str, Any] = {**COMMON, "num_steps": 128, "gae_lambda": 0.98, "norm_adv": "batch"}


@dataclass(frozen=True)
class Settings:
    """TRPO's own settings; the values are those of OpenAI Baselines' mujoco() but where another source is named."""

    max_kl: float = 0.01
    """The trust region: largest mean KL(old || new). Held to exactly (2015 paper, appendix C; Baselines allows 1.5)."""
    cg_steps: int = 10
    """Steps of conjugate gradient at most."""
    damping: float = 0.1
    """Added to the Fisher matrix's diagonal."""
    fisher_stride: int = 5
    """The Fisher matrix is estimated from one row in so many (2015 paper, appendix C: from a part of the rows)."""
    max_backtracks: int = 10
    """Lengths that the line search tries, each half of the last."""
    critic_epochs: int = 5
    """Passes over the rollout that fit the critic."""
    critic_minibatch: int = 64
    """Rows of a step of the critic."""
    critic_learning_rate: float = 1e-3
    """Adam's, for the critic."""


Product = Callable[[Tensor], Tensor]


def fisher_product(kl: Tensor, parameters: Sequence[nn.Parameter], damping: float) -> Product:
    """v [P] -> (F + damping I) v [P], F the Hessian of `kl` in the parameters.

    Where `kl` is a mean KL(old || new) at new = old, its gradient is 0 and its Hessian the Fisher matrix. The gradient
    of `kl`, a function of the parameters, is built once; the derivative of its inner product with v is F v.
    """
    gradient = flatten(torch.autograd.grad(kl, parameters, create_graph=True))

    def product(v: Tensor) -> Tensor:
        return flatten(torch.autograd.grad(gradient @ v, parameters, retain_graph=True)) + damping * v

    return product


def conjugate_gradient(product: Product, b: Tensor, steps: int, tolerance: float = 1e-10) -> Tensor:
    """x [P] with A x = b, nearly, A symmetric and positive, given as `product`(v) = A v (Hestenes and Stiefel 1952).

    Ends after `steps` steps, or where the squared residual is below `tolerance`.
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    squared = residual @ residual
    for _ in range(steps):
        if squared < tolerance:
            break
        image = product(direction)
        alpha = squared / (direction @ image)
        x += alpha * direction
        residual -= alpha * image
        last, squared = squared, residual @ residual
        direction = residual + (squared / last) * direction
    return x


class Search(NamedTuple):
    """What a line search found."""

    accepted: bool
    gain: float
    """By how much the surrogate grew; 0 where nothing was accepted."""
    backtracks: int
    """Lengths that were refused."""


@torch.no_grad()
def line_search(
    evaluate: Callable[[], tuple[Tensor, Tensor]],
    parameters: Sequence[nn.Parameter],
    step: Tensor,
    *,
    max_kl: float,
    max_backtracks: int,
) -> Search:
    """Take the first of step, step / 2, step / 4, ... that raises the surrogate and keeps the KL; else stay.

    Args:
        evaluate: surrogate and mean KL with the parameters as they are.
        step: [P], the longest.
    """
    start, before = flatten(parameters), float(evaluate()[0])
    for backtracks in range(max_backtracks):
        assign(parameters, start + 0.5**backtracks * step)
        surrogate, kl = (float(x) for x in evaluate())
        if surrogate > before and kl <= max_kl:  # false for NaN
            return Search(True, surrogate - before, backtracks)
    assign(parameters, start)
    return Search(False, 0.0, max_backtracks)


class TRPOEngine(PolicyGradientEngine):
    """One natural-gradient step of the policy within the trust region, then a fit of the critic."""

    def __init__(
        self, policy: nn.Module, config: Config, device: torch.device, distribution: Distribution, settings: Settings
    ) -> None:
        super().__init__(policy, config, device, distribution)
        self.settings = settings
        self.fit_critic = CriticFit(
            self, settings.critic_epochs, settings.critic_minibatch, settings.critic_learning_rate
        )

    def improve(self, data: Minibatch, schedule: Schedule, iteration: int) -> dict[str, float]:
        """Both; beside the metrics `backtracks` of the line search."""
        old = self.snapshot(data.obs)
        gradient = flatten(torch.autograd.grad(self.surrogate(data, self.policy_at(data.obs)), self.actor_parameters))
        found = self.search(data, old, self.natural_step(data, gradient))
        value_loss = self.fit_critic(data, iteration)
        policy_loss = -(float(data.advantages.mean()) + found.gain)
        return {
            "loss": policy_loss + value_loss,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            **self.compare(old, data),
            "grad_norm": float(gradient.norm()),
            "updates": float(found.accepted),
            "backtracks": float(found.backtracks),
        }

    def surrogate(self, data: Minibatch, new: Any) -> Tensor:
        """E[ratio * A] (2015 paper, eq. 14; the log-probs that acted are those of the old policy)."""
        return ((new.log_prob(data.actions) - data.logp).exp() * data.advantages).mean()

    def natural_step(self, data: Minibatch, gradient: Tensor) -> Tensor:
        """The step [P] along x = F^-1 g whose KL is `max_kl` to second order: x sqrt(2 max_kl / x' F x).

        F has its damping in both places, as Baselines has it, so the KL stays somewhat below.
        """
        settings = self.settings
        obs = data.obs[:: settings.fisher_stride]
        kl = self.snapshot(obs).kl(self.policy_at(obs)).mean()
        product = fisher_product(kl, self.actor_parameters, settings.damping)
        direction = conjugate_gradient(product, gradient, settings.cg_steps)
        curvature = float(direction @ product(direction))
        return direction * (math.sqrt(2.0 * settings.max_kl / curvature) if curvature > 0 else 0.0)

    def search(self, data: Minibatch, old: Any, step: Tensor) -> Search:
        """The line search on the exact KL and the surrogate of all rows."""

        def evaluate() -> tuple[Tensor, Tensor]:
            new = self.policy_at(data.obs)
            return self.surrogate(data, new), old.kl(new).mean()

        limits = {"max_kl": self.settings.max_kl, "max_backtracks": self.settings.max_backtracks}
        return line_search(evaluate, self.actor_parameters, step, **limits)


if __name__ == "__main__":
    run_program(__doc__, TRPOEngine, Settings(), FIELDS)
