"""Environments of the same shapes as EnvPool's, for a machine without it: noise for observations, a reset now and then.
An engine's update takes as long on them; the time of their steps says nothing about EnvPool's."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

_FRAMES = spaces.Box(0, 255, (4, 84, 84), np.uint8)
SPACES: dict[str, tuple[spaces.Space, spaces.Space]] = {
    "HalfCheetah-v4": (spaces.Box(-np.inf, np.inf, (17,), np.float64), spaces.Box(-1.0, 1.0, (6,), np.float32)),
    "CartPole-v1": (spaces.Box(-np.inf, np.inf, (4,), np.float32), spaces.Discrete(2)),
    "Pong-v5": (_FRAMES, spaces.Discrete(6)),
}


class StandIns(gym.vector.VectorEnv):
    """`num_envs` of them, with next-step autoreset. An episode ends with a chance of 1 in 500 a step."""

    def __init__(self, env_id: str, num_envs: int) -> None:
        self.single_observation_space, self.single_action_space = SPACES[env_id]
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        self._random = np.random.default_rng(0)
        # A few batches drawn once: drawing anew would take longer than an environment's step.
        self._batches = [self._draw() for _ in range(8)]
        self._done, self._step = np.zeros(num_envs, bool), 0

    def _draw(self) -> np.ndarray:
        shape, dtype = self.observation_space.shape, self.single_observation_space.dtype
        if dtype == np.uint8:
            return self._random.integers(0, 256, shape, np.uint8)
        return self._random.normal(size=shape).astype(dtype)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """All of them."""
        self._done[:] = False
        return self._batches[0], {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """The next batch; a row that was done is reset, with no reward."""
        self._step += 1
        rewards = np.where(self._done, 0.0, 1.0)
        self._done = ~self._done & (self._random.random(self.num_envs) < 1 / 500)
        truncated = np.zeros(self.num_envs, bool)
        return self._batches[self._step % len(self._batches)], rewards, self._done.copy(), truncated, {}
