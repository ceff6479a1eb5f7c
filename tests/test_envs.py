"""The environment contract: seeds, action checks, and the face over any vector environment."""

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

import pyppo
from pyppo.config import Config
from pyppo.contract import finite_ends
from pyppo.envs import ActionCheck, EnvGroup, env_seed
from pyppo.own_envs import as_group, as_groups

# --- seeds ------------------------------------------------------------------------------------------------------------


def test_seeds_do_not_repeat():
    seeds = {
        purpose: {
            env_seed(seed, purpose, rank, environment, rebuild)
            for seed in (0, 1, 2)
            for rank in (0, 1)
            for environment in range(16)
            for rebuild in (0, 1)
        }
        for purpose in ("train", "evaluate", "warmup")
    }
    assert all(len(group) == 3 * 2 * 16 * 2 for group in seeds.values())
    assert not seeds["train"] & seeds["evaluate"] | seeds["train"] & seeds["warmup"]
    assert all(0 <= seed < 2**31 for group in seeds.values() for seed in group)


def test_training_and_evaluation_share_none_by_construction():
    assert {env_seed(s, "train", 0, 0, 0) % 4 for s in range(100)} == {0}
    assert {env_seed(s, "evaluate", 0, 0, 0) % 4 for s in range(100)} == {1}


def test_seeds_are_the_same_on_every_machine():
    assert env_seed(1, "train", 0, 0, 0) == 735796596


def test_unknown_purpose():
    with pytest.raises(ValueError, match="purpose is 'test'; it must be one of 'train', 'evaluate', 'warmup'"):
        env_seed(1, "test", 0, 0, 0)


# --- action checks ----------------------------------------------------------------------------------------------------

DISCRETE, SHIFTED = spaces.Discrete(3), spaces.Discrete(3, start=5)
MULTI, BINARY = spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)
INTEGERS = spaces.Box(np.array([-1, 3], np.int32), np.array([1, 4], np.int32), dtype=np.int32)
SQUARE = spaces.MultiDiscrete([[2, 3], [4, 5]])
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
UNEVEN = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32))
SMALLEST = spaces.Box(float(np.finfo(np.float64).tiny), np.finfo(np.float64).max, (1,), np.float64)  # EnvPool's limits
UNBOUNDED = spaces.Box(-np.inf, np.inf, (1,), np.float64)
TYPE_LIMITS = spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (1,), np.float32)
TIGHT = spaces.Box(-0.4, 0.4, (1,), np.float64)

GOOD_ACTIONS = [
    (DISCRETE, np.array([0, 2])),
    (DISCRETE, np.array([0, 2], np.int32)),
    (DISCRETE, np.array([0, 2], np.uint8)),
    (SHIFTED, np.array([5, 7])),
    (MULTI, np.array([[0, 0], [1, 2]])),
    (BINARY, np.array([[0, 1], [1, 1]])),
    (BINARY, np.array([[False, True], [True, True]])),
    (BOX, np.array([[-1, 1], [0, 0.5]], np.float32)),
    (UNEVEN, np.array([[-1, 5], [1, 0.0]])),
    (UNBOUNDED, np.array([[1e30], [-1e30]])),
    (TYPE_LIMITS, np.array([[1e30], [-1e30]], np.float32)),
    (TIGHT, np.array([[0.4], [-0.4]], np.float32).astype(np.float64)),  # the bound, rounded up to float32
    (SMALLEST, np.array([[0.0], [-5.0]])),
    (INTEGERS, np.array([[-1, 3], [1, 4]])),
    (SQUARE, np.array([[[0, 0], [0, 0]], [[1, 2], [3, 4]]])),
    (spaces.MultiBinary((2, 2)), np.ones((2, 2, 2), np.int8)),
    (spaces.Box(2, 5, (), np.int16), np.array([2, 5])),
]

