"""What tests of the trainer share: short runs of small networks, and a policy of a user's own."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from pyppo.config import Config

envpool = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="EnvPool has wheels for Linux only")


def config_for(**fields):
    return Config(**{
        "env_id": "probe", "total_timesteps": 600, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2,
        "hidden_sizes": (8,), "run_dir": None, "device": "cpu", **fields,
    })  # fmt: skip


class OwnPolicy(nn.Module):
    """A module of a user's own: no heads(), a distribution from torch, a shared trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(1, 16), nn.Tanh())
        self.logits, self.critic = nn.Linear(16, 2), nn.Linear(16, 1)
        self.auxiliary_calls = 0

    def forward(self, obs):
        hidden = self.trunk(obs)
        return torch.distributions.Categorical(logits=self.logits(hidden)), self.critic(hidden).squeeze(1)

    def evaluate(self, obs, actions, state=None):
        distribution, value = self(obs["obs"])
        return distribution.log_prob(actions), distribution.entropy(), value

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        distribution, _ = self(torch.as_tensor(obs))
        return (distribution.probs.argmax(1) if deterministic else distribution.sample()).numpy()

    def auxiliary_loss(self, minibatch):
        self.auxiliary_calls += 1
        return 0.0 * minibatch.values.sum()
