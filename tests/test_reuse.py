"""What was trained is used again: in other environments, in the same ones between iterations, by a resumed run."""

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from torch import nn
from trainer_cases import OwnPolicy, config_for, envpool

import pyppo
from pyppo import cli
from pyppo.trainer import Trainer


class Bounded(probes.ContinuousAction):
    """Actions of a Box from 0 to `high`; `sent` is what came."""

    def __init__(self, high: float, num_envs: int = 4) -> None:
        super().__init__(num_envs=num_envs)
        self.single_action_space = spaces.Box(0.0, high, self.single_action_space.shape, np.float32)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.sent: list[np.ndarray] = []

    def advance(self, actions):
        self.sent.append(actions.copy())
        return super().advance(actions)


# --- a policy trained further in other environments -------------------------------------------------------------------


@pytest.mark.parametrize(("action_bounds", "middle"), [("rescale", 50.0), ("clip", 0.0)])
def test_a_loaded_policy_acts_as_it_is_trained(tmp_path, action_bounds, middle):
    first = Trainer(config_for(action_bounds="rescale", run_dir=str(tmp_path)), Bounded(10.0), quiet=True)
    policy = pyppo.load(first.train().run_dir)
    with torch.no_grad():
        for p in policy.actor.parameters():
            p.zero_()  # the mean is 0: the middle of the bounds where they are rescaled to
        policy.log_std.fill_(-20.0)
    envs = Bounded(100.0)
    trainer = Trainer(config_for(action_bounds=action_bounds, learning_rate=1e-30), envs, policy, quiet=True)
    trainer.step()
    trained = np.concatenate(envs.sent)
    evaluated = Bounded(100.0)
    pyppo.evaluate(trainer.policy, envs=evaluated, episodes=4)
    np.testing.assert_allclose(trained, middle, atol=1e-3)
    np.testing.assert_allclose(np.concatenate(evaluated.sent), middle, atol=1e-3)


def test_a_loaded_policy_of_other_actions_is_refused(tmp_path):
    policy = Trainer(config_for(), Bounded(10.0), quiet=True).policy
    with pytest.raises(ValueError, match="policy has actions that are normal of shape .*; they must be categorical of"):
        Trainer(config_for(), probes.ObservationAction(), policy, quiet=True)


@envpool
def test_evaluation_goes_by_the_environment_trained_in_last(tmp_path):
    fields = {"num_envs": 2, "num_groups": 1, "env_threads": 1, "one_core": False, "total_timesteps": 64}
    options = {"env_options": {"max_episode_steps": 7}}
    with Trainer(config_for(env_id="CartPole-v1", **fields), quiet=True) as trainer:
        policy = trainer.train().policy
    with Trainer(
        config_for(env_id="CartPole-v0", run_dir=str(tmp_path), **options, **fields), policy=policy, quiet=True
    ) as trainer:
        run = trainer.train().run_dir
    for trained in (policy, run):
        assert pyppo.evaluate(trained, episodes=3).lengths.max() <= 7
    changed = {"env_options": {"max_episode_steps": 9}, "total_timesteps": 128}
    with Trainer.resume(run, quiet=True, **changed) as trainer:
        trainer.train()
        assert trainer.policy.metadata["env_id"] == "CartPole-v0"
    assert pyppo.evaluate(run, episodes=12, deterministic=False).lengths.max() in (8, 9)


# --- environments of one's own ----------------------------------------------------------------------------------------


@envpool
def test_a_run_in_ones_own_environments_is_not_taken_for_envpools(tmp_path, capsys):
    config = config_for(env_id="CartPole-v1", run_dir=str(tmp_path), total_timesteps=64)
    with Trainer(config, envs=["CartPole-v1"] * 2, quiet=True) as trainer:
        run = trainer.train().run_dir
    with pytest.raises(ValueError, match="envs is None; it must be given, since .* in environments of your own"):
        Trainer.resume(run, total_timesteps=128)
    with pytest.raises(ValueError, match=r"environments of your own \(CartPole-v1\); one of EnvPool's must be named"):
        pyppo.evaluate(run, episodes=1)
    assert cli.main(["resume", str(run), "--total-timesteps", "128"]) == 2
    assert f"pyppo.Trainer.resume({str(run)!r}, envs=the_environments)" in capsys.readouterr().err
    assert cli.main(["eval", str(run), "--episodes", "1"]) == 2
    assert cli.main(["eval", str(run), "--env", "CartPole-v1", "--episodes", "1"]) == 0
    with Trainer.resume(run, envs=["CartPole-v1"] * 2, quiet=True, total_timesteps=128) as trainer:
        assert trainer.train().history["step"][-1] >= 128


