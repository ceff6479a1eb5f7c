"""The training loop: whom it trains, what it counts and records, and how far its seed decides."""

import math

import numpy as np
import probes
import pytest
import torch
from trainer_cases import OwnPolicy, config_for, envpool

import pyppo
from pyppo import checkpoint
from pyppo.config import Config
from pyppo.report import PHASES
from pyppo.trainer import Trainer

# --- policies and environments of one's own ---------------------------------------------------------------------------


def test_a_module_without_heads_learns():
    policy = OwnPolicy()
    config = config_for(total_timesteps=12_000, update_epochs=8, num_minibatches=1, learning_rate=1e-2)
    result = Trainer(config, probes.ObservationAction(), policy, quiet=True).train()
    assert result.policy is policy
    assert policy.auxiliary_calls > 0
    np.testing.assert_array_equal(policy.act(np.array([[-1.0], [1.0]], np.float32), deterministic=True), [0, 1])
    assert result.history["episode_return"][-1] > 0.8


def test_a_module_without_heads_is_reproducible():
    hashes = []
    for _ in range(2):
        torch.manual_seed(0)
        policy = OwnPolicy()
        torch.manual_seed(len(hashes))  # whatever state the global generator is in
        Trainer(config_for(), probes.ObservationAction(), policy, quiet=True).train()
        hashes.append(checkpoint.parameter_sha256(policy))
    assert hashes[0] == hashes[1]


def test_several_environments_are_groups_of_one_rollout():
    trainer = Trainer(config_for(), [probes.TerminalReward(num_envs=3), probes.TerminalReward(num_envs=2)], quiet=True)
    assert (trainer.config.num_envs, len(trainer.groups)) == (5, 2)
    trainer.step()
    assert trainer.rollout.actions.shape == (16, 5)


# --- what is counted and recorded -------------------------------------------------------------------------------------


def test_stops_at_the_first_iteration_with_enough_valid_steps():
    result = Trainer(config_for(total_timesteps=257), probes.TruncationOnly(num_envs=8), quiet=True).train()
    steps = result.history["step"]
    assert steps[-2] < 257 <= steps[-1]


def test_learning_rate_runs_on_the_share_of_steps():
    config = config_for(total_timesteps=600, learning_rate=1e-3)
    history = Trainer(config, probes.TruncationOnly(num_envs=8), quiet=True).train().history
    before = [0, *history["step"][:-1]]
    np.testing.assert_allclose(history["learning_rate"], [1e-3 * (1 - step / 600) for step in before])


def test_stepping_on_past_the_total():
    trainer = Trainer(config_for(total_timesteps=150), probes.TerminalReward(num_envs=8), quiet=True)
    trainer.train()
    before = checkpoint.parameter_sha256(trainer.policy)
    assert trainer.step()["learning_rate"] == 0.0
    assert checkpoint.parameter_sha256(trainer.policy) == before


def test_history_has_one_entry_an_iteration_and_times_add_up():
    history = Trainer(config_for(), probes.TerminalReward(num_envs=8), quiet=True).train().history
    lengths = {len(column) for column in history.values()}
    assert lengths == {history["iteration"][-1]}
    parts = np.sum([history[f"time_{name}"] for name in (*PHASES, "other")], axis=0)
    np.testing.assert_allclose(np.cumsum(parts), history["time"])
    assert sum(history["episodes"]) == history["episodes_total"][-1]
    assert all(history["time_act"])


def test_callbacks_get_each_row():
    rows = []
    trainer = Trainer(config_for(), probes.TerminalReward(num_envs=8), quiet=True, callbacks=[rows.append])
    history = trainer.train().history
    assert [row["step"] for row in rows] == history["step"]


def test_explained_variance_approaches_one():
    config = config_for(total_timesteps=8_000, update_epochs=8, learning_rate=1e-2, clip_vloss=False, gamma=0.8)
    history = Trainer(config, probes.ObservationReward(), quiet=True).train().history
    assert history["explained_variance"][0] < 0.5
    assert history["explained_variance"][-1] > 0.98


def test_an_iteration_without_valid_rows(monkeypatch):
    """One step a rollout, every episode one step long: every second rollout is all resets."""
    config = config_for(num_steps=1, num_minibatches=1, total_timesteps=24, norm_obs=True, norm_reward=True)
    history = Trainer(config, probes.ConstantReward(num_envs=8), quiet=True).train().history
    assert history["step"] == [8, 8, 16, 16, 24]
    assert math.isnan(history["loss"][1])
    assert history["updates"][1] == 0


def test_the_last_iteration_is_saved_once(tmp_path, monkeypatch):
    saved, save = [], checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *a: (saved.append(a[3]["iteration"]), save(*a))[1])
    config = config_for(run_dir=str(tmp_path), save_interval=1, total_timesteps=300)
    history = Trainer(config, probes.TerminalReward(num_envs=8), quiet=True).train().history
    assert saved == history["iteration"]


# --- statistics and schedules -----------------------------------------------------------------------------------------


