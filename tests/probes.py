"""Probe environments: so small that the value of every state and the best policy are known in closed form.

Real `gymnasium.vector.VectorEnv`s, vectorised, in next-step autoreset unless `same_step` is asked for. Each isolates
one thing that a trainer must get right; a wrong answer says which.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class Probe(VectorEnv):
    """N copies of a tiny environment. Subclasses write `begin` (first observations) and `advance` (one step).

    Attributes:
        elapsed: int `[N]`, steps taken in the running episode.
        last: `[N, *]`, the observation that the coming action answers.
    """

    def __init__(
        self, num_envs: int = 8, obs_size: int = 1, action_space: spaces.Space | None = None, same_step: bool = False
    ) -> None:
        self.num_envs = num_envs
        self.same_step = same_step
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP if same_step else AutoresetMode.NEXT_STEP}
        self.single_observation_space = spaces.Box(-10.0, 10.0, (obs_size,), np.float32)
        self.single_action_space = action_space or spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.rng = np.random.default_rng(0)
        self.elapsed = np.zeros(num_envs, np.int64)
        self.resetting = np.zeros(num_envs, bool)
        self.last = np.zeros((num_envs, obs_size), np.float32)

    def begin(self, rows: np.ndarray) -> np.ndarray:
        """First observations `[N, *]`; those of `rows` (bool `[N]`) are used."""
        return np.zeros_like(self.last)

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Next observations, rewards, terminated, truncated; `elapsed` already counts this step."""
        raise NotImplementedError

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.elapsed[:] = 0
        self.resetting[:] = False
        self.last = self.begin(np.ones(self.num_envs, bool))
        return self.last.copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        self.elapsed += 1
        obs, rewards, terminated, truncated = self.advance(actions)
        obs, rewards = obs.astype(np.float32), rewards.astype(np.float64)
        infos: dict[str, Any] = {}
        if not self.same_step:
            rows = self.resetting
            rewards[rows], terminated[rows], truncated[rows] = 0.0, False, False
        done = terminated | truncated
        if self.same_step:
            rows, infos = done, {"final_obs": obs.copy(), "_final_obs": done.copy()}
        obs[rows] = self.begin(rows)[rows]
        self.elapsed[rows] = 0
        self.resetting = done
        self.last = obs
        return obs.copy(), rewards, terminated, truncated, infos

    @property
    def _never(self) -> np.ndarray:
        return np.zeros(self.num_envs, bool)


class ConstantReward(Probe):
    """One step, reward 1, end. V = 1."""

    def advance(self, actions):
        return self.last, np.ones(self.num_envs), ~self._never, self._never


class Discounted(Probe):
    """Observation 0, reward 0, then observation 1, reward 1, end. V(0) = gamma, V(1) = 1."""

    def advance(self, actions):
        second = self.elapsed == 2
        return np.ones_like(self.last), second.astype(float), second, self._never


class _RandomSign(Probe):
    """First observations of -1 or 1 at random."""

    def begin(self, rows):
        return self.rng.choice([-1.0, 1.0], size=self.last.shape).astype(np.float32)


class ObservationReward(_RandomSign):
    """Observation -1 or 1 at random; one step whose reward is the observation. V(s) = s."""

    def advance(self, actions):
        return self.last, self.last[:, 0].astype(float), ~self._never, self._never


class ActionReward(Probe):
    """One step: action 1 gives 1, action 0 gives -1. pi(1) -> 1, V -> 1."""

    def advance(self, actions):
        return self.last, np.where(actions == 1, 1.0, -1.0), ~self._never, self._never


class ObservationAction(_RandomSign):
    """Observation -1 or 1 at random; one step: 1 for action 0 at -1 and for action 1 at 1, else -1. V -> 1."""

    def advance(self, actions):
        wanted = self.last[:, 0] > 0
        return self.last, np.where((actions == 1) == wanted, 1.0, -1.0), ~self._never, self._never


