"""PPO on Atari in eager torch, as a careful user writes it from CleanRL's settings: what bench/gpu_train.py measures
against. Nothing of pyppo runs in it but its settings are read from a Config."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pyppo


def layer(module: Any, gain: float = 2**0.5) -> Any:
    """Orthogonal weights, no bias."""
    nn.init.orthogonal_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


class NatureNetwork(nn.Module):
    """Mnih et al. 2015: three convolutions and a layer of 512, then action logits and a value."""

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            layer(nn.Conv2d(4, 32, 8, stride=4)), nn.ReLU(), layer(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            layer(nn.Conv2d(64, 64, 3)), nn.ReLU(), nn.Flatten(), layer(nn.Linear(64 * 7 * 7, 512)), nn.ReLU(),
        )  # fmt: skip
        self.actor, self.critic = layer(nn.Linear(512, num_actions), 0.01), layer(nn.Linear(512, 1), 1.0)

    def forward(self, obs: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        """Frames [B, 4, 84, 84] of 0 to 255 -> the actions' distribution, values [B]."""
        hidden = self.body(obs / 255.0)
        return torch.distributions.Categorical(logits=self.actor(hidden)), self.critic(hidden).squeeze(-1)


class PlainAtari:
    """One pool, one process: T steps of all environments, then the epochs of minibatches.

    Args:
        config: its hyperparameters are used: the clipped loss, clipped values, Adam.
        envs: `config.num_envs` of them, stepped all at once.
        num_actions: the game's.
        device: where the network is; frames go there as float32.
    """

    def __init__(self, config: pyppo.Config, envs: Any, num_actions: int, device: str) -> None:
        self.config, self.device, self.envs = config, torch.device(device), envs
        self.network = NatureNetwork(num_actions).to(self.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, eps=1e-5)
        rows = (config.num_steps, config.num_envs)
        self.obs = torch.zeros(*rows, 4, 84, 84, device=self.device)
        self.actions = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.logp, self.rewards, self.dones, self.values = (torch.zeros(rows, device=self.device) for _ in range(4))
        self.next_obs = self._to_device(self.envs.reset()[0])
        self.next_done = torch.zeros(config.num_envs, device=self.device)

    def _to_device(self, x: np.ndarray) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float32).to(self.device)

    def collect(self) -> None:
        """T steps of all environments."""
        for t in range(self.config.num_steps):
            self.obs[t], self.dones[t] = self.next_obs, self.next_done
            with torch.no_grad():
                distribution, self.values[t] = self.network(self.next_obs)
                action = distribution.sample()
                self.logp[t] = distribution.log_prob(action)
            self.actions[t] = action
            obs, reward, terminated, truncated, _ = self.envs.step(action.cpu().numpy().astype(np.int32))
            self.rewards[t] = self._to_device(reward)
            self.next_obs, self.next_done = self._to_device(obs), self._to_device(terminated | truncated)

    @torch.no_grad()
    def estimate(self) -> tuple[Tensor, Tensor]:
        """Advantages and returns, a loop over time."""
        config, advantages, trace = self.config, torch.zeros_like(self.rewards), 0.0
        next_value, next_done = self.network(self.next_obs)[1], self.next_done
        for t in reversed(range(config.num_steps)):
            live = 1.0 - next_done
            delta = self.rewards[t] + config.gamma * next_value * live - self.values[t]
            advantages[t] = trace = delta + config.gamma * config.gae_lambda * live * trace
            next_value, next_done = self.values[t], self.dones[t]
        return advantages, advantages + self.values

    def update(self, advantages: Tensor, returns: Tensor) -> None:
        """All epochs."""
        columns = (self.obs, self.actions, self.logp, advantages, returns, self.values)
        data = [x.flatten(0, 1) for x in columns]
        size = self.config.batch_size // self.config.num_minibatches
        for _ in range(self.config.update_epochs):
            order = torch.randperm(self.config.batch_size, device=self.device)
            for start in range(0, self.config.batch_size, size):
                index = order[start : start + size]
                self._step(*(x[index] for x in data))

    def _step(
        self, obs: Tensor, actions: Tensor, old_logp: Tensor, advantages: Tensor, returns: Tensor, old_values: Tensor
    ) -> None:
        clip = self.config.clip_coef
        distribution, values = self.network(obs)
        log_ratio = distribution.log_prob(actions) - old_logp
        ratio = log_ratio.exp()
        with torch.no_grad():
            _ = ((ratio - 1) - log_ratio).mean()  # the approximate KL, which is logged
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
        moved = old_values + (values - old_values).clamp(-clip, clip)
        value_loss = 0.5 * torch.max((values - returns) ** 2, (moved - returns) ** 2).mean()
        entropy = distribution.entropy().mean()
        loss = policy_loss + self.config.vf_coef * value_loss - self.config.ent_coef * entropy
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 0.5)
        self.optimizer.step()

    def __call__(self) -> None:
        """One iteration."""
        self.collect()
        self.update(*self.estimate())
