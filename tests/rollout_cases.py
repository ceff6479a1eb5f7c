"""Scripted environments whose observations are of several kinds, and a policy's part made of all that they hold."""

from __future__ import annotations

import numpy as np
import probes
import torch
from gymnasium import spaces

ENDINGS = [[(2, "T"), (3, "C")], [(4, "C")], [(1, "B"), (5, "T")], [(6, "T"), (1, "C")]]


class Pictures(probes.Scripted):
    """`probes.Scripted` whose observation is a small picture of bytes and a number, and an action mask."""

    def __init__(self, endings, same_step=False, first_row=0):
        super().__init__(endings, same_step, first_row)
        self.single_observation_space = spaces.Dict(
            picture=spaces.Box(0, 255, (2, 3), np.uint8),
            number=spaces.Box(-1e6, 1e6, (1,), np.float64),
            action_mask=spaces.MultiBinary(2),
        )

    def reset(self, **kwargs):
        obs, infos = super().reset(**kwargs)
        return self.in_full(obs), infos

    def step(self, actions):
        obs, *rest, infos = super().step(actions)
        if "final_obs" in infos:
            infos["final_obs"] = self.in_full(infos["final_obs"])
        return self.in_full(obs), *rest, infos

    def in_full(self, obs):
        number = obs.astype(np.int64).reshape(-1, 1, 1)
        picture = (number + np.arange(6).reshape(1, 2, 3)) % 256
        return {"picture": picture.astype(np.uint8), "number": obs.astype(np.float64),
                "action_mask": np.stack([np.ones(len(obs)), obs[:, 0] % 2], 1).astype(np.int8)}  # fmt: skip


def value_of(obs):
    return obs["number"][:, 0] + obs["picture"].float().sum((1, 2)) / 128


def answer(rollout, t, rows):
    """Action, log-prob and value of row t, made of all that the row holds."""
    obs = {name: x[t, rows] for name, x in rollout.obs.items()}
    value = value_of(obs)
    starts = rollout.starts[t, rows] if rollout.states is not None else torch.zeros_like(value)
    if rollout.states is not None:
        rollout.states[t + 1, rows] = torch.where(starts[:, None], 0.0, rollout.states[t, rows]) + value[:, None]
        value = value + rollout.states[t + 1, rows, 0]
    rollout.values[t, rows] = value
    actions = (value.long() + rollout.steps[rows]) % 2 * obs["action_mask"][:, 1]
    rollout.actions[t, rows] = actions
    return actions