BAD_ACTIONS = [
    (DISCRETE, np.array([0, 3]), ValueError, r"actions\[1\] is 3"),
    (DISCRETE, np.array([-1, 0]), ValueError, r"actions\[0\] is -1"),
    (DISCRETE, np.array([-1, 0], np.int8), ValueError, r"actions\[0\] is -1"),
    (DISCRETE, np.array([0]), ValueError, r"actions has shape \(1,\); it must be \(2,\)"),
    (DISCRETE, np.array([[0], [1]]), ValueError, r"actions has shape \(2, 1\)"),
    (DISCRETE, np.array([0.0, 1.0]), TypeError, "actions has dtype float64; it must be an integer type"),
    (DISCRETE, np.array([True, False]), TypeError, "actions has dtype bool"),
    (DISCRETE, [0, 1], TypeError, "actions is a list"),
    (SHIFTED, np.array([4, 5]), ValueError, r"actions\[0\] is 4"),
    (SHIFTED, np.array([7, 8]), ValueError, r"actions\[1\] is 8"),
    (MULTI, np.array([[0, 0], [2, 0]]), ValueError, r"actions\[1\] is \[2 0\]"),
    (BINARY, np.array([[0, 2], [0, 0]]), ValueError, r"actions\[0\] is \[0 2\]"),
    (BOX, np.array([[0, 1.01], [0, 0]]), ValueError, r"actions\[0\]"),
    (BOX, np.array([[0, 0], [0, np.nan]]), ValueError, r"actions\[1\].*finite"),
    (BOX, np.array([[0, 0], [-np.inf, 0]]), ValueError, r"actions\[1\]"),
    (BOX, np.zeros((2, 2), int), TypeError, "it must be floating point"),
    (BOX, np.zeros((2, 3)), ValueError, "shape"),
    (UNEVEN, np.array([[0, -0.1], [0, 0]]), ValueError, r"actions\[0\]"),
    (UNEVEN, np.array([[0, 0], [0, np.nan]]), ValueError, r"actions\[1\]"),
    (UNBOUNDED, np.array([[np.nan], [0]]), ValueError, r"actions\[0\]"),
    (UNBOUNDED, np.array([[0], [np.inf]]), ValueError, r"actions\[1\]"),
    (TIGHT, np.array([[0.41], [0]]), ValueError, r"actions\[0\]"),
    (INTEGERS, np.array([[-1, 3], [1, 5]]), ValueError, r"actions\[1\] is \[1 5\]"),
    (INTEGERS, np.zeros((2, 2)), TypeError, "it must be an integer type"),
    (SQUARE, np.array([[[0, 0], [0, 0]], [[1, 3], [3, 4]]]), ValueError, r"actions\[1\]"),
]


@pytest.mark.parametrize(("space", "actions"), GOOD_ACTIONS)
def test_good_actions_pass(space, actions):
    ActionCheck(space, 2)(actions)


@pytest.mark.parametrize(("space", "actions", "error", "message"), BAD_ACTIONS)
def test_bad_actions_are_named(space, actions, error, message):
    with pytest.raises(error, match=message):
        ActionCheck(space, 2)(actions)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(5),
        spaces.Tuple([DISCRETE]),
        spaces.Dict(a=DISCRETE),
        spaces.Box(0.0, 1.0, ()),
    ],
)
def test_unsupported_action_spaces_are_named(space):
    with pytest.raises(TypeError, match=r"(?s)action space .* is not supported; it must be Discrete"):
        ActionCheck(space, 2)


# --- EnvGroup ---------------------------------------------------------------------------------------------------------


class Silent(probes.ConstantReward):
    """Says nothing about its autoreset mode, or what it is told to."""

    def __init__(self, mode=None, obs_space=None):
        super().__init__(num_envs=2)
        self.metadata = {} if mode is None else {"autoreset_mode": mode}
        self.single_observation_space = obs_space or self.single_observation_space


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, "NextStep", "next_step"])
def test_autoreset_mode_is_read(mode):
    assert EnvGroup(Silent(mode)).autoreset == "next_step"
    assert EnvGroup(Silent(), autoreset_mode="next_step").autoreset == "next_step"
    assert EnvGroup(Silent(AutoresetMode.SAME_STEP)).autoreset == "same_step"
    disabled = EnvGroup(Silent(AutoresetMode.DISABLED))
    assert (disabled.autoreset_mode, disabled.autoreset) == ("disabled", "same_step")


