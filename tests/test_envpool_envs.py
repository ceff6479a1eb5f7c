"""EnvPool's environments: the adapter, how they are made, and what is refused."""

import gc
import importlib.util
import os
import sys
import weakref

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import VectorEnv

import pyppo
from pyppo import Config
from pyppo.checkpoint import parameter_sha256
from pyppo.contract import Columns
from pyppo.envpool_envs import EnvPoolVectorEnv, auto_threads, list_envs, make_envs
from pyppo.envs import EnvGroup

needs_envpool = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool is not installed")


@needs_envpool
def test_cartpole_next_step_autoreset():
    pool = make_envs("CartPole-v1", 3, seed=1)
    assert isinstance(pool, VectorEnv)
    obs, _ = pool.reset()
    assert obs.shape == (3, 4)
    assert pool.observation_space.shape == (3, 4)
    done_rows = 0
    was_done = np.zeros(3, bool)
    for _ in range(100):
        obs, rewards, terminated, truncated, _ = pool.step(np.ones(3, np.int64))
        assert rewards[was_done].tolist() == [0.0] * was_done.sum()
        assert np.all(np.abs(obs[was_done]) <= 0.05)  # CartPole starts within 0.05
        assert np.all(np.abs(obs[terminated][:, 2]) > 0.2095 - 1e-3)  # the final observation: the pole has fallen
        assert not truncated.any()
        was_done = terminated
        done_rows += terminated.sum()
    assert done_rows > 15


@needs_envpool
def test_time_limit_is_truncation():
    pool = make_envs("Pendulum-v1", 2, seed=1, options={"max_episode_steps": 3})
    pool.reset()
    flags = [pool.step(np.zeros((2, 1), np.float32))[2:4] for _ in range(4)]
    assert [bool(terminated.any()) for terminated, _ in flags] == [False] * 4
    assert [truncated.tolist() for _, truncated in flags] == [[False] * 2] * 2 + [[True] * 2, [False] * 2]


def episode(pool, steps=5):
    observations = [pool.reset()[0]]
    for _ in range(steps):
        observations.append(pool.step(np.zeros(pool.num_envs, np.int64))[0])
    return np.stack(observations)


