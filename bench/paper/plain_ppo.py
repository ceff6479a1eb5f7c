"""PPO in one file of plain torch, which shares no line with the library: what its scores are held against.

Schulman et al. 2017 (arXiv 1707.06347, eqs. 7 and 9) with the details that Huang et al. 2022 list ("The 37
Implementation Details of Proximal Policy Optimization"), for EnvPool's environments of continuous actions. Observations
and rewards are normalised by statistics that follow every step, as Gymnasium's wrappers do it, or those of observations
by statistics that stay as they are within a rollout, as the library's do.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import envpool
import numpy as np
import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of valid rows: observations, actions, log-probabilities, values, advantages, returns."""


@dataclass(frozen=True)
class Settings:
    """The paper's table 3, 8 environments for its one, and the limits of CleanRL."""

    total_timesteps: int = 1_000_000
    num_envs: int = 8
    num_steps: int = 256
    num_minibatches: int = 32
    update_epochs: int = 10
    learning_rate: float = 3e-4
    adam_eps: float = 1e-5
    max_grad_norm: float = 0.5
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_coef: float = 0.2
    vf_coef: float = 0.5
    hidden_size: int = 64
    limit: float = 10.0  # of normalised observations and rewards
    warmup_steps: int | None = None  # of random actions, then observations' statistics are fixed within a rollout


