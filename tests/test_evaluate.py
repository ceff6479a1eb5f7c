"""Evaluation: whole episodes, a fixed number from each environment, and nothing touched."""

import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces

import pyppo
from pyppo.actions import Distribution
from pyppo.evaluation import _make
from pyppo.policy import MLPPolicy


class Lengths(probes.Probe):
    """Environment i ends after i + 1 steps, reward 1 each: taking whichever end first would see short ones only."""

    def advance(self, actions):
        self.actions = actions.copy()
        return self.last, np.ones(self.num_envs), self.elapsed == np.arange(self.num_envs) + 1, self._never


def policy_for(env, **settings):
    distribution = Distribution.from_space(env.single_action_space)
    return MLPPolicy(spaces.Dict({"obs": env.single_observation_space}), distribution, **settings)


@pytest.mark.parametrize("same_step", [False, True])
def test_each_environment_gives_its_quota(same_step):
    env = Lengths(num_envs=4, same_step=same_step)
    result = pyppo.evaluate(policy_for(env), envs=env, episodes=10)
    assert result.lengths.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    np.testing.assert_array_equal(result.returns, result.lengths)
    assert result.mean == pytest.approx(2.3)
    assert result.std == pytest.approx(np.std(result.returns))
    assert "mean=2.30" in repr(result)


def test_nothing_of_the_policy_changes():
    env = Lengths(num_envs=3)
    policy = policy_for(env, norm_obs=True)
    state = {name: x.clone() for name, x in policy.state_dict().items()}
    noise, policy.training = policy._noise, True
    pyppo.evaluate(policy, envs=env, episodes=5, deterministic=False)
    assert all(torch.equal(x, state[name]) for name, x in policy.state_dict().items())
    assert policy._noise == noise
    assert policy.training


def test_sampled_evaluation_follows_its_seed():
    actions = []
    for seed in (1, 1, 2):
        env = probes.ContinuousAction(num_envs=4)
        actions.append(pyppo.evaluate(policy_for(env), envs=env, episodes=4, deterministic=False, seed=seed).returns)
    np.testing.assert_array_equal(actions[0], actions[1])
    assert (actions[0] != actions[2]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"episodes": 0}, "episodes is 0"), ({"num_envs": 0}, "num_envs is 0"), ({}, "env_id is None")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        pyppo.evaluate(policy_for(Lengths()), **arguments)


def test_the_saved_options_are_used_without_those_for_training():
    pytest.importorskip("envpool")
    options = {"max_episode_steps": 7, "reward_clip": True}
    policy = policy_for(Lengths(), metadata={"env_id": "CartPole-v1", "env_options": options})
    group = _make(policy, None, None, 2, 0)
    assert group.env._pool.config["max_episode_steps"] == 7
    group.close()
    elsewhere = _make(policy, "CartPole-v0", None, 2, 0)
    assert elsewhere.env._pool.config["max_episode_steps"] == 200
    elsewhere.close()
