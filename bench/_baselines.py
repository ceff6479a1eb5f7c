"""What one would write without pyppo: GAE as loops over time, the PPO loss and a whole update in plain torch.

As fast as they are usually written (CleanRL's formulas, no validation), and held against `pyppo.ops` before timing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GAMMA, LAMBDA = 0.99, 0.95
CLIP, ENT_COEF, VF_COEF = 0.2, 0.01, 0.5
HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)

Loss = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


def gae_numpy(
    rewards: np.ndarray, values: np.ndarray, terminated: np.ndarray, truncated: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A loop over time, vectorised over environments."""
    advantages = np.zeros_like(rewards)
    live = 1.0 - terminated.astype(rewards.dtype)
    carry = GAMMA * LAMBDA * (live * (1.0 - truncated.astype(rewards.dtype)))
    trace = np.zeros_like(rewards[0])
    for t in range(len(rewards) - 1, -1, -1):
        delta = rewards[t] + GAMMA * values[t + 1] * live[t] - values[t]
        advantages[t] = trace = delta + carry[t] * trace
    return advantages, advantages + values[:-1]


def gae_torch(rewards: Tensor, values: Tensor, terminated: Tensor, truncated: Tensor) -> tuple[Tensor, Tensor]:
    """The same loop on tensors, the TD errors in one go; what `torch.compile` gets too."""
    live = 1.0 - terminated.to(rewards.dtype)
    delta = rewards + GAMMA * values[1:] * live - values[:-1]
    carry = GAMMA * LAMBDA * (live * (1.0 - truncated.to(rewards.dtype)))
    trace = torch.zeros_like(delta[0])
    steps = []
    for t in range(len(rewards) - 1, -1, -1):
        trace = delta[t] + carry[t] * trace
        steps.append(trace)
    advantages = torch.stack(steps[::-1])
    return advantages, advantages + values[:-1]


def gae_torchrl(
    rewards: Tensor, values: Tensor, terminated: Tensor, truncated: Tensor
) -> Callable[[], tuple[Tensor, Tensor]] | None:
    """torchrl's vectorised estimator on inputs already in its own layout [N, T, 1]; None: not installed."""
    try:
        from torchrl.objectives.value.functional import vec_generalized_advantage_estimate
    except ImportError:
        return None
    state_value, next_value, reward, ended, done = (
        x.t().unsqueeze(-1).contiguous() for x in (values[:-1], values[1:], rewards, terminated, terminated | truncated)
    )
    return lambda: vec_generalized_advantage_estimate(
        GAMMA, LAMBDA, state_value, next_value, reward, done=done, terminated=ended
    )


