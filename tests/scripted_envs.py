"""Scripted environments in every form that the trainer takes: one MDP, and one with action masks."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import probes
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class ScriptedEnv(gym.Env):
    """One row of `probes.Scripted` as a single environment."""

    observation_space = spaces.Box(-1e6, 1e6, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, endings, row):
        self.endings, self.row, self.episode, self.elapsed = endings, row, -1, 0

    def reset(self, *, seed=None, options=None):
        self.episode = 0 if seed is not None else self.episode + 1  # a seed starts the script anew
        self.elapsed = 0
        return self.observe(), {}

    def step(self, action):
        self.elapsed += 1
        length, how = self.endings[self.episode % len(self.endings)]
        over = self.elapsed == length
        return self.observe(), self.elapsed + 1000.0 * self.row, over and how in "TB", over and how in "CB", {}

    def observe(self):
        return np.array([1000.0 * self.row + 100.0 * self.episode + self.elapsed], np.float32)


def gymnasium_form(endings, mode):
    makers = [lambda row=row, ends=ends: ScriptedEnv(ends, row) for row, ends in enumerate(endings)]
    return SyncVectorEnv(makers, autoreset_mode=mode)


class EnvPoolForm(probes.Scripted):
    """In two halves, with a receiver, as EnvPool's adapter has them; "done" for terminated in the receiver."""

    def send(self, actions):
        self.sent = actions.copy()

    def recv(self):
        return self.step(self.sent)

    def receiver(self, columns):
        def receive(t):
            obs, rewards, terminated, truncated, _ = self.recv()
            columns.rewards[t], columns.terminated[t], columns.truncated[t] = rewards, terminated | truncated, truncated
            columns.obs["obs"][t + 1] = obs

        return receive


FORMS = {
    "next-step": lambda endings: probes.Scripted(endings),
    "same-step": lambda endings: probes.Scripted(endings, same_step=True),
    "send and recv": lambda endings: EnvPoolForm(endings),
    "gymnasium next-step": lambda endings: gymnasium_form(endings, AutoresetMode.NEXT_STEP),
    "gymnasium same-step": lambda endings: gymnasium_form(endings, AutoresetMode.SAME_STEP),
    "gymnasium disabled": lambda endings: gymnasium_form(endings, AutoresetMode.DISABLED),
}


class MaskedEnv(gym.Env):
    """Episodes of three steps; the mask allows one action, the number of the step. After the last step it allows none.

    An action that the mask forbids raises. The mask is in the observation or in the info.
    """

    action_space = spaces.Discrete(4)

    def __init__(self, where="obs"):
        self.where, self.elapsed = where, 0
        entries = {"place": spaces.Discrete(4), "action_mask": spaces.MultiBinary(4)}
        self.observation_space = spaces.Dict(entries) if where == "obs" else entries["place"]

    def reset(self, *, seed=None, options=None):
        self.elapsed = 0
        return self.observe()

    def step(self, action):
        assert action == self.elapsed, (action, self.elapsed)
        self.elapsed += 1
        obs, info = self.observe()
        return obs, 1.0, self.elapsed == 3, False, info

    def observe(self):
        mask = np.arange(4) == (self.elapsed if self.elapsed < 3 else -1)
        if self.where == "obs":
            return {"place": np.int64(self.elapsed), "action_mask": mask.astype(np.int8)}, {}
        return np.int64(self.elapsed), {self.where: mask}
