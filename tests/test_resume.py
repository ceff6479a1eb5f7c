"""Resuming a run: what goes on where it stopped, and what is refused and changes nothing."""

import json
import shutil

import gymnasium
import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from trainer_cases import OwnPolicy, config_for, envpool

import pyppo
from pyppo import checkpoint
from pyppo.stepping import Way, make_groups
from pyppo.trainer import Trainer

# --- going on ---------------------------------------------------------------------------------------------------------


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


def test_resuming_with_a_module_of_ones_own(tmp_path):
    config = config_for(run_dir=str(tmp_path))
    first = Trainer(config, probes.ObservationAction(), OwnPolicy(), quiet=True)
    first.train()
    with pytest.raises(ValueError, match="OwnPolicy; pass policy="):
        pyppo.load(first.run_dir)
    second = Trainer.resume(first.run_dir, probes.ObservationAction(), OwnPolicy(), quiet=True, total_timesteps=900)
    assert checkpoint.parameter_sha256(second.policy) == checkpoint.parameter_sha256(first.policy)
    second.train()


@pytest.mark.parametrize(
    ("before", "changes", "used"),
    [
        ({"anneal_lr": False, "learning_rate": 3e-3}, {"learning_rate": 1e-6}, ("learning_rate", 1e-6)),
        ({"learning_rate": 3e-3}, {"anneal_lr": False, "learning_rate": 1e-6}, ("learning_rate", 1e-6)),
        ({"objective": "kl", "kl_coef": 1.0}, {"kl_coef": 5.0}, ("kl_coef", 5.0)),
        ({"objective": "kl", "kl_coef": 1.0, "kl_target": 1e9}, {}, ("kl_coef", None)),  # halved in each iteration
        ({"objective": "kl", "kl_coef": 1.0, "kl_target": 1e9}, {"kl_coef": 5.0}, ("kl_coef", 5.0)),
        ({"anneal_lr": False, "adaptive_lr_kl": 1e9, "learning_rate": 1e-4}, {}, ("learning_rate", None)),
        ({"anneal_lr": False, "adaptive_lr_kl": 1e9}, {"learning_rate": 1e-5}, ("learning_rate", 1e-5)),
    ],
)
def test_a_resumed_run_uses_the_settings_that_are_changed(tmp_path, before, changes, used):
    first = Trainer(config_for(run_dir=str(tmp_path), **before), probes.TerminalReward(num_envs=8), quiet=True)
    first.train()
    name, value = used
    value = getattr(first.schedules, name) if value is None else value
    second = Trainer.resume(
        first.run_dir, probes.TerminalReward(num_envs=8), quiet=True, total_timesteps=10**9, **changes
    )
    assert getattr(second.schedules, name) == value
    assert second.step()[name] == pytest.approx(value)


def test_a_changed_setting_outlives_a_crash_and_what_moved_stays(tmp_path):
    config = config_for(run_dir=str(tmp_path), objective="kl", kl_target=1e9, save_interval=0)
    first = Trainer(config, probes.TerminalReward(num_envs=8), quiet=True)
    first.train()
    moved = first.schedules.kl_coef
    assert moved < config.kl_coef

    def again(**changes):
        envs = probes.TerminalReward(num_envs=8)
        return Trainer.resume(first.run_dir, envs, quiet=True, total_timesteps=10**9, **changes)

    assert again(kl_target=None).schedules.kl_coef == moved  # it no longer moves, and is not set anew
    crashed = again(kl_coef=5.0)
    crashed.step()  # writes the settings and no checkpoint
    assert again().schedules.kl_coef == 5.0


@envpool
def test_a_resumed_run_does_not_replay_its_first_episodes(tmp_path):
    config = config_for(env_id="CartPole-v1", run_dir=str(tmp_path), total_timesteps=200)
    with Trainer(config, quiet=True) as first:
        run = first.train().run_dir
    with Trainer.resume(run, quiet=True, total_timesteps=400) as second:
        starts = [group.reset()["obs"] for group in make_groups(config, Way(1, 1, False)) + second.groups]
    assert not np.isclose(starts[0], starts[1]).all(axis=1).any()


# --- a finished run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = config_for(run_dir=str(tmp_path_factory.mktemp("runs")), save_interval=1, total_timesteps=400)
    return Trainer(config, probes.TerminalReward(num_envs=8), quiet=True).train().run_dir


