"""Advantages, returns and the explained variance, against NumPy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from pyppo import reference
from pyppo.config import Config
from pyppo.estimate import estimate
from pyppo.rollout import Rollout

OBS, ACTIONS = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)


def filled(num_steps: int, num_envs: int, seed: int, valid: float = 0.8) -> Rollout:
    """A rollout of random rewards, values and flags."""
    rng = np.random.default_rng(seed)
    rollout = Rollout(num_steps, num_envs, OBS, ACTIONS)
    rollout.rewards.copy_(torch.from_numpy(rng.normal(3.0, 2.0, (num_steps, num_envs))))
    rollout.values.copy_(torch.from_numpy(rng.normal(1.0, 1.0, (num_steps + 1, num_envs))))
    for flag, share in ((rollout.terminated, 0.1), (rollout.truncated, 0.05), (rollout.valid, valid)):
        flag.copy_(torch.from_numpy(rng.random((num_steps, num_envs)) < share))
    rollout.truncated &= ~rollout.terminated
    return rollout


def expected(rollout: Rollout, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns of the valid rows by the reference, in float64."""
    advantages, returns = reference.gae(
        rollout.rewards.double(), rollout.values.double(), rollout.terminated, rollout.truncated,
        gamma=config.gamma, gae_lambda=config.gae_lambda, valid=rollout.valid,
    )  # fmt: skip
    return advantages[rollout.valid].numpy(), returns[rollout.valid].numpy()


@pytest.mark.parametrize("shape", [(5, 3), (128, 8), (2048, 1), (16, 257)])
def test_explained_variance_is_of_the_valid_rows(shape: tuple[int, int]) -> None:
    rollout, config = filled(*shape, seed=sum(shape)), Config(env_id="CartPole-v1")
    advantages, returns = expected(rollout, config)
    share = float(estimate(rollout, config))
    assert share == pytest.approx(1.0 - advantages.var() / returns.var(), rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(rollout.advantages[rollout.valid].numpy(), advantages, rtol=1e-4, atol=1e-4)


def test_batch_normalised_advantages_have_mean_0_and_deviation_1_over_the_valid_rows() -> None:
    rollout, config = filled(64, 6, seed=1), Config(env_id="CartPole-v1", norm_adv="batch")
    advantages, _ = expected(rollout, config)
    estimate(rollout, config)
    wanted = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(rollout.advantages[rollout.valid].numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("valid_rows", [0, 1])
def test_too_few_rows_have_no_explained_variance_and_keep_their_advantages(valid_rows: int) -> None:
    rollout, config = filled(4, 2, seed=2, valid=0.0), Config(env_id="CartPole-v1", norm_adv="batch")
    rollout.valid[2, 1] = valid_rows == 1
    advantages, _ = expected(rollout, config)
    assert math.isnan(estimate(rollout, config))
    np.testing.assert_allclose(rollout.advantages[rollout.valid].numpy(), advantages, rtol=1e-5)


def test_returns_that_do_not_vary_have_no_explained_variance() -> None:
    rollout, config = filled(8, 2, seed=3, valid=1.0), Config(env_id="CartPole-v1")
    rollout.rewards.fill_(2.0)
    rollout.terminated.fill_(True)
    rollout.truncated.fill_(False)
    assert math.isnan(estimate(rollout, config))
