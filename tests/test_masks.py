"""Action masks: their forms, where they are found, and rows that allow nothing."""

import importlib.util
import os

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from scripted_envs import MaskedEnv

import pyppo
from pyppo.config import Config
from pyppo.envpool_envs import env_spaces, make_envs
from pyppo.envs import EnvGroup
from pyppo.masks import ActionMask, masks_in, policy_spaces
from pyppo.rollout import Collector, Rollout
from pyppo.stepping import choose
from pyppo.warmup import random_actions, random_rows

needs_envpool = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool is not installed")

MULTI = spaces.MultiDiscrete([2, 3])
INTEGERS = spaces.Box(np.array([1, 0], np.int16), np.array([2, 2], np.int16), dtype=np.int16)

# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "space", "width", "joint"),
    [
        ((3,), spaces.Discrete(3), 3, False),
        ((5,), MULTI, 5, False),
        ((2, 3), MULTI, 6, True),
        ((2, 3), INTEGERS, 6, True),
        ((2, 4), spaces.MultiDiscrete([4, 4]), 8, False),
        ((4, 4), spaces.MultiDiscrete([4, 4]), 16, True),
        ((2, 2), spaces.MultiDiscrete([2, 2]), 4, False),  # one component a row, not the combinations
        ((2, 2, 3), spaces.MultiDiscrete([[3, 3], [3, 3]]), 12, False),
        ((4,), spaces.MultiBinary(4), 4, False),
        ((2, 3), spaces.MultiBinary((2, 3)), 6, False),
    ],
)
def test_forms(shape, space, width, joint):
    mask = ActionMask(shape, space)
    assert (mask.width, mask.joint) == (width, joint)
    assert mask.action_space == (spaces.Discrete(width) if joint else space)
    raw = np.ones((5, *shape), np.int8)
    raw[:, (0,) * len(shape)] = 1
    read = mask.read(raw, None, 0)
    assert (read.shape, read.dtype) == ((5, width), bool)


@pytest.mark.parametrize(
    ("shape", "space", "message"),
    [
        ((4,), spaces.Discrete(3), r"action mask has shape \(4,\); it must be \(3,\) for .*Discrete\(3\)"),
        ((3, 1), spaces.Discrete(3), r"shape \(3, 1\); it must be \(3,\)"),
        ((3, 2), MULTI, r"shape \(3, 2\); it must be \(5,\) or \(2, 3\)"),
        ((3,), spaces.MultiBinary(4), r"it must be \(4,\)"),
        ((300, 300), spaces.MultiDiscrete([300, 301]), r"it must be \(601,\) or \(300, 301\)"),
        ((300, 301), spaces.MultiDiscrete([300, 301]), "90,300 combinations; there must be at most 65,536"),
    ],
)
def test_a_wrong_shape_says_what_it_must_be(shape, space, message):
    with pytest.raises(ValueError, match=message):
        ActionMask(shape, space)


def test_a_mask_of_continuous_actions_is_refused():
    with pytest.raises(TypeError, match=r"action space is Box.*; its actions must be finite"):
        ActionMask((2,), spaces.Box(-1.0, 1.0, (2,)))