def _surrogate(
    logp: Tensor, entropy: Tensor, values: Tensor, old_logp: Tensor, advantages: Tensor, returns: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    advantage = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    policy = torch.max(-advantage * ratio, -advantage * ratio.clamp(1.0 - CLIP, 1.0 + CLIP)).mean()
    value = 0.5 * (values - returns).square().mean()
    mean_entropy = entropy.mean()
    with torch.no_grad():
        approx_kl = (ratio - 1.0 - log_ratio).mean()
        clip_fraction = ((ratio - 1.0).abs() > CLIP).float().mean()
    loss = policy + VF_COEF * value - ENT_COEF * mean_entropy
    return loss, (policy.detach(), value.detach(), mean_entropy.detach(), approx_kl, clip_fraction)


def categorical_loss(
    logits: Tensor, values: Tensor, actions: Tensor, old_logp: Tensor, advantages: Tensor, returns: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The clipped loss from logits [B, A], with the metrics that every PPO logs."""
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return _surrogate(logp, entropy, values, old_logp, advantages, returns)


def normal_loss(
    mean: Tensor,
    log_std: Tensor,
    values: Tensor,
    actions: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    returns: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same from a diagonal Gaussian, mean [B, D] and log_std [D]."""
    z = (actions - mean) * (-log_std).exp()
    logp = (-0.5 * z.square() - log_std - HALF_LOG_TWO_PI).sum(-1)
    entropy = (log_std + 0.5 + HALF_LOG_TWO_PI).sum().expand_as(logp)
    return _surrogate(logp, entropy, values, old_logp, advantages, returns)


def with_gradient(loss: Loss, network: list[Tensor], rest: list[Tensor]) -> Callable[[], Any]:
    """The loss and a backward pass into the leaves `network`."""
    leaves = [x.clone().requires_grad_() for x in network]

    def run() -> tuple[Tensor, list[Tensor | None]]:
        for leaf in leaves:
            leaf.grad = None
        value, _ = loss(*leaves, *rest)
        value.backward()
        return value, [leaf.grad for leaf in leaves]

    return run


def one_graph(loss: Loss, network: list[Tensor], rest: list[Tensor]) -> Callable[[], Any]:
    """Loss and gradients compiled as one graph, without autograd at run time: the most that `torch.compile` can do."""
    both = torch.func.grad_and_value(loss, argnums=tuple(range(len(network))), has_aux=True)
    compiled = torch.compile(both, dynamic=False, fullgraph=True)

    def run() -> tuple[Tensor, list[Tensor]]:
        grads, (value, _) = compiled(*network, *rest)
        return value, list(grads)

    return run


# --- a whole update -------------------------------------------------------------------------------------------------


def mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    widths = [inputs, *hidden, outputs]
    layers = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class PlainUpdate:
    """An epoch over one batch as CleanRL writes it: modules, distributions, autograd, clipping and torch's Adam.

    Args:
        inputs, hidden, outputs: the layers of actor and critic.
        continuous: a diagonal Gaussian with one deviation for all states, else a categorical.
        data: observations [n, inputs], actions, and old log-probs, advantages, returns and values, each [n].
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        continuous: bool,
        data: Sequence[Tensor],
        minibatches: int,
        learning_rate: float,
    ) -> None:
        self.actor, self.critic = mlp(inputs, hidden, outputs), mlp(inputs, hidden, 1)
        self.log_std = nn.Parameter(torch.zeros(1, outputs)) if continuous else None
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        if self.log_std is not None:
            self.parameters.append(self.log_std)
        self._optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, eps=1e-5)
        self._data, self._minibatches = data, minibatches
        self._generator = np.random.default_rng(0)

    def evaluate(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of the actions, entropy and value, each [B]."""
        output, value = self.actor(obs), self.critic(obs).view(-1)
        if self.log_std is None:
            categorical = torch.distributions.Categorical(logits=output, validate_args=False)
            return categorical.log_prob(actions), categorical.entropy(), value
        std = self.log_std.expand_as(output).exp()
        normal = torch.distributions.Normal(output, std, validate_args=False)
        return normal.log_prob(actions).sum(1), normal.entropy().sum(1), value

    def __call__(self) -> list[float]:
        """All minibatches once, in a random order; the share of clipped ratios of each."""
        count, clipped = len(self._data[0]), []
        order, size = self._generator.permutation(count), count // self._minibatches
        for start in range(0, count, size):
            index = order[start : start + size]
            obs, actions, old_logp, advantages, returns, old_values = (x[index] for x in self._data)
            logp, entropy, values = self.evaluate(obs, actions)
            log_ratio = logp - old_logp
            ratio = log_ratio.exp()
            with torch.no_grad():
                _ = ((ratio - 1) - log_ratio).mean()  # the approximate KL, which is logged
                clipped.append(((ratio - 1.0).abs() > CLIP).float().mean().item())
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            unclipped, limited = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
            policy_loss = torch.max(unclipped, limited).mean()
            moved = old_values + torch.clamp(values - old_values, -CLIP, CLIP)
            value_loss = 0.5 * torch.max((values - returns) ** 2, (moved - returns) ** 2).mean()
            loss = policy_loss - ENT_COEF * entropy.mean() + VF_COEF * value_loss
            self._optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 0.5)
            self._optimizer.step()
        return clipped