def test_an_unsaid_autoreset_mode_is_asked_for():
    with pytest.raises(ValueError, match=r"Silent does not say .*\?") as error:
        EnvGroup(Silent())
    assert "EnvGroup(env, autoreset_mode='next_step')" in str(error.value)
    assert "EnvGroup(env, autoreset_mode='same_step')" in str(error.value)
    assert "autoreset_mode='disabled'" in str(error.value)
    with pytest.raises(ValueError, match="autoreset_mode is 'sometimes'; it must be"):
        EnvGroup(Silent(), autoreset_mode="sometimes")


def test_ready_groups_keep_their_mode_and_get_their_place():
    ready = EnvGroup(Silent(), autoreset_mode="same_step")
    groups = as_groups([Silent("next_step"), ready])
    assert [group.autoreset for group in groups] == ["next_step", "same_step"]
    assert [group.first_env for group in groups] == [0, 2]
    assert groups[1].env is ready.env
    assert as_groups(ready)[0].autoreset == "same_step"
    with pytest.raises(ValueError, match="envs is empty; it must be a gymnasium"):
        as_groups([])
    with pytest.raises(TypeError, match="envs is a str; it must be a gymnasium"):
        as_groups("CartPole-v1")


def test_refusals_of_the_group():
    with pytest.raises(TypeError, match="env is a CartPoleEnv; it must be a gymnasium.vector.VectorEnv"):
        EnvGroup(gym.make("CartPole-v1").unwrapped)
    with pytest.raises(ValueError, match=r"observation 'obs' has shape \(2, 1\); it must be \(2, 7\)"):
        EnvGroup(Silent("NextStep", spaces.Box(0, 1, (7,)))).reset()
    group = EnvGroup(Silent("NextStep"))
    group.reset()
    with pytest.raises(RuntimeError, match="recv was called before send"):
        group.recv()


class Answers(Silent):
    """One row; `step` gives what it was told to."""

    def __init__(self, **changes):
        super().__init__("NextStep")
        self.changes = changes

    def step(self, actions):
        given = {"obs": np.zeros((2, 1), np.float32), "rewards": np.zeros(2), "terminated": np.zeros(2, bool)}
        return tuple({**given, "truncated": np.zeros(2, bool), "infos": {}, **self.changes}.values())