@envpool
def test_an_environment_of_other_actions_is_one_line(tmp_path, capsys):
    fields = {"num_envs": 2, "num_groups": 1, "env_threads": 1, "one_core": False, "total_timesteps": 64}
    with Trainer(config_for(env_id="LunarLander-v3", run_dir=str(tmp_path), **fields), quiet=True) as trainer:
        run = trainer.train().run_dir
    capsys.readouterr()
    assert cli.main(["eval", str(run), "--env", "LunarLanderContinuous-v3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pyppo: the environments' action space is Box")
    assert said.count("\n") == 1


class Unhashable(probes.TerminalReward):
    """As a dataclass is: nobody can count its resets."""

    __hash__ = None


class Remembering(probes.ObservationReward):
    """Keeps the observation that each step answered."""

    def __init__(self, num_envs):
        super().__init__(num_envs=num_envs)
        self.answered = []

    def step(self, actions):
        self.answered.append(self.last.copy())
        return super().step(actions)


def test_evaluating_in_the_training_environments_begins_new_episodes():
    envs = Remembering(num_envs=4)
    trainer = Trainer(config_for(num_steps=7), envs, quiet=True)
    trainer.step()
    assert trainer.collector.ready
    pyppo.evaluate(trainer.policy, envs=envs, episodes=5)
    assert not trainer.collector.ready
    envs.answered.clear()
    trainer.step()
    # What the rollout has is what the environments were in, from the first row on.
    np.testing.assert_array_equal(trainer.rollout.obs["obs"][:7].numpy(), np.stack(envs.answered))
    assert trainer.rollout.valid[0].all()


def test_environments_that_cannot_be_counted_train_as_ever():
    envs = Unhashable(num_envs=4)
    trainer = Trainer(config_for(), envs, quiet=True)
    trainer.step()
    assert trainer.collector.ready
    assert trainer.step()["updates"] > 0


def test_environments_are_closed_where_the_trainer_cannot_be_made():
    closed = []

    class Closing(gym.Wrapper):
        def close(self):
            closed.append(self)
            self.env.close()

    with pytest.raises(ValueError, match="norm_obs is True"):
        Trainer(config_for(norm_obs=True), [lambda: Closing(gym.make("CartPole-v1"))] * 2, OwnPolicy(), quiet=True)
    assert len(closed) == 2
    mine = probes.ObservationAction()
    mine.close = lambda: closed.append(mine)
    with pytest.raises(ValueError, match="norm_obs is True"):
        Trainer(config_for(norm_obs=True), mine, OwnPolicy(), quiet=True)
    assert mine not in closed


def test_the_first_error_is_told_and_what_was_made_is_closed():
    closed = []

    class Closing(gym.Wrapper):
        def close(self):
            closed.append(self)
            raise OSError("close broke")

    with pytest.raises(ValueError, match="norm_obs is True"):
        Trainer(config_for(norm_obs=True), [lambda: Closing(gym.make("CartPole-v1"))], OwnPolicy(), quiet=True)
    assert len(closed) == 1

    class Text(gym.Env):
        observation_space, action_space = spaces.Text(3), spaces.Discrete(2)

        def close(self):
            closed.append(self)

    with pytest.raises(TypeError):
        Trainer(config_for(), [Text] * 2, quiet=True)
    assert len(closed) == 3


def test_a_policys_own_metadata_stays():
    policy = Trainer(config_for(), probes.ObservationAction(), quiet=True).policy
    policy.metadata["note"] = 1
    Trainer(config_for(env_id="other"), probes.ObservationAction(), policy, quiet=True)
    assert policy.metadata == {"env_id": "other", "env_options": {}, "own_envs": True, "note": 1}


def test_a_part_in_eval_mode_stays_in_it():
    policy = OwnPolicy()
    policy.trunk.eval()
    pyppo.evaluate(policy, envs=probes.ObservationAction(num_envs=2), episodes=2)
    assert (policy.training, policy.trunk.training) == (True, False)


class Small(probes.ObservationAction):
    """Observations of uint16, which torch does hardly anything with."""

    def __init__(self):
        super().__init__(num_envs=2)
        self.single_observation_space = spaces.Box(0, 10, (1,), np.uint16)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, 2)

    def reset(self, **settings):
        obs, infos = super().reset(**settings)
        return np.abs(obs).astype(np.uint16), infos

    def step(self, actions):
        obs, *rest = super().step(actions)
        return np.abs(obs).astype(np.uint16), *rest


