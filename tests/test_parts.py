"""What a trainer is put together from: every setting arrives, and torch's threads are put back."""

import probes
import pytest
import torch
from gymnasium import spaces
from trainer_cases import config_for, envpool

from pyppo import checkpoint
from pyppo.actions import Distribution
from pyppo.envs import env_seed
from pyppo.parts import make_policy
from pyppo.stepping import Way, make_groups
from pyppo.trainer import Trainer


def test_the_settings_reach_policy_and_statistics():
    config = config_for(
        norm_obs=True, norm_reward=True, clip_obs=3.0, clip_reward=2.5, log_std_init=-0.7, activation="silu",
        hidden_sizes=(5, 6), gamma=0.9,
    )  # fmt: skip
    trainer = Trainer(config, probes.ContinuousAction(), quiet=True)
    assert trainer.policy.normalizer.clip == 3.0
    assert trainer.reward_scaler.clip == 2.5
    assert trainer.reward_scaler.gamma == 0.9
    assert trainer.policy.log_std.tolist() == pytest.approx([-0.7])
    assert [type(layer).__name__ for layer in trainer.policy.actor] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    assert [layer.out_features for layer in trainer.policy.actor[::2]] == [5, 6, 1]


def test_a_shared_trunk_is_made_and_trained():
    trainer = Trainer(config_for(shared_trunk=True, hidden_sizes=(5, 6)), probes.ObservationAction(), quiet=True)
    assert [layer.out_features for layer in trainer.policy.trunk[::2]] == [5, 6]
    before = {name: p.clone() for name, p in trainer.policy.named_parameters()}
    trainer.step()
    assert not [name for name, p in trainer.policy.named_parameters() if torch.equal(p, before[name])]


@envpool
def test_the_settings_reach_the_environments():
    config = config_for(
        env_id="CartPole-v1", num_envs=6, num_groups=2, env_threads=2, env_options={"max_episode_steps": 7}
    )
    pools = [
        group.env._pool for group in make_groups(config, Way(config.num_groups, config.env_threads, False), rebuild=3)
    ]
    assert [pool.config["num_threads"] for pool in pools] == [2, 2]
    assert [pool.config["max_episode_steps"] for pool in pools] == [7, 7]
    seeds = [seed for pool in pools for seed in pool.config["env_seed"]]
    assert seeds == [env_seed(1, "train", 0, i, 3) for i in range(6)]


@pytest.mark.parametrize("ambient", [1, 2])
def test_initial_weights_do_not_depend_on_the_ambient_threads(ambient):
    arguments = spaces.Dict({"obs": spaces.Box(-1.0, 1.0, (300,))}), Distribution.from_space(spaces.Discrete(2))
    config = config_for(hidden_sizes=(256, 256), torch_threads=1)
    wanted = checkpoint.parameter_sha256(make_policy(config, *arguments))
    torch.set_num_threads(ambient)
    assert checkpoint.parameter_sha256(make_policy(config, *arguments)) == wanted
    assert torch.get_num_threads() == ambient


def test_torch_threads_are_put_back():
    torch.set_num_threads(2)
    seen = []
    trainer = Trainer(
        config_for(), probes.ActionReward(), quiet=True, callbacks=[lambda row: seen.append(torch.get_num_threads())]
    )
    trainer.train()
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("fields", [{}, {"engine": "torch"}, {"recurrent": "gru"}])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_learns_whatever_mode_the_caller_is_in(fields, mode):
    """In silence it would learn nothing with torch's autograd."""
    config = config_for(num_envs=8, **fields)
    wanted = Trainer(config, probes.ObservationAction(), quiet=True).train()
    with mode():
        found = Trainer(config, probes.ObservationAction(), quiet=True).train()
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert found.history["grad_norm"] == wanted.history["grad_norm"]
    assert min(found.history["grad_norm"]) > 0
    assert checkpoint.parameter_sha256(found.policy) == checkpoint.parameter_sha256(wanted.policy)


@pytest.mark.parametrize("fields", [{}, {"engine": "torch"}, {"recurrent": "lstm"}])
@pytest.mark.parametrize("kind", [probes.ObservationAction, probes.ContinuousAction])
def test_torchs_default_dtype_changes_nothing(fields, kind):
    config = config_for(num_envs=8, norm_obs=True, norm_reward=True, **fields)
    wanted = Trainer(config, kind(), quiet=True).train()
    torch.set_default_dtype(torch.float64)
    try:
        found = Trainer(config, kind(), quiet=True).train()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in found.policy.parameters()} == {torch.float32}
    assert checkpoint.parameter_sha256(found.policy) == checkpoint.parameter_sha256(wanted.policy)