def test_observation_statistics_are_warm_and_stand_still_during_an_iteration(monkeypatch):
    trainer = Trainer(config_for(norm_obs=True, warmup_rows=100), probes.TerminalReward(num_envs=8), quiet=True)
    statistics = trainer.policy.normalizer.statistics["obs"]
    seen = []
    update, act = trainer.engine.update, trainer.engine.act
    monkeypatch.setattr(trainer.engine, "act", lambda *a: (seen.append(statistics.count.item()), act(*a))[1])
    monkeypatch.setattr(trainer.engine, "update", lambda *a: (seen.append(statistics.count.item()), update(*a))[1])
    trainer.step()
    assert len(set(seen)) == 1
    assert seen[0] >= 100
    assert statistics.count.item() == seen[0] + trainer.steps


def test_batch_normalised_advantages():
    trainer = Trainer(config_for(norm_adv="batch"), probes.TruncationOnly(num_envs=8), quiet=True)
    trainer.step()
    advantages = trainer.rollout.advantages[trainer.rollout.valid]
    torch.testing.assert_close(advantages.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages.std(), torch.tensor(1.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kl", "factor"), [(0.1, 2.0), (0.01, 1.0), (0.001, 0.5)])
def test_adaptive_kl_coefficient(kl, factor):
    config = config_for(objective="kl", kl_target=0.01, kl_coef=3.0)
    trainer = Trainer(config, probes.ActionReward(), quiet=True)
    trainer.schedules.adapt(kl)
    assert trainer.schedules.kl_coef == 3.0 * factor


@pytest.mark.parametrize(("kl", "rate"), [(0.1, 2e-3), (0.01, 3e-3), (0.001, 4.5e-3)])
def test_adaptive_learning_rate(kl, rate):
    config = config_for(adaptive_lr_kl=0.01, anneal_lr=False, learning_rate=3e-3)
    trainer = Trainer(config, probes.ActionReward(), quiet=True)
    trainer.schedules.adapt(kl)
    assert trainer.schedules.learning_rate == pytest.approx(rate)
    for _ in range(50):
        trainer.schedules.adapt(kl)
    assert 1e-6 <= trainer.schedules.learning_rate <= 1e-2


def test_kl_adaptive_schedules_run():
    for fields in ({"objective": "kl", "kl_target": 1e-9}, {"adaptive_lr_kl": 1e-9, "anneal_lr": False}):
        history = Trainer(config_for(**fields), probes.ActionReward(), quiet=True).train().history
        column = "kl_coef" if "kl_target" in fields else "learning_rate"
        assert history["kl"][0] > 0
        assert len(set(history[column])) > 1


# --- EnvPool ----------------------------------------------------------------------------------------------------------


@envpool
def test_the_seed_decides_the_parameters():
    fast = {"total_timesteps": 2_000, "quiet": True, "run_dir": None}
    hashes = [checkpoint.parameter_sha256(pyppo.train("CartPole-v1", seed=seed, **fast).policy) for seed in (3, 3, 4)]
    assert hashes[0] == hashes[1] != hashes[2]


@envpool
@pytest.mark.parametrize("num_groups", [2, 4])
def test_groups_change_nothing_but_rounding(num_groups):
    """A product of matrices may round otherwise for fewer rows; actions are drawn alike from what is nearly equal."""
    rollouts = []
    for groups in (1, num_groups):
        config = Config.for_env("CartPole-v1", num_groups=groups, run_dir=None, device="cpu", engine="torch")
        with Trainer(config, quiet=True) as trainer:
            trainer._start()
            trainer.collector.collect()
            rollouts.append(trainer.rollout)
    for name in ("actions", "terminated", "truncated", "valid", "raw_rewards", "steps"):
        assert torch.equal(*(getattr(rollout, name) for rollout in rollouts)), name
    assert torch.equal(*(rollout.obs["obs"] for rollout in rollouts))
    for name in ("logp", "values"):
        torch.testing.assert_close(*(getattr(rollout, name) for rollout in rollouts), rtol=1e-5, atol=1e-6)


@envpool
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_training_loading_and_evaluating(tmp_path, env_id):
    short = {"total_timesteps": 3_000, "num_steps": 64, "num_minibatches": 8, "norm_obs": True, "norm_reward": True}
    result = pyppo.train(env_id, quiet=True, run_dir=str(tmp_path), **short)
    state = checkpoint.load_checkpoint(result.run_dir).state
    policy = pyppo.load(result.run_dir)
    assert state["sha256"] == checkpoint.parameter_sha256(policy) == checkpoint.parameter_sha256(result.policy)
    ours, loaded = (pyppo.evaluate(p, env_id, episodes=4, seed=5) for p in (result.policy, policy))
    np.testing.assert_array_equal(ours.returns, loaded.returns)
    assert result.plot(tmp_path / "curve.png").stat().st_size > 1000
    assert isinstance(policy.distribution.to_env(np.zeros((1, 1))), np.ndarray)