@needs_envpool
def test_seeds_make_the_trajectory_and_groups_share_them():
    whole = episode(make_envs("CartPole-v1", 4, seed=1))
    np.testing.assert_array_equal(whole, episode(make_envs("CartPole-v1", 4, seed=1, num_threads=2)))
    halves = [episode(make_envs("CartPole-v1", 2, seed=1, first_env=first)) for first in (0, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(halves, axis=1))
    starts = whole[0].tolist()
    for other in ({"seed": 2}, {"purpose": "evaluate"}, {"purpose": "warmup"}, {"rank": 1}, {"rebuild": 1}):
        pool = make_envs("CartPole-v1", 4, **{"seed": 1, **other})
        assert not any(row in starts for row in pool.reset()[0].tolist()), other


@needs_envpool
def test_every_steps_actions_are_checked():
    pool = make_envs("CartPole-v1", 2, seed=1)
    pool.reset()
    pool.step(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"actions\[1\] is 2"):
        pool.step(np.array([0, 2]))
    with pytest.raises(ValueError, match="shape"):
        EnvGroup(pool).send(np.array([0]))
    pool.step(np.array([0, 1]))


@needs_envpool
@pytest.mark.parametrize("one_core", [False, True])
@pytest.mark.parametrize("convert", [np.int8, np.uint8, np.int32, np.int64, lambda x: np.repeat(x, 2)[::2]])
def test_actions_of_any_integer_type_and_in_strides_step(convert, one_core):
    pool, other = make_envs("CartPole-v1", 3, seed=1), make_envs("CartPole-v1", 3, seed=1)
    pool.one_core = one_core
    pool.reset(), other.reset()
    for t in range(20):
        actions = np.array([t, t + 1, 1]) % 2
        np.testing.assert_array_equal(pool.step(convert(actions))[0], other.step(actions)[0])


@needs_envpool
def test_closed_environments_are_neither_waited_for_nor_kept():
    columns = Columns({"obs": np.zeros((2, 3, 4))}, np.zeros((1, 3)), *np.zeros((2, 1, 3), bool), None, None)
    pool = make_envs("CartPole-v1", 3, seed=1)
    receive, made = pool.receiver(columns), weakref.ref(pool._pool)
    pool.reset()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        receive(0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.send(np.ones(3, np.int64))
    gc.collect()
    assert made() is None


@needs_envpool
def test_the_actions_are_copied():
    pool, other = (make_envs("Pendulum-v1", 2, seed=1) for _ in range(2))
    pool.reset(), other.reset()
    actions = np.ones((2, 1), np.float32)
    pool.send(actions)
    actions[:] = -1
    np.testing.assert_array_equal(pool.recv()[0], other.step(np.ones((2, 1), np.float32))[0])


@needs_envpool
def test_float64_environments():
    pool = make_envs("HalfCheetah-v4", 2, seed=1)
    obs, infos = pool.reset()
    assert obs.dtype == np.float64
    assert "x_velocity" in infos
    _, rewards, _, _, infos = pool.step(np.zeros((2, 6), np.float32))
    assert rewards.shape == infos["x_velocity"].shape == (2,)


@needs_envpool
def test_refusals_of_make_envs():
    with pytest.raises(ValueError, match=r"env_id is 'CartPole'; it must be one of EnvPool's .*near: CartPole"):
        make_envs("CartPole", 2, seed=1)
    with pytest.raises(ValueError, match="options has 'seed'"):
        make_envs("CartPole-v1", 2, seed=1, options={"seed": 3})
    with pytest.raises(ValueError, match="num_envs is 0"):
        make_envs("CartPole-v1", 0, seed=1)
    with pytest.raises(ValueError, match=r"env_options has \{'foo': 2\}, which CartPole-v1 does not take"):
        make_envs("CartPole-v1", 1, seed=1, options={"foo": 2})


@needs_envpool
def test_refusals_of_the_adapter():
    import envpool

    pool = make_envs("CartPole-v1", 2, seed=1)
    with pytest.raises(ValueError, match="seed is 3; it must be None"):
        pool.reset(seed=3)
    with pytest.raises(ValueError, match="options is"):
        pool.reset(options={"a": 1})
    with pytest.raises(ValueError, match="batch_size 1; it must be num_envs = 2"):
        EnvPoolVectorEnv(envpool.make("CartPole-v1", env_type="gymnasium", num_envs=2, batch_size=1))
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.step(np.array([0, 0]))


@needs_envpool
def test_use_after_fork_is_an_error_not_a_hang(monkeypatch):
    pool = make_envs("CartPole-v1", 2, seed=1)
    pool.reset()
    process = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    with pytest.raises(RuntimeError, match="fork"):
        pool.step(np.array([0, 0]))


@needs_envpool
def test_auto_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert auto_threads("CartPole-v1", 64) == 1
    assert auto_threads("HalfCheetah-v4", 64) == 6
    assert auto_threads("HalfCheetah-v4", 4) == 4


@needs_envpool
def test_list_envs():
    names = list_envs()
    assert names == sorted(names)
    assert {"CartPole-v1", "HalfCheetah-v4", "Pong-v5"} <= set(names)


def test_missing_envpool_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"pyppo\[envpool\]"):
        make_envs("CartPole-v1", 2, seed=1)


@needs_envpool
def test_wrappers_compose():
    env = gym.wrappers.vector.TransformReward(make_envs("CartPole-v1", 2, seed=1), lambda rewards: rewards * 10)
    group = EnvGroup(env)
    group.reset(seed=5)
    group.send(np.array([0, 1]))
    assert group.recv().rewards.tolist() == [10.0, 10.0]
    with pytest.raises(ValueError, match=r"actions\[0\] is 7"):
        group.send(np.array([7, 0]))


# --- ends that are not finite -----------------------------------------------------------------------------------------


def breaking(cut=False):
    """CartPole whose episodes end in NaN: in themselves, or with `cut` after three steps, at their time limit."""
    pool = make_envs("CartPole-v1", 3, seed=1, options={"max_episode_steps": 3} if cut else None)
    receive = pool._recv

    def broken():
        state = list(receive())
        state[pool._plain_obs] = state[pool._plain_obs].copy()
        state[pool._plain_obs][state[pool._done]] = np.nan
        return state

    pool._recv = broken
    return pool


class Plain(EnvGroup):
    """Without a receiver, so that each step comes through `recv`."""

    def receiver(self, columns):
        return None


@needs_envpool
@pytest.mark.parametrize("how", [{"engine": "native"}, {"engine": "torch"}, {"norm_obs": True}])
def test_an_envpool_simulation_may_break_where_its_episode_terminates(how):
    config = Config("x", total_timesteps=192, num_steps=32, num_minibatches=1, run_dir=None, hidden_sizes=(8,), **how)
    ends = []
    for kind in (EnvGroup, Plain):
        with pyppo.Trainer(config, envs=kind(breaking()), quiet=True) as trainer:
            trainer.train()
            assert trainer.history["episodes"][-1] > 0
            rollout = trainer.rollout
            after = rollout.obs["obs"][1:]
            assert (after[rollout.terminated] == 0).all()
            assert after[~rollout.terminated].isfinite().all()
            ends.append(parameter_sha256(trainer.policy))
    assert ends[0] == ends[1]


@needs_envpool
@pytest.mark.parametrize("kind", [EnvGroup, Plain])
def test_an_envpool_episode_that_is_cut_off_must_end_with_numbers(kind):
    config = Config("x", total_timesteps=192, num_steps=32, num_minibatches=1, run_dir=None, hidden_sizes=(8,))
    with (
        pyppo.Trainer(config, envs=kind(breaking(cut=True)), quiet=True) as trainer,
        pytest.raises(FloatingPointError, match="gave an observation 'obs' that is not finite"),
    ):
        trainer.train()
