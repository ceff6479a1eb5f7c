"""Observation and action spaces: flattened, stored, held to; what is refused and what it says."""

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.envs import EnvGroup
from pyppo.rollout import Collector, Rollout
from pyppo.spaces import choices, dict_space, float_bounds
from pyppo.trainer import Trainer
from pyppo.warmup import random_actions

NESTED = spaces.Dict(
    agent=spaces.Dict(pos=spaces.Box(-1, 1, (2,), np.float64), room=spaces.Discrete(5, start=-2)),
    seen=spaces.Tuple([spaces.MultiBinary(3), spaces.MultiDiscrete([2, 9]), spaces.Box(0, 255, (2, 2), np.uint8)]),
    level=spaces.Box(0, 60000, (), np.uint16),
)
FLAT = {
    "agent/pos": ((2,), torch.float32),
    "agent/room": ((), torch.int64),
    "seen/0": ((3,), torch.int8),
    "seen/1": ((2,), torch.int64),
    "seen/2": ((2, 2), torch.uint8),
    "level": ((), torch.int32),
}


def test_nested_spaces_are_flattened_and_keep_what_they_say():
    flat = dict_space(NESTED)
    assert set(flat) == set(FLAT)
    assert flat["agent/room"] == spaces.Discrete(5, start=-2)
    assert flat["seen/1"] == spaces.MultiDiscrete([2, 9])
    assert dict_space(spaces.Discrete(4)) == spaces.Dict(obs=spaces.Discrete(4))
    assert list(dict_space(spaces.Tuple([BOX, BOX]))) == ["0", "1"]
    rollout = Rollout(3, 2, flat, spaces.Discrete(2))
    assert {name: (tuple(x.shape[2:]), x.dtype) for name, x in rollout.obs.items()} == FLAT


BOX = spaces.Box(0, 1, (2,))


@pytest.mark.parametrize(
    ("space", "error", "message"),
    [
        (spaces.Text(3), TypeError, "observation space 'obs' is Text"),
        (spaces.Dict(a=BOX, b=spaces.Dict(c=spaces.Sequence(BOX))), TypeError, "observation space 'b/c' is Sequence"),
        (spaces.Tuple([BOX, spaces.Graph(BOX, None)]), TypeError, "observation space '1' is Graph"),
        (spaces.OneOf([BOX, BOX]), TypeError, "observation space 'obs' is OneOf"),
        (spaces.Dict({"a/b": BOX, "a": spaces.Dict(b=BOX)}), ValueError, "two entries 'a/b'"),
        (spaces.Dict(), ValueError, "is empty; it must have at least one entry"),
    ],
)
def test_observation_spaces_that_are_refused(space, error, message):
    with pytest.raises(error, match=message):
        dict_space(space)


class Nested(gym.Env):
    """Samples of a space from its own generator; episodes of two steps."""

    action_space = spaces.Discrete(2)

    def __init__(self, space=NESTED):
        self.observation_space, self.elapsed = space, 0

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        self.elapsed = 0
        self.last = self.observation_space.sample()
        return self.last, {}

    def step(self, action):
        self.elapsed += 1
        self.last = self.observation_space.sample()
        return self.last, 1.0, False, self.elapsed == 2, {}


def leaves(sample):
    return {
        "agent/pos": sample["agent"]["pos"], "agent/room": sample["agent"]["room"], "seen/0": sample["seen"][0],
        "seen/1": sample["seen"][1], "seen/2": sample["seen"][2], "level": sample["level"],
    }  # fmt: skip


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_nested_observations_arrive_flat_and_stored(mode):
    single = Nested()
    env = SyncVectorEnv([lambda: single], autoreset_mode=mode)
    group = EnvGroup(env)
    rollout = Rollout(1, 1, group.obs_space, group.action_space, same_step=group.autoreset == "same_step")
    finals = []

    def final_value(obs):
        finals.append(obs)
        return torch.zeros(1)

    collector = Collector([group], rollout, lambda *_: np.zeros(1, np.int64), final_value)
    collector.reset(seed=1)
    for _ in range(5):
        before = single.last
        collector.collect()
        for at, sample in ((0, before), (1, single.last)):
            for name, x in leaves(sample).items():
                np.testing.assert_array_equal(rollout.obs[name][at, 0].numpy(), np.asarray(x, np.float32).astype(
                    rollout.obs[name].numpy().dtype))  # fmt: skip
    if group.autoreset == "same_step":
        assert {name: x.shape[1:] for name, x in finals[0].items()} == {k: shape for k, (shape, _) in FLAT.items()}
        assert not torch.equal(finals[0]["agent/pos"][0], rollout.obs["agent/pos"][1, 0])


