"""The training loop: what it counts, records, refuses and repeats."""

import json
import math
import shutil
import sys

import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from torch import nn

import pyppo
from pyppo import checkpoint
from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.envs import env_seed
from pyppo.parts import make_groups, make_policy
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


def test_a_normalizer_of_ones_own_is_left_alone():
    policy = OwnPolicy()
    policy.normalizer = nn.LayerNorm(1)
    Trainer(config_for(), probes.ObservationAction(), policy, quiet=True).train()
    with pytest.raises(ValueError, match=r"norm_obs is True; .* OwnPolicy, .*ObservationNormalizer"):
        Trainer(config_for(norm_obs=True), probes.ObservationAction(), policy)


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


def test_the_last_iteration_is_saved_once(tmp_path, monkeypatch):
    saved, save = [], checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *a: (saved.append(a[3]["iteration"]), save(*a))[1])
    config = config_for(run_dir=str(tmp_path), save_interval=1, total_timesteps=300)
    history = Trainer(config, probes.TerminalReward(num_envs=8), quiet=True).train().history
    assert saved == history["iteration"]


def test_stepping_on_past_the_total():
    trainer = Trainer(config_for(total_timesteps=150), probes.TerminalReward(num_envs=8), quiet=True)
    trainer.train()
    before = checkpoint.parameter_sha256(trainer.policy)
    assert trainer.step()["learning_rate"] == 0.0
    assert checkpoint.parameter_sha256(trainer.policy) == before


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
    assert sorted((first.run_dir / "checkpoints").glob("step-*")) == saved
    second.step()
    left = (first.run_dir / "checkpoints").glob("step-*")
    assert max(int(path.name.removeprefix("step-")) for path in left) == second.steps < first.steps
    steps = second.train().history["step"]
    assert steps == sorted(set(steps))


def tree(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


REFUSED = {
    "complete": ({}, "is complete at step"),
    "a total already passed": ({"total_timesteps": 200}, "is complete at step"),
    "another environment": ({"env_id": "other"}, "env_id is 'other'; it must be 'probe'"),
    "another policy": ({"hidden_sizes": (9,)}, r"hidden_sizes is \(9,\); it must be \(8,\)"),
    "a trunk": ({"shared_trunk": True}, "shared_trunk is True; it must be False"),
    "another activation": ({"activation": "relu"}, "activation is 'relu'; it must be 'tanh'"),
    "another clip": ({"clip_obs": 5.0}, r"clip_obs is 5\.0; it must be 10\.0"),
    "statistics from nowhere": ({"norm_obs": True}, "norm_obs is True; it must be False"),
    "another deviation": ({"log_std_init": -1.0}, r"log_std_init is -1\.0; it must be 0\.0"),
    "other bounds": ({"action_bounds": "rescale"}, "action_bounds is 'rescale'; it must be 'clip'"),
    "no such field": ({"learning_rte": 1.0}, "learning_rte"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = config_for(run_dir=str(tmp_path_factory.mktemp("runs")), save_interval=1, total_timesteps=400)
    return Trainer(config, probes.TerminalReward(num_envs=8), quiet=True).train().run_dir


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_resume_changes_nothing(finished, name):
    changes, message = REFUSED[name]
    before = tree(finished)
    with pytest.raises(ValueError, match=message):
        Trainer.resume(finished, probes.TerminalReward(num_envs=8), **changes)
    assert tree(finished) == before


def test_a_resume_that_does_not_train_changes_nothing(finished):
    before = tree(finished)
    with pytest.raises(ValueError, match="num_envs is 4; it must be 8"):
        Trainer.resume(finished, probes.TerminalReward(num_envs=4), total_timesteps=900)
    oldest = min((finished / "checkpoints").glob("step-*"))
    for where in (finished, oldest):
        with Trainer.resume(where, probes.TerminalReward(num_envs=8), quiet=True, total_timesteps=900) as trainer:
            trainer.collector.reset = interrupt
            assert trainer.train().interrupted
    assert tree(finished) == before


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_resuming_names_what_a_checkpoint_lacks(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    path = checkpoint.find_checkpoint(run) / "state.json"
    state = json.loads(path.read_text())
    del state["rebuild"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="not a usable checkpoint: state.json lacks rebuild"):
        Trainer.resume(run, probes.TerminalReward(num_envs=8), total_timesteps=900)


def test_resuming_without_metrics(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    trainer = Trainer.resume(run, probes.TerminalReward(num_envs=8), quiet=True, total_timesteps=600)
    before = trainer.steps
    history = trainer.train().history
    assert before < history["step"][0] < history["step"][-1]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(history["step"])


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
def test_the_seed_decides_the_parameters():
    hashes = [checkpoint.parameter_sha256(pyppo.train("CartPole-v1", seed=seed, **FAST).policy) for seed in (3, 3, 4)]
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


# --- every setting arrives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ambient", [1, 2])
def test_initial_weights_do_not_depend_on_the_ambient_threads(ambient):
    arguments = spaces.Dict({"obs": spaces.Box(-1.0, 1.0, (300,))}), Distribution.from_space(spaces.Discrete(2))
    config = config_for(hidden_sizes=(256, 256), torch_threads=1)
    wanted = checkpoint.parameter_sha256(make_policy(config, *arguments))
    torch.set_num_threads(ambient)
    assert checkpoint.parameter_sha256(make_policy(config, *arguments)) == wanted
    assert torch.get_num_threads() == ambient


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
    pools = [group.env._pool for group in make_groups(config, 3, config.num_groups, config.env_threads)]
    assert [pool.config["num_threads"] for pool in pools] == [2, 2]
    assert [pool.config["max_episode_steps"] for pool in pools] == [7, 7]
    seeds = [seed for pool in pools for seed in pool.config["env_seed"]]
    assert seeds == [env_seed(1, "train", 0, i, 3) for i in range(6)]


@envpool
def test_a_resumed_run_does_not_replay_its_first_episodes(tmp_path):
    config = config_for(env_id="CartPole-v1", run_dir=str(tmp_path), total_timesteps=200)
    with Trainer(config, quiet=True) as first:
        run = first.train().run_dir
    with Trainer.resume(run, quiet=True, total_timesteps=400) as second:
        starts = [group.reset()["obs"] for group in make_groups(config, 0, 1, 1) + second.groups]
    assert not np.isclose(starts[0], starts[1]).all(axis=1).any()


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