WRONG_STEPS = [
    ({"rewards": [0.0, 0.0]}, TypeError, r"rewards is a list; it must be a NumPy array of numbers, \(2,\)"),
    ({"rewards": torch.zeros(2, requires_grad=True)}, TypeError, "rewards is a Tensor; it must be a NumPy array"),
    ({"rewards": np.zeros((2, 1))}, ValueError, r"rewards has shape \(2, 1\); it must be \(2,\)"),
    ({"rewards": np.array(["a", "b"])}, TypeError, "rewards has dtype <U1; it must be numbers"),
    ({"rewards": np.zeros(2, complex)}, TypeError, "rewards has dtype complex128; it must be numbers"),
    ({"terminated": False}, TypeError, "terminated is a bool; it must be a NumPy array of bool"),
    ({"terminated": np.zeros(2, np.float32)}, TypeError, "terminated has dtype float32; it must be bool"),
    ({"truncated": None}, TypeError, "truncated is a NoneType; it must be a NumPy array of bool"),
    (
        {"more": 1},
        TypeError,
        "step of Answers gave 6 values; it must give 5: obs, rewards, terminated, truncated, infos",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG_STEPS)
def test_what_a_step_must_not_give(changes, kind, message):
    group = EnvGroup(Answers(**changes))
    group.reset()
    group.send(np.zeros(2, np.int64))
    with pytest.raises(kind, match=message):
        group.recv()


def test_flags_of_integers_count():
    group = EnvGroup(Answers(terminated=np.array([0, 1], np.uint8)))
    group.reset()
    group.send(np.zeros(2, np.int64))
    assert group.recv().terminated.tolist() == [0, 1]


def test_a_reset_of_one_value_is_refused():
    class Old(Silent):
        def reset(self, *, seed=None, options=None):
            return np.zeros((2, 1), np.float32)

    with pytest.raises(TypeError, match="reset of Old gave a ndarray; it must give 2: obs, infos"):
        EnvGroup(Old("NextStep")).reset()


def gymnasium_envs(mode, kind=SyncVectorEnv, **kwargs):
    def make():
        return gym.make("CartPole-v1", max_episode_steps=9)

    return kind([make] * 3, autoreset_mode=mode, **kwargs)


@pytest.mark.parametrize(
    ("kind", "purpose"), [(SyncVectorEnv, "train"), (AsyncVectorEnv, "train"), (SyncVectorEnv, "evaluate")]
)
def test_gymnasium_environments_are_seeded_by_the_list(kind, purpose):
    group = EnvGroup(gymnasium_envs(AutoresetMode.NEXT_STEP, kind), first_env=4, purpose=purpose)
    first = group.reset(seed=1)["obs"].copy()
    np.testing.assert_array_equal(first, group.reset(seed=1)["obs"])
    for i, row in enumerate(first):
        expected, _ = gym.make("CartPole-v1").reset(seed=env_seed(1, purpose, 0, 4 + i, 0))
        np.testing.assert_array_equal(row, expected)
    group.close()


def test_same_step_final_observations():
    same, following = (EnvGroup(gymnasium_envs(mode)) for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP))
    same.reset(seed=1)
    following.reset(seed=1)
    for step in range(9):
        for group in (same, following):
            group.send(np.array([step % 2] * 3))
        same_step, next_step = same.recv(), following.recv()
        assert next_step.final_obs is None
        if step < 8:
            assert same_step.final_obs is None
    assert same_step.truncated.tolist() == next_step.truncated.tolist() == [True] * 3
    np.testing.assert_array_equal(same_step.final_obs["obs"], next_step.obs["obs"])
    assert not np.array_equal(same_step.obs["obs"], next_step.obs["obs"])


class DictEnv(gym.Env):
    """One step long; counts its episodes in both entries."""

    observation_space = spaces.Dict(a=spaces.Box(-9, 9, (2,)), b=spaces.Box(0, 9, (), np.uint8))
    action_space = DISCRETE

    def __init__(self):
        self.count = 0

    def reset(self, *, seed=None, options=None):
        self.count += 1
        return self._observe(), {}

    def step(self, action):
        self.count += 1
        return self._observe(), 1.0, False, True, {}

    def _observe(self):
        return {"a": np.full(2, self.count, np.float32), "b": np.array(self.count, np.uint8)}


def test_dict_observations():
    group = EnvGroup(SyncVectorEnv([DictEnv] * 2, autoreset_mode=AutoresetMode.SAME_STEP))
    obs = group.reset()
    assert (obs["a"].shape, obs["b"].tolist()) == ((2, 2), [1, 1])
    group.send(np.array([0, 1]))
    step = group.recv()
    assert step.final_obs["b"].tolist() == [2, 2]
    assert step.final_obs["a"].tolist() == [[2, 2], [2, 2]]
    assert step.obs["b"].tolist() == [3, 3]


def test_missing_final_obs_is_named():
    group = EnvGroup(Silent(AutoresetMode.SAME_STEP))
    group.reset()
    group.send(np.array([0, 0]))
    with pytest.raises(ValueError, match="infos has no 'final_obs'"):
        group.recv()


def test_final_obs_as_a_batch_takes_the_done_rows():
    group = EnvGroup(probes.Scripted([[(1, "T")], [(2, "C")], [(1, "C")]], same_step=True))
    group.reset()
    group.send(np.array([0, 0, 0]))
    assert group.recv().final_obs["obs"].tolist() == [[1.0], [2001.0]]


# --- groups of a user's own -------------------------------------------------------------------------------------------