class RunningStatistics:
    """Mean and variance of all rows so far (Chan et al. 1979)."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), 1e-4

    def update(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        total = self.count + len(rows)
        delta, share = rows.mean(axis=0) - self.mean, len(rows) / total
        self.var = self.var * (1 - share) + rows.var(axis=0) * share + delta**2 * share * (1 - share)
        self.mean, self.count = self.mean + delta * share, total


class Environments:
    """EnvPool's, normalised. After the end of an episode comes a row that only carries the reset: it is not valid."""

    def __init__(self, env_id: str, seed: int, settings: Settings) -> None:
        self._s = settings
        self._envs: Any = envpool.make_gymnasium(
            env_id, num_envs=settings.num_envs, seed=seed * settings.num_envs, num_threads=1
        )
        self.obs_size, self.action_size = self._envs.observation_space.shape[0], self._envs.action_space.shape[0]
        self._low, self._high = self._envs.action_space.low, self._envs.action_space.high
        self._obs_statistics, self._return_statistics = RunningStatistics((self.obs_size,)), RunningStatistics()
        self._discounted, self._totals = np.zeros(settings.num_envs), np.zeros(settings.num_envs)
        self.valid = np.ones(settings.num_envs, bool)
        self.finished: list[float] = []
        self._waiting: list[np.ndarray] = []  # observations that the statistics do not know yet
        obs = self._envs.reset()[0]
        if settings.warmup_steps is not None:
            random = np.random.default_rng(seed)
            for _ in range(settings.warmup_steps):
                actions = random.uniform(self._low, self._high, (settings.num_envs, self.action_size))
                self._waiting.append(self._envs.step(actions)[0])
            self.learn_statistics()
            obs = self._envs.reset()[0]
        self.obs = self._normalized(obs)

    def learn_statistics(self) -> None:
        """Take in the observations since the last call."""
        if self._waiting:
            self._obs_statistics.update(np.concatenate(self._waiting))
            self._waiting.clear()

    def _normalized(self, obs: np.ndarray) -> Tensor:
        self._waiting.append(obs[self.valid])
        if self._s.warmup_steps is None:
            self.learn_statistics()
        scaled = (obs - self._obs_statistics.mean) / np.sqrt(self._obs_statistics.var + 1e-8)
        return torch.as_tensor(np.clip(scaled, -self._s.limit, self._s.limit), dtype=torch.float32)

    def step(self, actions: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rewards, terminated, truncated; `obs` and `valid` are then those of the next row."""
        obs, rewards, terminated, truncated, _ = self._envs.step(
            np.clip(actions.numpy().astype(np.float64), self._low, self._high)
        )
        live = self.valid
        truncated = truncated & live
        terminated = terminated & live & ~truncated
        done = terminated | truncated
        self._totals += np.where(live, rewards, 0.0)
        self.finished += [float(x) for x in self._totals[done]]
        self._totals[done] = 0.0
        self._discounted = np.where(live, self._discounted * self._s.gamma + rewards, self._discounted)
        self._return_statistics.update(self._discounted[live])
        self._discounted[done] = 0.0
        scaled = np.clip(rewards / np.sqrt(self._return_statistics.var + 1e-8), -self._s.limit, self._s.limit)
        self.valid = ~done
        self.obs = self._normalized(obs)
        return np.where(live, scaled, 0.0), terminated, truncated


class Agent(nn.Module):
    """Actor and critic, two tanh layers each; a normal of one deviation for all states, 1 at the start."""

    def __init__(self, obs_size: int, action_size: int, hidden: int) -> None:
        super().__init__()
        self.actor = self._network([obs_size, hidden, hidden, action_size], 0.01)
        self.critic = self._network([obs_size, hidden, hidden, 1], 1.0)
        self.log_std = nn.Parameter(torch.zeros(action_size))

    @staticmethod
    def _network(widths: list[int], last_gain: float) -> nn.Sequential:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            last = len(layers) == 2 * (len(widths) - 2)
            layer = nn.Linear(fan_in, fan_out)
            nn.init.orthogonal_(layer.weight, last_gain if last else math.sqrt(2.0))
            nn.init.zeros_(layer.bias)
            layers += [layer] if last else [layer, nn.Tanh()]
        return nn.Sequential(*layers)

    def log_prob(self, obs: Tensor, actions: Tensor) -> Tensor:
        deviations = (actions - self.actor(obs)) / self.log_std.exp()
        return (-0.5 * deviations.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(dim=1)

    def value(self, obs: Tensor) -> Tensor:
        return self.critic(obs).squeeze(1)

    def act(self, obs: Tensor) -> Tensor:
        mean = self.actor(obs)
        return mean + self.log_std.exp() * torch.randn_like(mean)


def advantages_of(
    rewards: np.ndarray, values: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, valid: np.ndarray,
    s: Settings,
) -> np.ndarray:  # fmt: skip
    """Generalised advantage estimation. All `[T, N]`, values `[T+1, N]`; a truncated row bootstraps from the next."""
    out, carried = np.zeros_like(rewards), np.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + s.gamma * values[t + 1] * ~terminated[t] - values[t]
        done = terminated[t] | truncated[t]
        carried = np.where(valid[t], delta + s.gamma * s.gae_lambda * carried * ~done, 0.0)
        out[t] = carried
    return out


@torch.no_grad()
def rollout(envs: Environments, agent: Agent, s: Settings) -> Batch:
    """`num_steps` steps of all environments."""
    kept: dict[str, list[Any]] = {name: [] for name in ("obs", "actions", "logp", "values", "flags")}
    for _ in range(s.num_steps):
        obs, valid = envs.obs, envs.valid
        actions = agent.act(obs)
        answer = envs.step(actions)
        columns = (obs, actions, agent.log_prob(obs, actions), agent.value(obs), (*answer, valid))
        for column, x in zip(kept.values(), columns, strict=True):
            column.append(x)
    values = torch.stack([*kept["values"], agent.value(envs.obs)])
    rewards, terminated, truncated, valid = (np.stack(x) for x in zip(*kept["flags"], strict=True))
    advantages = torch.as_tensor(
        advantages_of(rewards, values.numpy(), terminated, truncated, valid, s), dtype=torch.float32
    )
    columns = [torch.stack(kept[name]) for name in ("obs", "actions", "logp")]
    rows = torch.as_tensor(valid)
    obs, actions, logp, old_values, advantages, returns = (
        x[rows] for x in (*columns, values[:-1], advantages, advantages + values[:-1])
    )
    return obs, actions, logp, old_values, advantages, returns


def loss_of(agent: Agent, batch: Batch, s: Settings) -> Tensor:
    """The clipped surrogate (eq. 7) and the value loss, clipped around the old values (eq. 9, no entropy bonus)."""
    obs, actions, logp, old_values, advantages, returns = batch
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = (agent.log_prob(obs, actions) - logp).exp()
    clipped = ratio.clamp(1 - s.clip_coef, 1 + s.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    values = agent.value(obs)
    near = old_values + (values - old_values).clamp(-s.clip_coef, s.clip_coef)
    value_loss = 0.5 * torch.max((values - returns).square(), (near - returns).square()).mean()
    return policy_loss + s.vf_coef * value_loss


def update(agent: Agent, optimizer: torch.optim.Optimizer, batch: Batch, s: Settings) -> None:
    """All epochs over a rollout."""
    for _ in range(s.update_epochs):
        for rows in torch.randperm(len(batch[0])).tensor_split(s.num_minibatches):
            obs, actions, logp, values, advantages, returns = (x[rows] for x in batch)
            optimizer.zero_grad()
            loss_of(agent, (obs, actions, logp, values, advantages, returns), s).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), s.max_grad_norm)
            optimizer.step()


def train(env_id: str, seed: int, settings: Settings) -> tuple[list[int], list[float], float]:
    """Train.

    Returns:
        Steps and the mean return of the last 100 episodes, after each rollout by which an episode had ended; seconds.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    s, start = settings, time.perf_counter()
    envs = Environments(env_id, seed, s)
    agent = Agent(envs.obs_size, envs.action_size, s.hidden_size)
    optimizer = torch.optim.Adam(agent.parameters(), lr=s.learning_rate, eps=s.adam_eps, fused=True)
    steps, curve_steps, returns = 0, [], []
    while steps < s.total_timesteps:
        for group in optimizer.param_groups:
            group["lr"] = s.learning_rate * (1 - steps / s.total_timesteps)
        batch = rollout(envs, agent, s)
        envs.learn_statistics()
        update(agent, optimizer, batch, s)
        steps += len(batch[0])
        if envs.finished:
            curve_steps.append(steps)
            returns.append(float(np.mean(envs.finished[-100:])))
    return curve_steps, returns, time.perf_counter() - start
