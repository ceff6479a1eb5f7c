"""Ctrl-C: what is saved and said, and how training goes on afterwards."""

import time

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from trainer_cases import OwnPolicy, config_for, envpool

import pyppo
from pyppo import checkpoint
from pyppo.trainer import Trainer


def test_interrupting_saves_and_says_so(tmp_path, capsys):
    def interrupt(row):
        if row["iteration"] == 2:
            raise KeyboardInterrupt

    config = config_for(run_dir=str(tmp_path), save_interval=0)
    result = Trainer(config, probes.TerminalReward(num_envs=8), quiet=True, callbacks=[interrupt]).train()
    assert result.interrupted
    assert "interrupted at step" in (said := capsys.readouterr().err)
    assert f'pyppo.Trainer.resume("{result.run_dir}", envs=...)' in said
    assert checkpoint.load_checkpoint(result.run_dir).state["iteration"] == 2


@envpool
@pytest.mark.parametrize("own_policy", [False, True])
def test_what_is_said_goes_on(tmp_path, capsys, own_policy):
    def interrupt(row):
        raise KeyboardInterrupt

    fields = {"env_id": "CartPole-v1", "num_envs": 2, "num_groups": 1, "env_threads": 1, "one_core": False}
    policy = CartPolePolicy() if own_policy else None
    with Trainer(
        config_for(run_dir=str(tmp_path), **fields), policy=policy, quiet=True, callbacks=[interrupt]
    ) as trainer:
        run = trainer.train().run_dir
    command = f'pyppo.Trainer.resume("{run}", policy=...)' if own_policy else f"pyppo resume {run}"
    assert f"go on with `{command}`" in capsys.readouterr().err


class CartPolePolicy(OwnPolicy):
    """The same of four observations."""

    def __init__(self):
        super().__init__()
        self.trunk[0] = torch.nn.Linear(4, 16)


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])  # the latter is what handlers of SIGTERM raise
@pytest.mark.parametrize("save_interval", [0, 10])
def test_an_error_loses_nothing_that_was_learned(tmp_path, save_interval, kind):
    def fail(row):
        if row["iteration"] == 3:
            raise kind("the logger has no disk left")

    config = config_for(run_dir=str(tmp_path), save_interval=save_interval)
    trainer = Trainer(config, probes.TerminalReward(num_envs=8), quiet=True, callbacks=[fail])
    with pytest.raises(kind, match="no disk left") as error:
        trainer.train()
    saved = checkpoint.load_checkpoint(trainer.run_dir)
    assert saved.state["iteration"] == 3
    assert saved.state["sha256"] == checkpoint.parameter_sha256(trainer.policy)
    assert any(f"saved {saved.path}; go on with" in note for note in error.value.__notes__)


def test_an_environments_own_floating_point_error_saves(tmp_path):
    class Divides(probes.TerminalReward):
        left = 40

        def step(self, actions):
            self.left -= 1
            if self.left == 0:
                raise FloatingPointError("divide by zero")
            return super().step(actions)

    trainer = Trainer(config_for(run_dir=str(tmp_path), save_interval=0), Divides(num_envs=8), quiet=True)
    with pytest.raises(FloatingPointError, match="divide by zero"):
        trainer.train()
    assert checkpoint.load_checkpoint(trainer.run_dir).state["iteration"] == trainer.iteration == 2


