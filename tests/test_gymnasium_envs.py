"""Gymnasium's environments by name or function, for training and evaluation, and the final observations they give."""

import gymnasium as gym
import numpy as np
import probes
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import pyppo
from pyppo.config import Config
from pyppo.envs import EnvGroup
from pyppo.gymnasium_envs import final_rows
from pyppo.own_envs import as_group, as_groups
from pyppo.spaces import flatten_space
from pyppo.trainer import Trainer


def short_cartpole():
    return gym.make("CartPole-v1", max_episode_steps=5)


def config(**fields):
    return Config(**{"env_id": "mine", "total_timesteps": 60, "num_steps": 8, "num_minibatches": 1, "run_dir": None,
                     "hidden_sizes": (8,), **fields})  # fmt: skip


class Closing(gym.Env):
    """Notes that it was closed."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)
    closed = 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 1.0, True, False, {}

    def close(self):
        Closing.closed += 1


def test_names_and_functions_become_one_group():
    (group,) = as_groups(["CartPole-v1", short_cartpole, "CartPole-v1"])
    assert (group.num_envs, group.autoreset, group.owned) == (3, "next_step", True)
    assert isinstance(group.env, SyncVectorEnv)
    with Trainer(config(), envs=[short_cartpole] * 2, quiet=True) as trainer:
        result = trainer.train()
    assert trainer.config.num_envs == 2
    assert result.history["episode_length"][-1] == 5.0
    assert pyppo.evaluate(result.policy, envs=[short_cartpole] * 3, episodes=4).lengths.tolist() == [5] * 4


def test_what_was_made_from_names_is_closed():
    Closing.closed = 0
    with Trainer(config(), envs=[Closing] * 2, quiet=True) as trainer:
        trainer.train()
    assert Closing.closed == 2
    pyppo.evaluate(trainer.policy, envs=[Closing], episodes=1)
    assert Closing.closed == 3
    mine = SyncVectorEnv([Closing])
    with Trainer(config(), envs=mine, quiet=True) as trainer:
        trainer.train()
    pyppo.evaluate(trainer.policy, envs=mine, episodes=1)
    assert Closing.closed == 3


@pytest.mark.parametrize(
    ("envs", "error", "message"),
    [
        (["CartPole-v1", 3], TypeError, r"envs\[1\] is a int; it must be a gymnasium.make name or a function"),
        ([gym.make("CartPole-v1")], TypeError, r"envs\[0\] is a made .*; it must be a function that makes one"),
        (["NoSuchEnv-v0"], ValueError, "envs has a name that Gymnasium cannot make: .*NoSuchEnv"),
        (["CartPole-v1", "Acrobot-v1"], ValueError, "envs cannot be stepped side by side: "),
        ([probes.ConstantReward(), "CartPole-v1"], TypeError, "envs has a str among vector environments"),
        ([], ValueError, "envs is empty"),
        (5, TypeError, "envs is a int; it must be a gymnasium.vector.VectorEnv"),
        ("CartPole-v1", TypeError, "envs is a str"),
    ],
)
def test_lists_that_are_refused(envs, error, message):
    with pytest.raises(error, match=message):
        as_groups(envs)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_an_environment_learns_in_every_autoreset_mode(mode):
    class Guess(gym.Env):
        """One step: 1 for the action that the observation names."""

        observation_space, action_space = spaces.Discrete(2), spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.wanted = int(self.np_random.integers(2))
            return self.wanted, {}

        def step(self, action):
            return self.wanted, float(action == self.wanted), True, False, {}

    envs = SyncVectorEnv([Guess] * 8, autoreset_mode=mode)
    settings = config(total_timesteps=4000, num_steps=32, num_minibatches=4, update_epochs=4, learning_rate=1e-2)
    with Trainer(settings, envs=envs, quiet=True) as trainer:
        result = trainer.train()
    assert result.history["episode_length"][-1] == 1.0
    assert pyppo.evaluate(result.policy, envs=envs, episodes=20).mean == 1.0


def test_the_mode_is_asked_for_in_evaluation_too():
    env = SyncVectorEnv([short_cartpole])
    env.metadata = {}
    with pytest.raises(ValueError, match="SyncVectorEnv does not say how it resets finished episodes"):
        as_group(env)
    assert as_group(EnvGroup(env, autoreset_mode="disabled")).autoreset_mode == "disabled"


PAIR = spaces.Tuple([spaces.Box(0, 9, (2,)), spaces.Dict(a=spaces.Discrete(9))])


def pair(i):
    return np.full(2, i, np.float32), {"a": i}


def objects(rows):
    final = np.full(4, None, dtype=object)
    for row in rows:
        final[row] = pair(row)
    return final


@pytest.mark.parametrize(
    "final",
    [
        objects([1, 3]),
        [pair(i) for i in range(4)],
        (np.stack([pair(i)[0] for i in range(4)]), {"a": np.arange(4)}),
    ],
    ids=["object array", "list", "tuple of batches"],
)
def test_final_observations_in_every_form(final):
    rows = final_rows(final, flatten_space(PAIR), np.array([1, 3]))
    assert {name: x.tolist() for name, x in rows.items()} == {"0": [[1, 1], [3, 3]], "1/a": [1, 3]}
    plain = final_rows(np.arange(8.0).reshape(4, 2), flatten_space(spaces.Box(0, 9, (2,))), np.array([3]))
    assert plain["obs"].tolist() == [[6.0, 7.0]]


def test_an_environment_that_two_rows_step_is_refused():
    one = short_cartpole()
    with pytest.raises(ValueError, match="environments 0 and 2 are the same CartPoleEnv; each must be one of its own"):
        Trainer(config(), envs=[lambda: one, short_cartpole, lambda: gym.wrappers.TimeLimit(one, 3)], quiet=True)
    with pytest.raises(ValueError, match="environments 0 and 1 are the same"):
        EnvGroup(SyncVectorEnv([lambda: one] * 2))
    with pytest.raises(ValueError, match="environments 0 and 1 are the same"):
        as_groups([lambda: one] * 2)
    both = SyncVectorEnv([short_cartpole] * 2)
    for envs in ([both, both], [both, EnvGroup(both)], [gym.wrappers.vector.RecordEpisodeStatistics(both), both]):
        with pytest.raises(ValueError, match="the same SyncVectorEnv twice"):
            as_groups(envs)
    assert [group.num_envs for group in as_groups([both, SyncVectorEnv([short_cartpole])])] == [2, 1]


def test_an_autoreset_mode_that_contradicts_the_metadata_is_refused():
    env = SyncVectorEnv([short_cartpole] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match="autoreset_mode is 'next_step'; it must be 'same_step' or left out"):
        EnvGroup(env, autoreset_mode="next_step")
    assert EnvGroup(env, autoreset_mode="same_step").autoreset == EnvGroup(env).autoreset == "same_step"


def test_a_function_that_makes_nothing_is_named():
    with pytest.raises(TypeError, match=r"envs\[1\] made a NoneType; it must make a gymnasium.Env"):
        as_groups([short_cartpole, lambda: None])
