"""The training loop: what it counts, records, refuses and repeats."""

import json
import math
import sys

import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from torch import nn

import pyppo
from pyppo import checkpoint
from pyppo.config import Config
from pyppo.report import PHASES
from pyppo.trainer import Trainer

envpool = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="EnvPool has wheels for Linux only")
FAST = {"total_timesteps": 2_000, "quiet": True, "run_dir": None}


def config_for(**fields):
    return Config(**{
        "env_id": "probe", "total_timesteps": 600, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2,
        "hidden_sizes": (8,), "run_dir": None, "device": "cpu", **fields,
    })  # fmt: skip


class OwnPolicy(nn.Module):
    """A module of a user's own: no heads(), a distribution from torch, a shared trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(1, 16), nn.Tanh())
        self.logits, self.critic = nn.Linear(16, 2), nn.Linear(16, 1)
        self.auxiliary_calls = 0

    def forward(self, obs):
        hidden = self.trunk(obs)
        return torch.distributions.Categorical(logits=self.logits(hidden)), self.critic(hidden).squeeze(1)

    def evaluate(self, obs, actions, state=None):
        distribution, value = self(obs["obs"])
        return distribution.log_prob(actions), distribution.entropy(), value

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        distribution, _ = self(torch.as_tensor(obs))
        return (distribution.probs.argmax(1) if deterministic else distribution.sample()).numpy()

    def auxiliary_loss(self, minibatch):
        self.auxiliary_calls += 1
        return 0.0 * minibatch.values.sum()


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


@pytest.mark.parametrize("envs", [[], "CartPole-v1", 3])
def test_what_is_no_environment_is_refused(envs):
    with pytest.raises((TypeError, ValueError), match="env"):
        Trainer(config_for(), envs)


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


# --- statistics -------------------------------------------------------------------------------------------------------


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
    trainer._adapt(kl)
    assert trainer.kl_coef == 3.0 * factor


@pytest.mark.parametrize(("kl", "rate"), [(0.1, 2e-3), (0.01, 3e-3), (0.001, 4.5e-3)])
def test_adaptive_learning_rate(kl, rate):
    config = config_for(adaptive_lr_kl=0.01, anneal_lr=False, learning_rate=3e-3)
    trainer = Trainer(config, probes.ActionReward(), quiet=True)
    trainer._adapt(kl)
    assert trainer.learning_rate == pytest.approx(rate)
    for _ in range(50):
        trainer._adapt(kl)
    assert 1e-6 <= trainer.learning_rate <= 1e-2


def test_kl_adaptive_schedules_run():
    for fields in ({"objective": "kl", "kl_target": 1e-9}, {"adaptive_lr_kl": 1e-9, "anneal_lr": False}):
        history = Trainer(config_for(**fields), probes.ActionReward(), quiet=True).train().history
        column = "kl_coef" if "kl_target" in fields else "learning_rate"
        assert history["kl"][0] > 0
        assert len(set(history[column])) > 1


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    class Broken(probes.TerminalReward):
        def advance(self, actions):
            obs, *rest = super().advance(actions)
            return (np.full_like(obs, np.nan) if trainer.iteration == 1 else obs), *rest

    config = config_for(run_dir=str(tmp_path), save_interval=1)
    trainer = Trainer(config, Broken(num_envs=8), quiet=True)
    with pytest.raises(FloatingPointError, match=r"iteration 2 .*observation 'obs'"):
        trainer.train()
    (saved,) = (trainer.run_dir / "checkpoints").glob("step-*")
    assert all(torch.as_tensor(x).isfinite().all() for x in checkpoint.load_checkpoint(saved).model.values())


def test_parameters_that_overflow_stop_the_run(tmp_path):
    config = config_for(run_dir=str(tmp_path), save_interval=1)
    trainer = Trainer(config, probes.TerminalReward(num_envs=8), quiet=True)
    trainer.step()
    update = trainer.engine.update

    def poisoned(*arguments):
        metrics = update(*arguments)
        trainer.engine.flat.data[0] = math.inf
        return metrics

    trainer.engine.update = poisoned
    with pytest.raises(FloatingPointError, match=r"iteration 2 .*actor\.0\.weight is not.*learning_rate"):
        trainer.train()
    assert checkpoint.load_checkpoint(trainer.run_dir).state["iteration"] == 1


def test_interrupting_saves_and_says_so(tmp_path, capsys):
    def interrupt(row):
        if row["iteration"] == 2:
            raise KeyboardInterrupt

    config = config_for(run_dir=str(tmp_path), save_interval=0)
    result = Trainer(config, probes.TerminalReward(num_envs=8), quiet=True, callbacks=[interrupt]).train()
    assert result.interrupted
    assert "interrupted at step" in (said := capsys.readouterr().err)
    assert "pyppo resume" in said
    assert checkpoint.load_checkpoint(result.run_dir).state["iteration"] == 2


def test_torch_threads_are_put_back():
    torch.set_num_threads(2)
    seen = []
    trainer = Trainer(
        config_for(), probes.ActionReward(), quiet=True, callbacks=[lambda row: seen.append(torch.get_num_threads())]
    )
    trainer.train()
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2


# --- run folders, resuming --------------------------------------------------------------------------------------------


def test_resuming_continues_counters_optimiser_and_metrics(tmp_path):
    config = config_for(run_dir=str(tmp_path), save_interval=2, norm_obs=True, norm_reward=True, total_timesteps=400)
    first = Trainer(config, probes.TerminalReward(num_envs=8), quiet=True)
    first.train()
    state = first.engine.state_dict()
    second = Trainer.resume(first.run_dir, probes.TerminalReward(num_envs=8), quiet=True, total_timesteps=800)
    assert second.run_dir == first.run_dir
    assert (second.steps, second.iteration, second.rebuild) == (first.steps, first.iteration, 1)
    assert all(torch.equal(x, state[name]) for name, x in second.engine.state_dict().items())
    assert torch.equal(second.rollout.steps, first.rollout.steps)
    assert checkpoint.parameter_sha256(second.policy) == checkpoint.parameter_sha256(first.policy)
    assert second.reward_scaler.statistics.count == first.reward_scaler.statistics.count
    history = second.train().history
    assert history["step"][: len(first.history["step"])] == first.history["step"]
    lines = [json.loads(line) for line in (first.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == history["step"]
    assert sorted(set(history["step"])) == history["step"]
    assert history["time"] == sorted(history["time"])


def test_resuming_from_an_older_checkpoint_repeats_no_step(tmp_path):
    config = config_for(run_dir=str(tmp_path), save_interval=1, total_timesteps=500)
    first = Trainer(config, probes.TerminalReward(num_envs=8), quiet=True)
    first.train()
    saved = sorted((first.run_dir / "checkpoints").glob("step-*"))
    second = Trainer.resume(saved[0], probes.TerminalReward(num_envs=8), quiet=True)
    assert second.history["step"][-1] == second.steps < first.steps
    assert sorted((first.run_dir / "checkpoints").glob("step-*")) == saved[:1]
    steps = second.train().history["step"]
    assert steps == sorted(set(steps))


def test_resuming_with_a_module_of_ones_own(tmp_path):
    config = config_for(run_dir=str(tmp_path))
    first = Trainer(config, probes.ObservationAction(), OwnPolicy(), quiet=True)
    first.train()
    with pytest.raises(ValueError, match="OwnPolicy; pass policy="):
        pyppo.load(first.run_dir)
    second = Trainer.resume(first.run_dir, probes.ObservationAction(), OwnPolicy(), quiet=True, total_timesteps=900)
    assert checkpoint.parameter_sha256(second.policy) == checkpoint.parameter_sha256(first.policy)
    second.train()


# --- EnvPool ----------------------------------------------------------------------------------------------------------


@envpool
def test_the_same_seed_gives_the_same_parameters_however_grouped():
    hashes = [
        checkpoint.parameter_sha256(pyppo.train("CartPole-v1", seed=seed, num_groups=groups, **FAST).policy)
        for seed, groups in ((3, 1), (3, 1), (4, 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


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


@envpool
def test_unknown_environment():
    with pytest.raises(ValueError, match=r"CartPol-v1.*CartPole-v1"):
        pyppo.train("CartPol-v1", **FAST)


def test_spaces_are_named_where_they_do_not_fit():
    with pytest.raises(TypeError, match="Text"):
        Trainer(config_for(), probes.Probe(action_space=spaces.Text(3)))