@pytest.mark.parametrize("space", [spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(3), spaces.Discrete(5)])
def test_plain_spaces_of_integers_are_observed(space):
    group = EnvGroup(SyncVectorEnv([lambda: Nested(space)] * 2))
    obs = group.reset(seed=1)["obs"]
    assert obs.shape == (2, *space.shape)
    config = Config("plain", total_timesteps=40, num_steps=8, num_minibatches=1, run_dir=None, norm_obs=True)
    with Trainer(config, envs=group, quiet=True) as trainer:
        assert trainer.train().history["step"][-1] >= 40


# --- what must not change ---------------------------------------------------------------------------------------------


class Changing(probes.TruncationOnly):
    """Gives something else from its second step on."""

    def __init__(self, change):
        super().__init__(num_envs=2)
        self.change, self.count = change, 0

    def step(self, actions):
        obs, *rest = super().step(actions)
        self.count += 1
        return (self.change(obs) if self.count >= 2 else obs), *rest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: obs[:, :, None], r"'obs' changed at step 2: it was float32 \(2, 1\) and is float32 \(2, 1, 1\)"),
        (lambda obs: obs[0], r"it was float32 \(2, 1\) and is float32 \(1,\); its shape and dtype must stay the same"),
        (lambda obs: obs.astype(np.float64), r"it was float32 \(2, 1\) and is float64 \(2, 1\)"),
        (lambda obs: obs.tolist(), "and is a list"),
        (lambda obs: {"obs": obs}, "and is a dict"),
    ],
)
def test_an_environment_that_changes_its_observations_says_so(change, message):
    config = Config("changing", total_timesteps=40, num_steps=8, num_minibatches=1, run_dir=None)
    with Trainer(config, envs=Changing(change), quiet=True) as trainer, pytest.raises(ValueError, match=message):
        trainer.train()


def test_an_environment_that_changes_the_shape_of_its_rewards_says_so():
    class Odd(probes.TruncationOnly):
        def step(self, actions):
            obs, rewards, *rest = super().step(actions)
            return obs, rewards[:1], *rest

    group = EnvGroup(Odd(num_envs=2))
    group.reset()
    group.send(np.zeros(2, np.int64))
    with pytest.raises(ValueError, match=r"rewards has shape \(1,\); it must be \(2,\)"):
        group.recv()


def test_one_gymnasium_environment_that_changes_is_named():
    class Growing(Nested):
        def step(self, action):
            _, *rest = super().step(action)
            return np.zeros(7, np.float32), *rest

    box = spaces.Box(-1, 1, (2,))
    group = EnvGroup(SyncVectorEnv([lambda: Nested(box), lambda: Growing(box)]))
    group.reset()
    group.send(np.zeros(2, np.int64))
    with pytest.raises(
        ValueError, match=r"environment 1 gave observation 'obs' as float32 \(7,\); it must be float32 \(2,"
    ):
        group.recv()

    class Missing(Nested):
        def reset(self, **how):
            obs, info = super().reset(**how)
            return {"agent": obs["agent"]}, info

    group = EnvGroup(SyncVectorEnv([Missing]), mask_in_infos=False)
    with pytest.raises(ValueError, match="environment 0 gave an observation without 'seen/0'"):
        group.reset()


@pytest.mark.parametrize(
    ("shared_memory", "size", "message"),
    [
        (
            True,
            3,
            r"AsyncVectorEnv failed at step 1: could not broadcast .*\(3,\) into shape \(2,\)\. What an environment",
        ),
        (False, 1, "AsyncVectorEnv failed at step 1: Output array is the wrong shape. What an environment gives"),
    ],
)
def test_environments_in_processes_that_change_say_so(shared_memory, size, message):
    class Other(Nested):
        def step(self, action):
            _, *rest = super().step(action)
            return np.zeros(size, np.float32), *rest

    envs = AsyncVectorEnv([lambda: Other(spaces.Box(-1, 1, (2,)))], shared_memory=shared_memory)
    group = EnvGroup(envs, mask_in_infos=False)
    group.reset()
    group.send(np.zeros(1, np.int64))
    with pytest.raises(ValueError, match=message):
        group.recv()
    envs.close(terminate=True)


def test_an_exception_of_the_environment_itself_is_left_alone():
    class Broken(Nested):
        def step(self, action):
            raise ZeroDivisionError("its own")

    group = EnvGroup(SyncVectorEnv([Broken]))
    group.reset()
    group.send(np.zeros(1, np.int64))
    with pytest.raises(ZeroDivisionError, match="its own"):
        group.recv()