class ContinuousAction(Probe):
    """One step: reward -(a - 0.5)^2. The mean -> 0.5."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(action_space=spaces.Box(-1.0, 1.0, (1,), np.float32), **kwargs)

    def advance(self, actions):
        return self.last, -((actions[:, 0] - 0.5) ** 2), ~self._never, self._never


class TerminalReward(Probe):
    """Four steps along a line of one-hot observations; reward 1 for the last only. V(i) = gamma^(3 - i)."""

    length = 4

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(obs_size=self.length, **kwargs)

    def begin(self, rows):
        return np.eye(self.length, dtype=np.float32)[np.zeros(self.num_envs, int)]

    def advance(self, actions):
        last = self.elapsed == self.length
        return np.eye(self.length)[np.minimum(self.elapsed, self.length - 1)], last.astype(float), last, self._never


class TruncationOnly(Probe):
    """Reward 1 at every step, cut off after four, never ending in itself; the observation is always 0.

    V = 1 / (1 - gamma). With truncation taken for termination and gae_lambda 0, one row in four has the target 1 and
    the others 1 + gamma * V, so V = 1 / (1 - 3/4 gamma).
    """

    limit = 4

    def advance(self, actions):
        return self.last, np.ones(self.num_envs), self._never, self.elapsed == self.limit


class ResetRow(Probe):
    """Two states that take turns, s = 0 and f = 1, reward 1 at every step; cut off after one step and two in turn.

    Cut off after one, the final observation is f, otherwise s: the row that carries the reset stands at f or at s like
    any other, with a reward of 0 that its action did not earn. V(s) = V(f) = 1 / (1 - gamma).

    Learned from, with gae_lambda 0: of the rows at f, one is real (1 + gamma V(s)) and one a reset (0 + gamma V(s)); of
    those at s, two are real (1 + gamma V(f)) and one a reset (0 + gamma V(s)):
        V(f) = 1/2 + gamma V(s),   3 V(s) = 2 + 2 gamma V(f) + gamma V(s)
    so  V(s) = (2 + gamma) / (3 - gamma - 2 gamma^2).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.limit = np.ones(self.num_envs, np.int64)

    def begin(self, rows):
        self.limit = np.where(rows, 3 - self.limit, self.limit)
        return np.zeros_like(self.last)

    def advance(self, actions):
        return 1.0 - self.last, np.ones(self.num_envs), self._never, self.elapsed == self.limit


class Scripted(Probe):
    """Fixed episodes, for alignment tests: observation 100 * episode + step, reward step, plus 1,000 * row each.

    `endings[row]` lists its episodes as (length, "T" terminated, "C" cut off, or "B" both), repeated for ever.
    """

    def __init__(self, endings: list[list[tuple[int, str]]], same_step: bool = False, first_row: int = 0) -> None:
        super().__init__(num_envs=len(endings), same_step=same_step)
        self.single_observation_space = spaces.Box(-1e6, 1e6, (1,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.endings = endings
        self.first_row = first_row
        self.episode = np.full(self.num_envs, -1)
        self.received: list[np.ndarray] = []

    def begin(self, rows):
        self.episode = self.episode + rows
        return self._observe(np.zeros(self.num_envs))

    def advance(self, actions):
        self.received.append(actions.copy())
        current = [ends[number % len(ends)] for ends, number in zip(self.endings, self.episode, strict=True)]
        over = np.array([count == length for count, (length, _) in zip(self.elapsed, current, strict=True)])
        terminated = over & np.array([how in "TB" for _, how in current])
        truncated = over & np.array([how in "CB" for _, how in current])
        return self._observe(self.elapsed), self.elapsed + 1000.0 * self._rows(), terminated, truncated

    def _observe(self, step: np.ndarray) -> np.ndarray:
        return (1000.0 * self._rows() + 100.0 * self.episode + step)[:, None].astype(np.float32)

    def _rows(self) -> np.ndarray:
        return self.first_row + np.arange(self.num_envs)
