"""Evaluation: whole episodes, a fixed number from each environment, and nothing touched."""

import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces

import pyppo
from pyppo import checkpoint
from pyppo.actions import Distribution
from pyppo.envs import EnvGroup, env_seed
from pyppo.evaluation import make_group
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


@pytest.mark.parametrize("name", ["episodes", "num_envs"])
@pytest.mark.parametrize("value", ["5", 2.5, float("nan")])
def test_a_count_that_is_none_is_named(name, value):
    with pytest.raises(TypeError, match=f"{name} is {value!r}; it must be an integer of at least 1"):
        pyppo.evaluate(policy_for(Lengths()), envs=Lengths(), **{name: value})


def test_what_is_no_policy_is_named():
    for policy, said in (
        (None, "a NoneType"),
        (len, "a builtin_function_or_method"),
        (MLPPolicy, "the class MLPPolicy"),
    ):
        with pytest.raises(TypeError, match=f"policy is {said}; it must be an object with act"):
            pyppo.evaluate(policy, "CartPole-v1")
    result = pyppo.train("CartPole-v1", total_timesteps=1, num_steps=8, num_minibatches=1, run_dir=None, quiet=True)
    with pytest.raises(TypeError, match=r"policy is a Result; it must be .*, as its \.policy is"):
        pyppo.evaluate(result)
    with pytest.raises(TypeError, match="options is 'fast'; it must be a mapping"):
        pyppo.evaluate(result.policy, env_options="fast")


def cartpole_policy(options):
    obs_space = spaces.Dict({"obs": spaces.Box(-9.0, 9.0, (4,), np.float32)})
    metadata = {"env_id": "CartPole-v1", "env_options": options}
    return MLPPolicy(obs_space, Distribution.from_space(spaces.Discrete(2)), metadata=metadata)


def test_the_saved_options_are_used_without_those_for_training():
    pytest.importorskip("envpool")
    options = {"max_episode_steps": 7, "reward_clip": True}
    policy = cartpole_policy(options)
    group = make_group(policy, None, 2, 0)
    assert group.env._pool.config["max_episode_steps"] == 7
    group.close()
    elsewhere = make_group(policy, "CartPole-v0", 2, 0)
    assert elsewhere.env._pool.config["max_episode_steps"] == 200
    elsewhere.close()


def test_options_given_outright_are_used_as_they_are(monkeypatch):
    seen = []
    monkeypatch.setattr("pyppo.evaluation.make_envs", lambda *a, options, **k: seen.append(options) or Lengths())
    policy = policy_for(Lengths(), metadata={"env_id": "Pong-v5", "env_options": {"reward_clip": True, "noop_max": 3}})
    make_group(policy, None, 2, 0)
    make_group(policy, None, 2, 0, env_options={"reward_clip": True})
    assert seen == [{"noop_max": 3}, {"reward_clip": True}]


def test_an_environment_that_the_policy_does_not_fit():
    pytest.importorskip("envpool")
    policy = policy_for(Lengths())
    with pytest.raises(ValueError, match=r"Acrobot-v1 gives observations .*\(6,\).*trained on .*\(1,\)"):
        pyppo.evaluate(policy, "Acrobot-v1", episodes=1)


class Unsaid(Lengths):
    """Does not say how it resets; gives float64."""

    def __init__(self):
        super().__init__(num_envs=2)
        self.metadata = {}
        self.seeds = []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        obs, infos = super().reset(seed=seed)
        return obs.astype(np.float64), infos

    def step(self, actions):
        obs, *rest = super().step(actions)
        return obs.astype(np.float64), *rest


def test_a_ready_group_says_how_it_resets_and_is_seeded_for_evaluation():
    env = Unsaid()
    with pytest.raises(ValueError, match=r"pass EnvGroup\(env, autoreset_mode='next_step'\)"):
        pyppo.evaluate(policy_for(env), envs=env, episodes=2)
    result = pyppo.evaluate(policy_for(env), envs=EnvGroup(env, autoreset_mode="next_step"), episodes=2)
    assert result.lengths.tolist() == [1, 2]
    (seed,) = env.seeds
    assert seed % 2 == env_seed(0, "evaluate", 0, 0, 0) % 2 != env_seed(0, "train", 0, 0, 0) % 2


def test_the_policy_sees_the_dtypes_of_the_rollout_storage():
    class Noting(MLPPolicy):
        def act(self, obs, deterministic=False):
            dtypes.add(obs.dtype)
            return super().act(obs, deterministic)

    env, dtypes = Unsaid(), set()
    distribution = Distribution.from_space(env.single_action_space)
    policy = Noting(spaces.Dict({"obs": env.single_observation_space}), distribution)
    pyppo.evaluate(policy, envs=EnvGroup(env, autoreset_mode="next_step"), episodes=2)
    assert dtypes == {np.dtype(np.float32)}


def saved(path, policy):
    """A checkpoint folder alone, as it is after it was copied out of its run."""
    state = {"step": 1, "policy": checkpoint.policy_recipe(policy)}
    return checkpoint.save_checkpoint(path, policy.state_dict(), {}, state)


def test_a_checkpoint_folder_is_enough(tmp_path):
    pytest.importorskip("envpool")
    path = saved(tmp_path, cartpole_policy({"max_episode_steps": 5}))
    assert pyppo.evaluate(path, episodes=3).lengths.tolist() == [5, 5, 5]


def test_a_checkpoint_of_an_own_module_is_for_python(tmp_path):
    with pytest.raises(ValueError, match=r"holds a torch\.nn\..*Linear, a module of your own; evaluate it from Python"):
        pyppo.evaluate(saved(tmp_path, torch.nn.Linear(1, 1)))


@pytest.mark.parametrize(("name", "value"), [("num_envs", 4), ("env_options", {"max_episode_steps": 3})])
def test_what_is_envpools_is_refused_beside_environments_of_ones_own(name, value):
    with pytest.raises(ValueError, match=f"{name} is .* and envs is given; it must be None"):
        pyppo.evaluate(policy_for(Lengths()), envs=Lengths(), **{name: value})


@pytest.mark.parametrize(("seed", "kind"), [(-1, ValueError), (2**70, ValueError), ("x", TypeError), (True, TypeError)])
def test_a_seed_that_is_none_is_named(seed, kind):
    with pytest.raises(kind, match=f"seed is {seed!r}.*; it must be an integer from 0"):
        pyppo.evaluate(policy_for(Lengths()), envs=Lengths(), seed=seed)


def test_an_observation_that_is_not_finite_is_named():
    policy = policy_for(Lengths())
    shape = policy.obs_shapes["obs"]
    with pytest.raises(ValueError, match=r"obs\['obs'\] has nan; every number must be finite"):
        policy.act(np.full(shape, np.nan, np.float32))
