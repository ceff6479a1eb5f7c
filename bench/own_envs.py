"""Two small environments of the learning suite, of kinds that EnvPool has no quick one of: MultiDiscrete and images.

All their environments are stepped at once, with same-step autoreset.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class _SameStep(VectorEnv):
    """What both share: seeds, and an end after `length` steps. A subclass has `_begin`, `_observe` and `_advance`."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (gymnasium's own form)
    length: int

    def __init__(self, num_envs: int, obs_space: spaces.Space, action_space: spaces.Space) -> None:
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = obs_space, action_space
        self.observation_space, self.action_space = (
            batch_space(obs_space, num_envs),
            batch_space(action_space, num_envs),
        )
        self._randoms = [np.random.default_rng(i) for i in range(num_envs)]
        self._elapsed = np.zeros(num_envs, np.int64)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            seeds = seed if not isinstance(seed, int) else range(seed, seed + self.num_envs)
            self._randoms = [np.random.default_rng(one) for one in seeds]
        self._elapsed[:] = 0
        self._begin(np.arange(self.num_envs))
        return self._observe(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        self._elapsed += 1
        rewards = self._advance(np.asarray(actions))
        over = self._elapsed == self.length
        infos: dict[str, Any] = {}
        if over.any():
            infos = {"final_obs": self._observe(), "_final_obs": over}
            self._elapsed[over] = 0
            self._begin(np.flatnonzero(over))
        return self._observe(), rewards, over, np.zeros(self.num_envs, bool), infos

    def _begin(self, rows: np.ndarray) -> None:
        """New episodes in these rows."""
        raise NotImplementedError

    def _observe(self) -> np.ndarray:
        raise NotImplementedError

    def _advance(self, actions: np.ndarray) -> np.ndarray:
        """The step's rewards [N]; `_elapsed` counts this step already."""
        raise NotImplementedError


class Locks(_SameStep):
    """Sixteen locks an episode, each of three numbers; a third of a reward for each number that is right.

    The observation is a code of three digits, one-hot: of 3, 5 and 4 values. Number i must be digit i plus the digit
    before it, modulo the component's size. So each component has an answer of its own, which goes by two digits, and
    sums modulo a size are not linear in one-hot digits. Actions drawn blindly get 4.2 of the 16, and where one of the
    three components is drawn so, 12.4 at most.
    """

    sizes = np.array([3, 5, 4])
    length = 16

    def __init__(self, num_envs: int) -> None:
        width = int(self.sizes.sum())
        super().__init__(num_envs, spaces.Box(0, 1, (width,), np.float32), spaces.MultiDiscrete(self.sizes))
        self._codes = np.zeros((num_envs, 3), np.int64)

    def answers(self) -> np.ndarray:
        """The actions that open the locks, [N, 3]."""
        return (self._codes + np.roll(self._codes, 1, axis=1)) % self.sizes

    def _begin(self, rows: np.ndarray) -> None:
        for row in rows:
            self._codes[row] = self._randoms[row].integers(self.sizes)

    def _observe(self) -> np.ndarray:
        return np.concatenate(
            [np.eye(n, dtype=np.float32)[self._codes[:, i]] for i, n in enumerate(self.sizes)], axis=1
        )

    def _advance(self, actions: np.ndarray) -> np.ndarray:
        right = (actions == self.answers()).mean(axis=1)
        self._begin(np.arange(self.num_envs))
        return right.astype(np.float32)


class Catch(_SameStep):
    """Catch a ball that falls down a picture of 12 x 12 pixels: 1 if the paddle is there when it lands, else -1.

    The ball drifts by -1, 0 or 1 a row, turning at the walls; the paddle, one pixel in the lowest row, moves by as much
    and begins off the walls, so that its ten moves reach every landing. Nothing but the picture says where either is.
    Two channels: this step's picture and the one before, which show the drift. A paddle that goes by no picture catches
    about one ball in twelve, a return of -0.83.
    """

    side = 12
    length = side - 2

    def __init__(self, num_envs: int) -> None:
        picture = spaces.Box(0, 255, (2, self.side, self.side), np.uint8)
        super().__init__(num_envs, picture, spaces.Discrete(3))
        self._column, self._drift, self._paddle = (np.zeros(num_envs, np.int64) for _ in range(3))
        self._pictures = np.zeros((num_envs, 2, self.side, self.side), np.uint8)

    def _begin(self, rows: np.ndarray) -> None:
        for row in rows:
            random = self._randoms[row]
            self._column[row], self._paddle[row] = random.integers([0, 1], [self.side, self.side - 1])
            self._drift[row] = random.integers(-1, 2)
        before = self._draw(rows, 0)
        self._fall(rows)
        self._pictures[rows] = np.stack([self._draw(rows, 1), before], axis=1)

    def _fall(self, rows: np.ndarray) -> None:
        """The ball's move, in these environments."""
        last, column = self.side - 1, self._column[rows] + self._drift[rows]
        outside = (column < 0) | (column > last)
        self._drift[rows] = np.where(outside, -self._drift[rows], self._drift[rows])
        self._column[rows] = np.where(outside, self._column[rows] + self._drift[rows], column)

    def _draw(self, rows: np.ndarray, height: int | np.ndarray) -> np.ndarray:
        """Pictures of these environments [rows, H, W] with the ball that far down."""
        pictures, each = np.zeros((len(rows), self.side, self.side), np.uint8), np.arange(len(rows))
        pictures[each, height, self._column[rows]] = 255
        pictures[each, self.side - 1, self._paddle[rows]] = 255
        return pictures

    def _observe(self) -> np.ndarray:
        return self._pictures.copy()

    def _advance(self, actions: np.ndarray) -> np.ndarray:
        every = np.arange(self.num_envs)
        self._paddle = np.clip(self._paddle + actions - 1, 0, self.side - 1)
        self._fall(every)
        self._pictures = np.stack([self._draw(every, self._elapsed + 1), self._pictures[:, 0]], axis=1)
        caught = np.where(self._paddle == self._column, 1.0, -1.0)
        return np.where(self._elapsed == self.length, caught, 0.0).astype(np.float32)


OWN = {"Locks": Locks, "Catch": Catch}