def test_values_outside_of_a_discrete_space_are_named():
    class Outside(probes.TruncationOnly):
        def __init__(self, value):
            super().__init__(num_envs=2)
            self.single_observation_space, self.value = spaces.Discrete(3, start=1), value

        def reset(self, **how):
            return np.array([1, 2]), {}

        def step(self, actions):
            return np.array([3, self.value]), *super().step(actions)[1:]

    for value in (0, 4):
        group = EnvGroup(Outside(value), first_env=2)
        group.reset()
        group.send(np.zeros(2, np.int64))
        with pytest.raises(
            ValueError, match=rf"environment 3 gave observation 'obs' as {value}; it must lie in Discrete"
        ):
            group.recv()


def test_floats_for_integers_are_refused():
    class Floats(probes.TruncationOnly):
        def __init__(self):
            super().__init__(num_envs=2)
            self.single_observation_space = spaces.Box(0, 255, (1,), np.uint8)

    with pytest.raises(TypeError, match="observation 'obs' is a ndarray of float32; it must be a NumPy array of uint8"):
        EnvGroup(Floats()).reset()


# --- actions ----------------------------------------------------------------------------------------------------------

ACTIONS = [
    spaces.Box(np.array([-1, 3], np.int32), np.array([1, 9], np.int32), dtype=np.int32),
    spaces.Box(0, 3, (2, 2), np.int8),
    spaces.Box(5, 8, (), np.int64),
    spaces.MultiDiscrete([[2, 3], [4, 5]]),
    spaces.MultiDiscrete([2, 3], start=[4, 5]),
    spaces.MultiBinary((2, 2)),
    spaces.Box(-1.0, 1.0, (2, 2)),
    spaces.Discrete(3, start=4),
]


class Taking(probes.TruncationOnly):
    """Refuses what is not in its action space."""

    def step(self, actions):
        assert all(action in self.single_action_space for action in actions), actions
        return super().step(actions)


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("space", ACTIONS, ids=str)
def test_every_action_space_trains(space, engine):
    config = Config("taking", total_timesteps=60, num_steps=8, num_minibatches=2, update_epochs=2, run_dir=None,
                    engine=engine)  # fmt: skip
    env = Taking(num_envs=4, action_space=space)
    with Trainer(config, envs=env, quiet=True) as trainer:
        trainer.train()
        assert trainer.rollout.actions.shape == (8, 4, *space.shape)
        acted = trainer.policy.act(np.zeros((5, 1), np.float32))
        assert all(action in space for action in acted)
        assert acted.dtype == space.dtype


def test_a_box_of_integers_is_multi_categorical():
    distribution = Distribution.from_space(ACTIONS[0])
    assert (distribution.kind, distribution.nvec, distribution.start) == ("multi_categorical", (3, 7), (-1, 3))
    assert distribution.to_env(np.array([[0, 0], [2, 6]])).tolist() == [[-1, 3], [1, 9]]
    assert Distribution.from_space(ACTIONS[2]).kind == "categorical"
    assert Distribution.from_dict(distribution.to_dict()).to_dict() == distribution.to_dict()


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (spaces.Box(np.iinfo(np.int32).min, np.iinfo(np.int32).max, (1,), np.int32), "4,294,967,296"),
        (spaces.Box(0, 2**16, (1,), np.int64), "65,537"),
        (spaces.Discrete(10**9), "1,000,000,000"),
        (spaces.MultiDiscrete([2**15, 2**15 + 1]), "65,537"),
    ],
)
def test_too_many_choices_are_refused(space, size):
    for use in (choices, Distribution.from_space, lambda space: EnvGroup(probes.ConstantReward(action_space=space))):
        with pytest.raises(ValueError, match=rf"action space .* has {size} choices in all; it must have 1 to 65,536"):
            use(space)


def test_limits_that_are_only_the_types_are_no_bounds():
    smallest, largest = np.finfo(np.float64).tiny, np.finfo(np.float64).max
    space = spaces.Box(np.array([smallest, smallest, -1.0]), np.array([largest, 1.0, 1.0]), dtype=np.float64)
    low, high = float_bounds(space)
    assert low.tolist() == [-np.inf, smallest, -1.0]  # the second one is bounded above, so its limit is meant
    assert high.tolist() == [np.inf, 1.0, 1.0]
    actions = random_actions(space, 400, np.random.default_rng(0))
    assert actions[:, 0].min() < -0.5
    assert (actions[:, 1:] <= 1.0).all()