def test_combinations_are_taken_apart():
    mask = ActionMask((2, 3), INTEGERS)
    sent = mask.to_env(np.arange(6))
    assert sent.tolist() == [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
    assert sent.dtype == np.int16
    allowed = np.zeros((1, 2, 3), bool)
    allowed[0, 1, 2] = True
    assert np.flatnonzero(mask.read(allowed, None, 0)[0]).tolist() == [5]


def test_rows_that_allow_nothing():
    mask = ActionMask((5,), MULTI, first_env=8)
    raw = np.array([[1, 0, 0, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="environment 9 allows no action at step 7: .* only False for component 0"):
        mask.read(raw, None, 7)
    with pytest.raises(ValueError, match="environment 9 allows no action"):
        mask.read(raw, np.array([True, False, True]), 7)
    read = mask.read(raw, np.array([True, True, False]), 7)
    assert read.astype(int).tolist() == [[1, 0, 0, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert raw[1].tolist() == [0, 0, 1, 1, 1]  # the environment's own array stays
    with pytest.raises(ValueError, match="environment 0 allows no action at step 0: .* only False, 3 times"):
        ActionMask((3,), spaces.Discrete(3)).read(np.zeros((1, 3), bool), None, 0)
    assert not ActionMask((3,), spaces.MultiBinary(3)).read(np.zeros((1, 3), bool), None, 0).any()  # all bits are 0


def test_a_mask_of_logits_is_refused():
    with pytest.raises(
        ValueError, match="environment 0 gave an action mask with -inf at step 2; it must hold 1 or True"
    ):
        ActionMask((3,), spaces.Discrete(3)).read(np.array([[0.0, -np.inf, 0.0]]), None, 2)


def test_policy_spaces():
    both = spaces.Dict(action_mask=spaces.MultiBinary((2, 3)), board=spaces.Box(0, 1, (4,)))
    obs_space, action_space, _ = policy_spaces(both, MULTI)
    assert obs_space == spaces.Dict(action_mask=spaces.MultiBinary(6), board=spaces.Box(0, 1, (4,)))
    assert action_space == spaces.Discrete(6)
    parts = spaces.Dict(action_mask=spaces.Tuple([spaces.MultiBinary(2), spaces.MultiBinary(3)]), x=spaces.Discrete(2))
    assert policy_spaces(parts, MULTI)[0]["action_mask"] == spaces.MultiBinary(5)
    with pytest.raises(ValueError, match="has only an action mask"):
        policy_spaces(spaces.Dict(action_mask=spaces.MultiBinary(5)), MULTI)


@pytest.mark.parametrize("space", [spaces.Discrete(4, start=2), MULTI, INTEGERS, spaces.MultiBinary(3)])
def test_random_actions_keep_to_the_mask(space):
    rng = np.random.default_rng(0)
    width = ActionMask((3,) if isinstance(space, spaces.MultiBinary) else (4 if space.shape == () else 5,), space).width
    mask = rng.random((500, width)) < 0.5
    mask[:, [0, width - 1]] |= True
    actions = random_actions(space, 500, rng, mask)
    assert all(action in space for action in actions)
    if isinstance(space, spaces.MultiBinary):
        assert not (actions & ~mask).any()
        return
    low = np.array([2]) if space.shape == () else np.asarray(space.low if isinstance(space, spaces.Box) else [0, 0])
    index = actions.reshape(500, -1) - low + np.array([0, 2])[: low.size]
    assert np.take_along_axis(mask, index, axis=1).all()
    used = np.zeros_like(mask)
    np.put_along_axis(used, index, True, axis=1)
    assert used.any(axis=0).all()  # every choice is made now and then


# --- in environments --------------------------------------------------------------------------------------------------


def allowed_act(rollout, t, rows):
    """The first allowed action."""
    return rollout.obs["action_mask"][t, rows].int().argmax(1).numpy()


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("where", ["obs", "action_mask", "legal_action_mask"])
def test_masks_in_every_autoreset_mode(where, mode, kind):
    if kind is AsyncVectorEnv and (mode != AutoresetMode.NEXT_STEP or where == "legal_action_mask"):
        pytest.skip("as the others")
    env = kind([lambda: MaskedEnv(where)] * 2, autoreset_mode=mode)
    group = EnvGroup(env)
    name = "place" if where == "obs" else "obs"
    assert group.obs_space == spaces.Dict({"action_mask": spaces.MultiBinary(4), name: spaces.Discrete(4)})
    rollout = Rollout(9, 2, group.obs_space, group.action_space, same_step=group.autoreset == "same_step")
    values = []
    collector = Collector([group], rollout, allowed_act, lambda obs: values.append(obs) or torch.zeros(len(obs[name])))
    collector.reset(seed=1)
    for _ in range(2):
        collector.collect()  # the environment refuses what its mask forbids
        mask, place = rollout.obs["action_mask"], rollout.obs[name]
        assert (mask.dtype, mask.shape) == (torch.bool, (10, 2, 4))
        expected = torch.nn.functional.one_hot(place.long(), 4).bool()
        expected[place == 3] = True  # nothing is allowed there, and the action is ignored
        assert torch.equal(mask, expected)
    assert len(collector.episodes) >= 8
    group.close()


def test_masks_reach_warm_up_trial_and_final_values():
    group = EnvGroup(SyncVectorEnv([lambda: MaskedEnv("obs")] * 2))
    assert random_rows([group], 50, seed=1)["action_mask"].sum(axis=1).max() == 1  # the environment refuses others

    class Cut(MaskedEnv):
        def step(self, action):
            obs, reward, ended, _, info = super().step(action)
            return obs, reward, False, ended, info

    group = EnvGroup(SyncVectorEnv([Cut], autoreset_mode=AutoresetMode.SAME_STEP))
    rollout = Rollout(4, 1, group.obs_space, group.action_space, same_step=True)
    seen = []
    collector = Collector([group], rollout, allowed_act, lambda obs: seen.append(obs) or torch.zeros(1))
    collector.reset()
    collector.collect()
    assert seen[0]["action_mask"].tolist() == [[True] * 4]
    assert seen[0]["action_mask"].dtype == torch.bool


def test_what_a_masked_environment_can_get_wrong():
    class Blocked(MaskedEnv):
        def observe(self):
            obs, info = super().observe()
            return (
                dict(obs, action_mask=obs["action_mask"] * (self.elapsed != 1)) if self.where == "obs" else obs
            ), info

    group = EnvGroup(SyncVectorEnv([lambda: MaskedEnv("obs"), lambda: Blocked("obs")]), first_env=4)
    group.reset()
    group.send(np.array([0, 0]))
    with pytest.raises(ValueError, match="environment 5 allows no action at step 1: its action mask has only False, 4"):
        group.recv()

    class Forgetful(MaskedEnv):
        def observe(self):
            obs, info = super().observe()
            return obs, {} if self.elapsed == 1 else info

    group = EnvGroup(SyncVectorEnv([lambda: MaskedEnv("action_mask"), lambda: Forgetful("action_mask")]))
    group.reset()
    group.send(np.array([0, 0]))
    with pytest.raises(ValueError, match="environment 1 gave no 'action_mask' in its info at step 1"):
        group.recv()
    group = EnvGroup(SyncVectorEnv([lambda: Forgetful("action_mask")]))
    group.reset()
    group.send(np.array([0]))
    with pytest.raises(ValueError, match="infos has no 'action_mask' at step 1"):
        group.recv()


def test_a_mask_in_the_infos_of_an_own_vector_environment_is_asked_about():
    class Own(probes.TruncationOnly):
        def reset(self, **how):
            return super().reset(**how)[0], {"action_mask": np.ones((self.num_envs, 2), bool)}

        def step(self, actions):
            *batch, infos = super().step(actions)
            return *batch, {**infos, "action_mask": np.ones((self.num_envs, 2), bool)}

    group = EnvGroup(Own(num_envs=2))
    assert list(group.obs_space) == ["obs"]
    with pytest.raises(ValueError, match=r"infos of Own has an action mask\. Shall it be used\?"):
        group.reset()
    assert list(EnvGroup(Own(num_envs=2), mask_in_infos=False).reset()) == ["obs"]
    group = EnvGroup(Own(num_envs=2), mask_in_infos=True)
    assert list(group.obs_space) == ["action_mask", "obs"]
    assert group.reset()["action_mask"].shape == (2, 2)
    with pytest.raises(ValueError, match="infos has .*; it must have 'action_mask' or 'legal_action_mask'"):
        EnvGroup(probes.TruncationOnly(), mask_in_infos=True).reset()


class Masked(torch.nn.Module):
    """A policy of a user's own that keeps to the mask."""

    def __init__(self, features, actions):
        super().__init__()
        self.actor, self.critic = torch.nn.Linear(features, actions), torch.nn.Linear(features, 1)
        self.seen = []

    def heads(self, obs):
        x = torch.nn.functional.one_hot(obs["place"].long(), self.actor.in_features).float()
        return {"logits": self.actor(x), "action_mask": obs["action_mask"]}, self.critic(x).squeeze(1)

    def evaluate(self, obs, actions, state=None):
        raise AssertionError("a policy with heads is not asked")

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        tensors = {name: torch.as_tensor(x) for name, x in obs.items()}
        params, _ = self.heads(tensors)
        return params["logits"].masked_fill(~params["action_mask"], -torch.inf).argmax(1).numpy()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_training_and_evaluation_keep_to_the_mask(mode):
    config = Config("masked", total_timesteps=200, num_steps=16, num_minibatches=2, update_epochs=1, run_dir=None)
    envs = SyncVectorEnv([lambda: MaskedEnv("obs")] * 3, autoreset_mode=mode)
    with pyppo.Trainer(config, envs=envs, policy=Masked(4, 4), quiet=True) as trainer:
        result = trainer.train()
    assert result.history["episode_return"][-1] == 3.0
    assert pyppo.evaluate(result.policy, envs=envs, episodes=6).lengths.tolist() == [3] * 6


# --- EnvPool's --------------------------------------------------------------------------------------------------------


@needs_envpool
@pytest.mark.parametrize(
    ("env_id", "actions"), [("Maze-v0", 4), ("Play2048-v1", 4), ("Connector-v2", 50), ("BinPack-v2", 800)]
)
def test_envpool_masks(env_id, actions):
    group = EnvGroup(make_envs(env_id, 3, seed=1))
    obs_space, action_space = env_spaces(env_id)
    assert (group.obs_space, group.action_space) == (obs_space, action_space)
    assert obs_space["action_mask"] == spaces.MultiBinary(actions)
    rng = np.random.default_rng(0)

    def act(rollout, t, rows):
        mask = rollout.obs["action_mask"][t, rows].numpy()
        return random_actions(action_space, len(mask), rng, mask)

    rollout = Rollout(120, 3, obs_space, action_space)
    collector = Collector([group], rollout, act)
    collector.reset()
    for _ in range(2):
        collector.collect()
    assert len(collector.episodes) >= 3
    mask = rollout.obs["action_mask"][:-1][rollout.valid]
    assert mask.any(1).all()
    assert not mask.all()
    # What the thin receiver wrote is what the plain way gives.
    plain = EnvGroup(make_envs(env_id, 3, seed=1))
    again = EnvGroup(make_envs(env_id, 3, seed=1))
    rollout = Rollout(30, 3, obs_space, action_space)
    sent = []
    rng = np.random.default_rng(1)
    collector = Collector([again], rollout, lambda *given: sent.append(act(*given)) or sent[-1])
    collector.reset()
    collector.collect()
    obs = plain.reset()
    for t in range(30):
        for name, x in obs.items():
            np.testing.assert_array_equal(rollout.obs[name][t].numpy(), x)
        plain.send(sent[t])
        obs = plain.recv().obs


@needs_envpool
def test_the_stepping_trial_keeps_to_the_mask(monkeypatch):
    kept, last = [], {}
    read, to_env = ActionMask.read, ActionMask.to_env

    def noted(self, *given):
        last[self] = read(self, *given).copy()
        return last[self]

    def checked(self, actions):
        kept.append(last[self][np.arange(len(actions)), actions].all())
        return to_env(self, actions)

    monkeypatch.setattr(ActionMask, "read", noted)
    monkeypatch.setattr(ActionMask, "to_env", checked)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    config = Config("BinPack-v2", num_envs=4, num_steps=8, env_threads=1, num_groups=1, num_minibatches=1)
    stepping = choose(config, None, allow_groups=False)
    assert len(kept) > 100
    assert all(kept)
    assert stepping.rows_per_second


class Sometimes(gym.Env):
    """Gives its mask in the infos, but not with the last step of an episode; may end it with NaN."""

    observation_space, action_space = spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Discrete(3)

    def __init__(self, last=0.0, masks=(3, 3)):
        self.last, self.widths = last, masks

    def _info(self, width):
        return {"action_mask": np.arange(width) != 1}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_count = 0
        return np.zeros(2, np.float32), self._info(self.widths[0])

    def step(self, action):
        assert action != 1  # what its mask forbids
        self.step_count += 1
        done = self.step_count == 3
        obs = np.full(2, self.last if done else 0.0, np.float32)
        return obs, 1.0, False, done, {} if done else self._info(self.widths[1])


def collector_of(env):
    group = EnvGroup(env)
    same = group.autoreset == "same_step"
    rollout = Rollout(8, env.num_envs, group.obs_space, group.action_space, same_step=same)
    collector = Collector([group], rollout, allowed_act, lambda obs: obs["obs"].sum(1))
    collector.reset(1)
    return collector


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_last_step_needs_no_mask(mode, num_envs):
    collector = collector_of(SyncVectorEnv([Sometimes] * num_envs, autoreset_mode=mode))
    collector.collect()
    collector.collect()
    assert {episode.length for episode in collector.episodes} == {3}


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_a_final_observation_must_be_finite(mode):
    collector = collector_of(SyncVectorEnv([Sometimes, lambda: Sometimes(np.nan)], autoreset_mode=mode))
    with pytest.raises(ValueError, match="environment 1 gave a final observation 'obs' that is not finite at step 2"):
        collector.collect()


def test_a_mask_that_changes_its_length_is_told():
    collector = collector_of(SyncVectorEnv([lambda: Sometimes(masks=(3, 2))] * 2))
    with pytest.raises(ValueError, match=r"step 1.* must (keep its shape|have 3 numbers a row)"):
        collector.collect()


def test_the_environment_without_a_mask_is_named_among_all_groups():
    infos = {"action_mask": np.ones((2, 3), bool), "_action_mask": np.array([True, False])}
    with pytest.raises(ValueError, match="environment 5 gave no 'action_mask' in its info at step 7"):
        masks_in(infos, "action_mask", 2, None, 7, first_env=4)
