"""The probes through the real trainer: values, advantages and policies converge to their known answers.

Two probes are then run with the semantics broken on purpose, and give the wrong answers that were worked out for that.
"""

import numpy as np
import probes
import pytest
import torch

from pyppo.config import Config
from pyppo.rollout import Collector
from pyppo.trainer import Trainer

GAMMA = 0.8


def trained(env, **changes):
    """A trainer whose run on `env` is over."""
    fields = {
        "env_id": type(env).__name__,
        "total_timesteps": 4_000,
        "num_steps": 16,
        "num_minibatches": 1,
        "update_epochs": 8,
        "learning_rate": 1e-2,
        "gamma": GAMMA,
        "clip_vloss": False,
        "hidden_sizes": (16,),
        "run_dir": None,
        "device": "cpu",
    }
    trainer = Trainer(Config(**{**fields, **changes}), envs=env, quiet=True)
    trainer.train()
    return trainer


def values(trainer, *observations):
    """Values of some observations."""
    return trainer.engine.value({"obs": torch.from_numpy(np.array(observations, np.float32))}).numpy()


def probabilities(trainer, *observations):
    """Probabilities of all actions at some observations."""
    policy = trainer.policy
    params, _ = policy.heads(policy.prepare({"obs": torch.from_numpy(np.array(observations, np.float32))}))
    return params["logits"].detach().softmax(dim=1).numpy()


def mean_advantage(trainer):
    """Mean size of the last rollout's advantages."""
    return trainer.rollout.advantages[trainer.rollout.valid].abs().mean().item()


@pytest.mark.parametrize("same_step", [False, True])
def test_constant_reward(same_step):
    trainer = trained(probes.ConstantReward(same_step=same_step))
    np.testing.assert_allclose(values(trainer, [0.0]), [1.0], atol=0.01)
    assert mean_advantage(trainer) < 0.01


def test_discounted():
    trainer = trained(probes.Discounted())
    np.testing.assert_allclose(values(trainer, [0.0], [1.0]), [GAMMA, 1.0], atol=0.01)
    assert mean_advantage(trainer) < 0.01


def test_observation_reward():
    trainer = trained(probes.ObservationReward())
    np.testing.assert_allclose(values(trainer, [-1.0], [1.0]), [-1.0, 1.0], atol=0.01)
    assert mean_advantage(trainer) < 0.01


def test_action_reward():
    trainer = trained(probes.ActionReward())
    assert probabilities(trainer, [0.0])[0, 1] > 0.98
    np.testing.assert_allclose(values(trainer, [0.0]), [1.0], atol=0.03)
    assert mean_advantage(trainer) < 0.1


def test_observation_and_action():
    trainer = trained(probes.ObservationAction(), total_timesteps=6_000)
    chosen = probabilities(trainer, [-1.0], [1.0])
    assert chosen[0, 0] > 0.98
    assert chosen[1, 1] > 0.98
    np.testing.assert_allclose(values(trainer, [-1.0], [1.0]), [1.0, 1.0], atol=0.03)
    assert mean_advantage(trainer) < 0.1


def test_continuous_action():
    trainer = trained(probes.ContinuousAction(), total_timesteps=6_000)
    mean = trainer.policy.act(np.zeros((1, 1), np.float32), deterministic=True)
    np.testing.assert_allclose(mean, [[0.5]], atol=0.05)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95])
def test_terminal_reward(gae_lambda):
    trainer = trained(probes.TerminalReward(), gae_lambda=gae_lambda)
    np.testing.assert_allclose(values(trainer, *np.eye(4)), [GAMMA**3, GAMMA**2, GAMMA, 1.0], atol=0.02)
    assert mean_advantage(trainer) < 0.02


# --- truncation is not termination ------------------------------------------------------------------------------------

CONTINUING = 1 / (1 - GAMMA)  # 5


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95])
def test_truncation_only(gae_lambda, same_step):
    trainer = trained(probes.TruncationOnly(same_step=same_step), gae_lambda=gae_lambda)
    np.testing.assert_allclose(values(trainer, [0.0]), [CONTINUING], atol=0.02)
    assert mean_advantage(trainer) < 0.02


def test_truncation_taken_for_termination_gives_the_wrong_value(monkeypatch):
    finish = Collector._finish

    def broken(collector):
        count = finish(collector)
        collector.rollout.terminated |= collector.rollout.truncated
        collector.rollout.truncated.zero_()
        return count

    monkeypatch.setattr(Collector, "_finish", broken)
    trainer = trained(probes.TruncationOnly(), gae_lambda=0.0)
    np.testing.assert_allclose(values(trainer, [0.0]), [1 / (1 - 0.75 * GAMMA)], atol=0.05)  # 2.5, not 5


# --- the reset row is not experience ----------------------------------------------------------------------------------


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95])
def test_reset_row(gae_lambda, same_step):
    trainer = trained(probes.ResetRow(same_step=same_step), gae_lambda=gae_lambda)
    np.testing.assert_allclose(values(trainer, [0.0], [1.0]), [CONTINUING, CONTINUING], atol=0.02)
    assert mean_advantage(trainer) < 0.02


def test_learning_from_the_reset_row_gives_the_wrong_value(monkeypatch):
    finish = Collector._finish

    def broken(collector):
        count = finish(collector)
        collector.rollout.valid.fill_(True)
        return count

    monkeypatch.setattr(Collector, "_finish", broken)
    trainer = trained(probes.ResetRow(), gae_lambda=0.0)
    at_start = (2 + GAMMA) / (3 - GAMMA - 2 * GAMMA**2)  # 3.04, not 5
    np.testing.assert_allclose(values(trainer, [0.0], [1.0]), [at_start, 0.5 + GAMMA * at_start], atol=0.05)


# --- what counts ------------------------------------------------------------------------------------------------------


def test_reset_rows_do_not_count_as_steps():
    trainer = trained(probes.ConstantReward(), total_timesteps=640, update_epochs=1)
    # Every other row is a reset: 8 environments x 16 steps give 64 valid rows a rollout.
    assert trainer.history["step"] == [64.0 * (i + 1) for i in range(10)]
    assert trainer.history["episode_return"][-1] == 1.0
    assert trainer.history["episode_length"][-1] == 1.0


def test_the_reported_return_is_the_environments_own():
    trainer = trained(probes.TruncationOnly(), total_timesteps=512, update_epochs=1, norm_reward=True, clip_reward=0.1)
    assert trainer.history["episode_return"][-1] == 4.0
    assert trainer.history["episode_length"][-1] == 4.0


def test_the_same_seed_gives_the_same_parameters():
    first, second, other = (
        trained(probes.ObservationAction(), total_timesteps=500, seed=seed).engine.flat.data.clone()
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
