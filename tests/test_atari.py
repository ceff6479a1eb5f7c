"""Atari: what is reported is the game's raw return over all lives, what is trained on are lives and clipped rewards."""

import functools
import importlib.util

import numpy as np
import pytest
import torch

import pyppo
from pyppo.config import Config
from pyppo.envpool_envs import make_envs
from pyppo.envs import EnvGroup
from pyppo.rollout import Collector, Rollout

pytestmark = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool is not installed")

OPTIONS = {"episodic_life": True, "reward_clip": True, "noop_max": 1}
STEPS, N = 120, 2


def actions_of(seed):
    return np.random.default_rng(seed).integers(0, 4, size=(6 * STEPS, N))


@functools.cache
def games_by_hand():
    """Returns of whole games, from EnvPool's own infos, and how many lives were lost; a reset row has no reward."""
    pool, actions = make_envs("Breakout-v5", N, seed=1, options=OPTIONS), actions_of(0)
    pool.reset()
    totals, lengths, games, lives_lost = np.zeros(N), np.zeros(N, int), [], 0
    reset_row = np.zeros(N, bool)
    for step in actions:
        _, rewards, terminated, truncated, infos = pool.step(step)
        assert np.abs(rewards).max() <= 1.0
        totals += np.where(reset_row, 0.0, infos["reward"])
        lengths += ~reset_row
        over = infos["terminated"].astype(bool) | truncated
        lives_lost += int((terminated & ~over).sum())
        for row in np.flatnonzero(over & ~reset_row):
            games.append((totals[row], lengths[row]))
            totals[row], lengths[row] = 0.0, 0
        reset_row = terminated | truncated
    return games, lives_lost


@pytest.mark.parametrize("receiver", [True, False])
def test_reported_episodes_are_games(receiver):
    actions = actions_of(0)
    games, lives_lost = games_by_hand()
    assert len(games) >= 2
    assert lives_lost >= 3 * len(games)

    class Plain(EnvGroup):
        def recv(self):  # a group that changes `recv` gets no thinner one
            return super().recv()

    group = (EnvGroup if receiver else Plain)(make_envs("Breakout-v5", N, seed=1, options=OPTIONS))
    assert group.reports_games
    rollout = Rollout(STEPS, N, group.obs_space, group.action_space)
    sent = iter(actions)
    collector = Collector([group], rollout, lambda *_: next(sent))
    collector.reset()
    assert rollout.obs["obs"].dtype == torch.uint8
    ends = 0
    for _ in range(6):
        collector.collect()
        ends += int(rollout.terminated.sum())
        assert rollout.rewards.abs().max() <= 1.0
    assert [(episode.episode_return, episode.length) for episode in collector.episodes] == games
    assert ends == lives_lost + len(games)
    assert max(total for total, _ in games) > 1.0


def test_evaluation_plays_whole_games_without_the_options_of_training(monkeypatch):
    class Policy(torch.nn.Module):
        metadata = {"env_id": "Breakout-v5", "env_options": {**OPTIONS, "noop_max": 1}}  # noqa: RUF012
        count = 0

        def act(self, obs, deterministic=False):
            assert (obs.shape, obs.dtype) == ((2, 4, 84, 84), np.uint8)
            self.count += 1
            return actions_of(self.count // len(ACTIONS))[self.count % len(ACTIONS)]

    ACTIONS = actions_of(0)
    made = []
    monkeypatch.setattr("pyppo.evaluation.make_envs", lambda *a, **k: made.append(k["options"]) or make_envs(*a, **k))
    without = pyppo.evaluate(Policy(), episodes=2, num_envs=2)
    assert made == [{"noop_max": 1}]
    # With them, given outright, whole games and raw returns are reported all the same.
    given = pyppo.evaluate(Policy(), episodes=2, num_envs=2, env_options=OPTIONS)
    assert made[-1] == OPTIONS
    for result in (without, given):
        assert result.lengths.min() > 60  # a game; a life is about 25 steps


def test_the_preset_is_cleanrls():
    config = Config.for_env("Breakout-v5")
    assert (config.num_envs, config.num_steps, config.num_minibatches, config.update_epochs) == (8, 128, 4, 4)
    assert (config.learning_rate, config.anneal_lr, config.clip_coef, config.ent_coef) == (2.5e-4, True, 0.1, 0.01)
    assert config.env_options == {"episodic_life": True, "reward_clip": True}
    assert (config.norm_obs, config.norm_reward, config.total_timesteps) == (False, False, 10_000_000)
    assert Config.for_env("Ant-v5").env_options == {}
    config.env_options["noop_max"] = 1  # the preset itself stays
    assert "noop_max" not in Config.for_env("Breakout-v5").env_options


def test_every_atari_game_has_the_preset():
    from pyppo.envpool_envs import family_of, list_envs
    from pyppo.presets import preset_for

    games = {name for name in list_envs() if family_of(name) == "atari"}
    assert {name for name in list_envs() if preset_for(name).get("env_options")} == games