class Doubling(EnvGroup):
    """Doubles the rewards."""

    def recv(self):
        step = super().recv()
        return step._replace(rewards=2 * step.rewards)


def test_a_group_of_a_subclass_is_used_as_it_is():
    mine, other = Doubling(probes.ConstantReward(num_envs=2)), Doubling(probes.ConstantReward(num_envs=3))
    assert as_groups([mine, other]) == [mine, other]
    assert (mine.first_env, other.first_env, other.purpose) == (0, 2, "train")
    assert as_group(mine, purpose="evaluate") is mine
    assert mine.purpose == "evaluate"
    plain = EnvGroup(probes.ConstantReward())
    assert as_group(plain) is not plain


def test_a_group_of_a_subclass_is_trained_and_evaluated_in():
    config = Config("mine", total_timesteps=32, num_steps=8, num_minibatches=1, run_dir=None, hidden_sizes=(8,))
    with pyppo.Trainer(config, envs=(mine := Doubling(probes.TruncationOnly(num_envs=2))), quiet=True) as trainer:
        result = trainer.train()
    plain = pyppo.evaluate(result.policy, envs=probes.TruncationOnly(num_envs=2), episodes=2)
    doubled = pyppo.evaluate(result.policy, envs=mine, episodes=2)
    assert plain.mean != 0
    assert doubled.mean == 2 * plain.mean
    assert result.history["episode_return"][-1] == doubled.mean
    assert mine.purpose == "train"  # as it was


# --- ends that are not finite -----------------------------------------------------------------------------------------


class Breaking(probes.TerminalReward):
    """What it observes at an episode's end is no number; in the middle, with `cut`, it says truncated."""

    cut = False

    def advance(self, actions):
        obs, rewards, terminated, truncated = super().advance(actions)
        obs[terminated] = np.nan
        return (obs, rewards, ~terminated & False, terminated) if self.cut else (obs, rewards, terminated, truncated)


@pytest.mark.parametrize("how", [{"engine": "native"}, {"engine": "torch"}, {"recurrent": "gru"}, {"norm_obs": True}])
@pytest.mark.parametrize("same_step", [False, True])
def test_a_simulation_may_break_where_its_episode_terminates(how, same_step):
    config = Config("x", total_timesteps=64, num_steps=16, num_minibatches=1, run_dir=None, hidden_sizes=(8,), **how)
    with pyppo.Trainer(config, envs=Breaking(num_envs=2, same_step=same_step), quiet=True) as trainer:
        result = trainer.train()
    assert np.isfinite(result.history["loss"]).all()
    assert result.history["episodes"][-1] > 0
    assert pyppo.evaluate(result.policy, envs=Breaking(num_envs=2, same_step=same_step), episodes=2).lengths.min() > 0


def test_ends_that_are_not_finite_become_0_and_nothing_else_does():
    x = np.array([[[1.0, np.nan]], [[np.inf, 2.0]], [[-np.inf, np.nan]]], np.float32)
    ended = np.array([True, False, True])
    found = finite_ends(x, ended)
    np.testing.assert_array_equal(found, np.array([[[1, 0]], [[np.inf, 2]], [[0, 0]]], np.float32))
    assert found.dtype == np.float32
    assert np.isnan(x[0, 0, 1])  # the environment's own array stays
    for as_it_is in (np.zeros((3, 2)), np.ones(3, np.uint8), np.zeros((3, 2), bool)):
        assert finite_ends(as_it_is, ended) is as_it_is
    np.testing.assert_array_equal(finite_ends(np.array([np.nan, np.nan, 1.0]), ended), [0, np.nan, 1])


def test_a_cut_off_episode_must_end_with_numbers():
    env = Breaking(num_envs=2)
    env.cut = True
    config = Config("x", total_timesteps=64, num_steps=16, num_minibatches=1, run_dir=None, hidden_sizes=(8,))
    with (
        pyppo.Trainer(config, envs=env, quiet=True) as trainer,
        pytest.raises(FloatingPointError, match="environment 0 gave an observation 'obs' that is not finite"),
    ):
        trainer.train()