class Modulo(OwnPolicy):
    def act(self, obs, deterministic=False):
        assert torch.as_tensor(obs).dtype == torch.int32
        return super().act((torch.as_tensor(obs) % 7).float().numpy(), deterministic)

    def evaluate(self, obs, actions, state=None):
        return super().evaluate({"obs": obs["obs"].float()}, actions)


def test_evaluation_gives_unsigned_integers_as_training_does():
    policy = Modulo()
    Trainer(config_for(), Small(), policy, quiet=True).step()
    assert len(pyppo.evaluate(policy, envs=Small(), episodes=2).returns) == 2


def test_minibatches_fit_the_environments_given():
    config = pyppo.Config.for_env("CartPole-v1", recurrent="gru", run_dir=None)
    assert config.num_minibatches > 1
    trainer = Trainer(config, ["CartPole-v1"], quiet=True)
    assert (trainer.config.num_envs, trainer.config.num_minibatches) == (1, 1)
    trainer.close()


# --- noise of a module of one's own ----------------------------------------------------------------------------------


def test_sampled_evaluation_of_ones_own_policy_follows_its_seed_and_disturbs_nothing():
    policy = OwnPolicy()
    state = torch.get_rng_state()

    def lengths(seed):
        envs = probes.ObservationAction(num_envs=4)
        return pyppo.evaluate(policy, envs=envs, episodes=20, deterministic=False, seed=seed).returns.tolist()

    assert lengths(3) == lengths(3)
    assert lengths(3) != lengths(4)
    assert torch.equal(torch.get_rng_state(), state)


class Cached(nn.Module):
    """Keeps a tensor from its first call of `heads`, which is one of acting."""

    def __init__(self):
        super().__init__()
        self.layer, self.critic, self.kept = nn.Linear(1, 2), nn.Linear(1, 1), None

    def heads(self, obs):
        if self.kept is None:
            self.kept = torch.ones(1) * 1.0
        return {"logits": self.layer(obs["obs"]) * self.kept}, self.critic(obs["obs"]).squeeze(1)

    def act(self, obs, deterministic=False):
        with torch.no_grad():
            return self.heads({"obs": torch.as_tensor(obs)})[0]["logits"].numpy().argmax(1)


def test_a_module_may_keep_tensors_from_acting():
    policy = Cached()
    trainer = Trainer(config_for(), probes.ObservationAction(), policy, quiet=True)
    policy.kept = None
    assert trainer.step()["updates"] > 0


class Int32(OwnPolicy):
    """`act` gives int32, and `evaluate` takes what cross-entropy takes: int64."""

    def evaluate(self, obs, actions, state=None):
        distribution, value = self(obs["obs"])
        return (
            -nn.functional.cross_entropy(distribution.logits, actions, reduction="none"),
            distribution.entropy(),
            value,
        )

    def act(self, obs, deterministic=False):
        return super().act(obs, deterministic).astype(np.int32)


def test_actions_of_another_width_are_stored_alike():
    assert Trainer(config_for(), probes.ObservationAction(), Int32(), quiet=True).step()["updates"] > 0


# --- what arguments must be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CartPole-v1",), r"config is 'CartPole-v1' \(str\); it must be a pyppo.Config, as pyppo.Config.for_env"),
        ((config_for(), None, OwnPolicy), "policy is the class OwnPolicy; it must be a torch.nn.Module, an object"),
        ((config_for(), None, object()), "policy is <object .*; it must be a torch.nn.Module"),
    ],
)
def test_arguments_of_another_kind(arguments, message):
    with pytest.raises(TypeError, match=message):
        Trainer(*arguments)


def test_callbacks_that_are_none():
    with pytest.raises(TypeError, match=r"callbacks is .*\(builtin_function_or_method\); it must be a list of func"):
        Trainer(config_for(), probes.ObservationAction(), callbacks=print)


@envpool
def test_first_calls_that_mean_the_trainer():
    with pytest.raises(ValueError, match=r"'envs' is no field of Config; pyppo.Trainer\(config, envs=...\) takes"):
        pyppo.train("CartPole-v1", envs=["CartPole-v1"])
    with pytest.raises(ValueError, match=r"'policy' is no field of Config; pyppo.Trainer\(config, policy=...\) takes"):
        pyppo.train("CartPole-v1", policy=OwnPolicy())
    with pytest.raises(ValueError, match=r"Gymnasium's too, are the envs of pyppo.Trainer\(config, envs=...\)"):
        pyppo.train("MazeOfMine-v0")


def test_a_run_folder_may_be_a_path(tmp_path):
    config = config_for(run_dir=tmp_path / "runs")
    assert config.run_dir == str(tmp_path / "runs")
    with pytest.raises(TypeError, match=r"run_dir is 3 \(int\); it must be a non-empty path, or None"):
        config_for(run_dir=3)
