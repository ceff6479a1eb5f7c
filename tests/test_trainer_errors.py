"""What stops a run: settings, spaces and environments that do not fit, and numbers that are none."""

import math

import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from torch import nn
from trainer_cases import OwnPolicy, config_for, envpool

import pyppo
from pyppo import checkpoint
from pyppo.trainer import Trainer

# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("envs", [[], "CartPole-v1", 3])
def test_what_is_no_environment_is_refused(envs):
    with pytest.raises((TypeError, ValueError), match="env"):
        Trainer(config_for(), envs)


@envpool
def test_unknown_environment():
    with pytest.raises(ValueError, match=r"CartPol-v1.*CartPole-v1"):
        pyppo.train("CartPol-v1", quiet=True, run_dir=None)


def test_spaces_are_named_where_they_do_not_fit():
    with pytest.raises(TypeError, match="Text"):
        Trainer(config_for(), probes.Probe(action_space=spaces.Text(3)))


def test_a_normalizer_of_ones_own_is_left_alone():
    policy = OwnPolicy()
    policy.normalizer = nn.LayerNorm(1)
    Trainer(config_for(), probes.ObservationAction(), policy, quiet=True).train()
    with pytest.raises(ValueError, match=r"norm_obs is True; .* OwnPolicy, .*ObservationNormalizer"):
        Trainer(config_for(norm_obs=True), probes.ObservationAction(), policy)


# --- numbers that are none --------------------------------------------------------------------------------------------


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


def test_statistics_that_overflow_stop_the_run(tmp_path):
    """Infinite observations that the clip and tanh hide from everything but the statistics."""

    class Broken(probes.TerminalReward):
        def advance(self, actions):
            obs, *rest = super().advance(actions)
            obs[5] = np.inf if trainer.iteration == 1 else obs[5]
            return obs, *rest

    config = config_for(run_dir=str(tmp_path), save_interval=1, norm_obs=True, warmup_rows=0)
    trainer = Trainer(config, Broken(num_envs=8), quiet=True)
    with pytest.raises(FloatingPointError, match=r"iteration 2 .*environment 5 gave an observation 'obs'"):
        trainer.train()
    trainer.policy.normalizer.statistics["obs"].var.fill_(math.nan)
    assert trainer.save() is None
    assert checkpoint.load_checkpoint(trainer.run_dir).state["iteration"] == 1


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


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_outputs_that_overflow_stop_the_run(engine):
    trainer = Trainer(config_for(engine=engine), probes.TerminalReward(num_envs=8), quiet=True)
    trainer.step()
    for p in trainer.policy.actor.parameters():  # each is finite, and no product of two is
        p.data.fill_(3e38)
    with pytest.raises(FloatingPointError, match=r"iteration 2 .*policy's logits.* is not"):
        trainer.step()