def test_resuming_without_metrics(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    trainer = Trainer.resume(run, probes.TerminalReward(num_envs=8), quiet=True, total_timesteps=600)
    before = trainer.steps
    history = trainer.train().history
    assert before < history["step"][0] < history["step"][-1]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(history["step"])


def test_resuming_names_what_a_checkpoint_lacks(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    path = checkpoint.find_checkpoint(run) / "state.json"
    state = json.loads(path.read_text())
    del state["rebuild"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="not a usable checkpoint: state.json lacks rebuild"):
        Trainer.resume(run, probes.TerminalReward(num_envs=8), total_timesteps=900)


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


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_resume_changes_nothing(finished, name):
    changes, message = REFUSED[name]
    before = tree(finished)
    with pytest.raises(ValueError, match=message):
        Trainer.resume(finished, probes.TerminalReward(num_envs=8), **changes)
    assert tree(finished) == before


def interrupt(*arguments):
    raise KeyboardInterrupt


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


# --- environments that are not the run's ------------------------------------------------------------------------------


class Spaces(gymnasium.Env):
    """Environments with these spaces that do nothing."""

    def __init__(self, obs, actions):
        self.observation_space, self.action_space, self.steps = obs, actions, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps >= 10, False, {}


def made(obs, actions=None):
    return [lambda: Spaces(obs, actions or spaces.Discrete(2))] * 2


BOX = spaces.Box(-1, 1, (2, 3), np.float32)
OTHER = [
    (BOX, spaces.Box(-1, 1, (3, 2), np.float32), r"observation 'obs' as .*\[3, 2\].*; it must be .*\[2, 3\]"),
    (BOX, spaces.Box(0, 255, (2, 3), np.uint8), "'dtype': 'uint8'.*; it must be .*'dtype': 'float32'"),
    (spaces.Discrete(5), spaces.Discrete(3), "'n': 3.*; it must be .*'n': 5"),
    (spaces.Discrete(5), spaces.Discrete(5, start=1), "'start': 1.*; it must be .*'start': 0"),
    (spaces.Dict(a=BOX), spaces.Dict(a=BOX, b=BOX), r"observations \['a', 'b'\]; they must be \['a'\]"),
    (spaces.Dict(a=BOX), spaces.Dict(b=BOX), r"observations \['b'\]; they must be \['a'\]"),
]


@pytest.mark.parametrize(("was", "now", "message"), OTHER)
def test_other_observations_are_refused_and_nothing_is_deleted(tmp_path, was, now, message):
    config = config_for(run_dir=str(tmp_path), save_interval=1, total_timesteps=200)
    with Trainer(config, made(was), quiet=True) as first:
        first.train()
    before = contents(first.run_dir)
    oldest = min((first.run_dir / "checkpoints").glob("step-*"))
    with pytest.raises(ValueError, match=message):
        Trainer.resume(oldest, made(now), quiet=True)
    with pytest.raises(ValueError, match="the environments take actions .*; they must be"):
        Trainer.resume(oldest, made(was, spaces.Discrete(3)), quiet=True)
    assert contents(first.run_dir) == before
    with Trainer.resume(oldest, made(was), quiet=True) as again:
        again.step()
        assert again.steps > int(oldest.name.removeprefix("step-"))


def test_floats_of_another_width_are_the_same_observations(tmp_path):
    config = config_for(run_dir=str(tmp_path), total_timesteps=100)
    with Trainer(config, made(spaces.Box(-1, 1, (3,), np.float32)), quiet=True) as first:
        first.train()
    wider = made(spaces.Box(-2, 2, (3,), np.float64))
    with Trainer.resume(first.run_dir, wider, quiet=True, total_timesteps=200) as again:
        assert again.train().history["step"][-1] >= 200


def test_what_fails_in_its_first_rollout_deletes_nothing(tmp_path):
    config = config_for(run_dir=str(tmp_path), save_interval=1, total_timesteps=200)
    with Trainer(config, made(BOX), quiet=True) as first:
        first.train()
    before = contents(first.run_dir)

    class Broken(Spaces):
        def step(self, action):
            raise RuntimeError("out of order")

    oldest = min((first.run_dir / "checkpoints").glob("step-*"))
    again = Trainer.resume(oldest, [lambda: Broken(BOX, spaces.Discrete(2))] * 2, quiet=True)
    with again, pytest.raises(RuntimeError, match="out of order"):
        again.train()
    assert contents(first.run_dir) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", None, "step None; it must be an integer"),
        ("policy", "x", "policy 'x'; it must be an object that names its class"),
        ("time", "late", "state.json has time 'late'"),
    ],
)
def test_a_damaged_state_is_named(tmp_path, name, value, message):
    config = config_for(run_dir=str(tmp_path), total_timesteps=100)
    with Trainer(config, made(BOX), quiet=True) as first:
        first.train()
    path = next((first.run_dir / "checkpoints").glob("step-*")) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=message):
        Trainer.resume(first.run_dir, made(BOX), quiet=True, total_timesteps=200)


def test_another_run_dir_is_refused(tmp_path):
    """A resumed run goes on in its own folder."""
    config = config_for(run_dir=str(tmp_path), total_timesteps=100)
    with Trainer(config, made(BOX), quiet=True) as first:
        first.train()
    with pytest.raises(ValueError, match="run_dir is 'elsewhere'; it must be"):
        Trainer.resume(first.run_dir, made(BOX), quiet=True, total_timesteps=200, run_dir="elsewhere")


def contents(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
