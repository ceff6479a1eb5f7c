"""Environments that ask for more than the present observation: a T-maze; and ones of unusual action spaces."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from probes import Probe

FORWARD, LEFT, RIGHT = 0, 1, 2


class TMaze(Probe):
    """A corridor of `length` cells with a junction at its end; only the first observation says which way is right.

    Observation: the cue (-1 or 1 at first, then 0) and whether this is the junction. Forward moves in the corridor,
    turning does at the junction, and ends the episode: 1 for the side of the cue, else 0. All else takes time
    (the episode is cut off after `limit` steps). Without a memory the mean return is at most 1/2, whatever one does.
    """

    def __init__(self, length: int = 3, num_envs: int = 16, limit: int = 12, **kwargs: Any) -> None:
        super().__init__(num_envs, obs_size=2, action_space=spaces.Discrete(3), **kwargs)
        self.length, self.limit = length, limit
        self.cue = np.ones(num_envs, np.float32)
        self.cell = np.zeros(num_envs, np.int64)

    def begin(self, rows):
        cues = self.rng.choice([-1.0, 1.0], size=self.num_envs).astype(np.float32)
        self.cue = np.where(rows, cues, self.cue)
        self.cell = np.where(rows, 0, self.cell)
        return np.stack([self.cue, np.zeros_like(self.cue)], axis=1)

    def advance(self, actions):
        junction = self.cell == self.length
        turns = junction & (actions != FORWARD)
        right = turns & ((actions == RIGHT) == (self.cue > 0))
        self.cell = self.cell + (~junction & (actions == FORWARD))
        obs = np.stack([np.zeros(self.num_envs), self.cell == self.length], axis=1)
        return obs, right.astype(float), turns, ~turns & (self.elapsed == self.limit)


class MaskedTMaze(TMaze):
    """The same with an action mask: forward in the corridor, a turn at the junction; a forbidden action is an error."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        entries = {"obs": self.single_observation_space, "action_mask": spaces.MultiBinary(3)}
        self.single_observation_space = spaces.Dict(entries)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def reset(self, **how):
        obs, infos = super().reset(**how)
        return self.masked(obs), infos

    def step(self, actions):
        mask = self.mask(self.cell == self.length)
        assert mask[np.arange(self.num_envs), actions][~self.resetting].all()
        obs, *rest, infos = super().step(actions)
        if "final_obs" in infos:
            infos["final_obs"] = {"obs": infos["final_obs"], "action_mask": self.mask(infos["final_obs"][:, 1] > 0)}
        return self.masked(obs), *rest, infos

    def masked(self, obs):
        return {"obs": obs, "action_mask": self.mask(obs[:, 1] > 0)}

    @staticmethod
    def mask(junction):
        return np.stack([~junction, junction, junction], axis=1)


class Bits(Probe):
    """Three bits at random; one step, the share of them that the action repeats, less what it does not. The best is 1.

    Args:
        kind: "binary", MultiBinary(3), or "discrete", MultiDiscrete([2, 2, 2]) counted from 1.
    """

    def __init__(self, kind: str, num_envs: int = 16) -> None:
        space = spaces.MultiBinary(3) if kind == "binary" else spaces.MultiDiscrete([2, 2, 2], start=[1, 1, 1])
        super().__init__(num_envs, obs_size=3, action_space=space)
        self.first = 0 if kind == "binary" else 1

    def begin(self, rows):
        return self.rng.choice([-1.0, 1.0], size=self.last.shape).astype(np.float32)

    def advance(self, actions):
        right = (np.asarray(actions) - self.first > 0) == (self.last > 0)
        return self.last, np.where(right, 1.0, -1.0).mean(axis=1), ~self._never, self._never