def test_an_error_of_saving_does_not_hide_the_first(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    trainer = Trainer(config_for(run_dir=str(tmp_path)), probes.TerminalReward(num_envs=8), quiet=True)
    trainer.step()
    monkeypatch.setattr(trainer.engine, "update", lambda *arguments: 1 / 0)
    monkeypatch.setattr(checkpoint, "save_checkpoint", fail)
    with pytest.raises(ZeroDivisionError) as error:
        trainer.train()
    assert "nothing was saved" in error.value.__notes__[0]


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_checkpoint_says_whether_its_update_was_cut_short(tmp_path, interrupted):
    trainer = Trainer(config_for(run_dir=str(tmp_path)), probes.TerminalReward(num_envs=8), quiet=True)
    trainer.step()
    update = trainer.engine.update

    def cut(*arguments):
        update(*arguments)
        if interrupted:
            raise KeyboardInterrupt
        return update(*arguments)

    trainer.engine.update = cut
    assert trainer.train().interrupted is interrupted
    assert checkpoint.load_checkpoint(trainer.run_dir).state["partial_update"] is interrupted
    trainer.engine.update = update
    trainer.step()
    trainer.save()
    assert checkpoint.load_checkpoint(trainer.run_dir).state["partial_update"] is False


class Pipelined(probes.TerminalReward):
    """Two halves of a step, which must take turns; `interrupt_at` says at which `recv` Ctrl-C comes."""

    interrupt_at = -1
    received = 0
    answer = None

    def reset(self, **kwargs):
        assert self.answer is None, "reset with an answer pending"
        return super().reset(**kwargs)

    def send(self, actions):
        assert self.answer is None, "two sends in a row"
        self.answer = self.step(actions)

    def recv(self):
        self.received += 1
        if self.received == self.interrupt_at:
            raise KeyboardInterrupt
        answer, self.answer = self.answer, None
        return answer


def test_training_goes_on_after_an_interrupt_between_send_and_recv(capsys):
    env = Pipelined(num_envs=8)
    config = config_for(norm_obs=True, norm_reward=True, warmup_rows=40)
    trainer = Trainer(config, env, quiet=True)
    trainer.step()
    statistics = trainer.policy.normalizer.statistics["obs"]
    steps, seen = trainer.steps, statistics.count.item()
    env.interrupt_at = env.received + 7
    assert trainer.train().interrupted
    assert trainer.steps == steps
    finished = trainer.history.episodes_total
    trainer.step()
    assert statistics.count.item() - seen == trainer.steps - steps  # no second warm-up
    obs, valid = trainer.rollout.obs["obs"], trainer.rollout.valid
    assert (obs[0].argmax(1) == 0).all()
    assert torch.equal(obs[:16].argmax(2)[:5], torch.tensor([0, 1, 2, 3, 3])[:, None].expand(5, 8))
    assert valid[:4].all()
    assert not valid[4].any()
    assert trainer.history.episodes_total - finished == 8 * 3
    assert not trainer.train().interrupted


@envpool
@pytest.mark.parametrize("when", ["before the answer is taken", "after it is taken"])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_training_goes_on_after_an_interrupt_in_envpool(monkeypatch, num_groups, when):
    """Ctrl-C comes while the interpreter waits for EnvPool, and is raised when the answer has been taken."""
    config = config_for(env_id="CartPole-v1", num_groups=num_groups, total_timesteps=10_000, num_steps=64)
    with Trainer(config, quiet=True) as trainer:
        trainer.step()
        env = trainer.groups[-1].env
        calls, recv = [], env._recv

        def interrupted():
            calls.append(None)
            if len(calls) == 9:
                if when == "after it is taken":
                    recv()
                raise KeyboardInterrupt
            return recv()

        monkeypatch.setattr(env, "_recv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.step()
        trainer.step()
        obs, actions, done = trainer.rollout.obs["obs"], trainer.rollout.actions, trainer.rollout.terminated
        assert (obs[0].abs() <= 0.05).all()  # the beginning of an episode
        # The cart's velocity rises where it is pushed to the right: each observation answers its own action.
        pushed = (obs[1:, :, 1] > obs[:-1, :, 1]) == (actions == 1)
        assert pushed[trainer.rollout.valid].all()
        assert done.any()


class Slow(gym.Wrapper):
    """Steps that take long enough to be interrupted."""

    def step(self, action):
        time.sleep(0.01)
        return self.env.step(action)


def slow_cart_pole():
    return Slow(gym.make("CartPole-v1"))


def test_training_goes_on_after_ctrl_c_in_other_processes(tmp_path):
    # Only this process gets the signal: a shell's Ctrl-C would end Gymnasium's worker processes too.
    envs = gym.vector.AsyncVectorEnv([slow_cart_pole] * 2)
    try:
        trainer = Trainer(config_for(total_timesteps=200), envs, quiet=True)
        send, sent = envs.step_async, []

        def interrupted(actions):
            send(actions)
            if not sent and trainer.iteration == 2:
                sent.append(True)
                raise KeyboardInterrupt

        envs.step_async = interrupted
        assert trainer.train().interrupted
        assert envs._state.value == "step"
        result = trainer.train()
        assert not result.interrupted
        assert result.history["step"][-1] >= 200
        assert len(pyppo.evaluate(result.policy, envs=envs, episodes=2).returns) == 2
        envs.step_async = send
        send(np.zeros(2, np.int64))  # another interrupt: a new trainer can begin all the same
        Trainer(config_for(total_timesteps=20), envs, quiet=True).train()
    finally:
        envs.close()
