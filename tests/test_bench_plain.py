"""bench/paper/plain_ppo.py against the library's references, since scores are held against it; plain.py's table."""

from __future__ import annotations

import importlib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_records import write_records
from gymnasium import spaces

from pyppo import reference

BENCH = Path(__file__).resolve().parents[1] / "bench"
# A source distribution carries the tests and not what they look at here.
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the repository")


@pytest.fixture
def bench(monkeypatch):
    pytest.importorskip("envpool")
    for folder in (BENCH, BENCH / "paper"):
        monkeypatch.syspath_prepend(str(folder))
    names = ("plain", "plain_ppo", "table1", "table1_settings")
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_its_settings_are_those_of_table_1(bench):
    plain, table1 = bench.plain_ppo.Settings(), bench.table1_settings.SETTINGS["X"]
    for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "learning_rate", "adam_eps", "gamma",
                 "max_grad_norm", "gae_lambda", "clip_coef", "vf_coef"):  # fmt: skip
        assert getattr(plain, name) == table1[name], name
    assert (plain.hidden_size, plain.hidden_size) == table1["hidden_sizes"]
    assert plain.limit == table1["clip_obs"] == table1["clip_reward"]
    for changes in bench.plain.VARIANTS.values():
        assert changes.get("warmup_steps", 256) * plain.num_envs == table1["warmup_rows"]


def test_its_advantages_are_the_references(bench):
    random = np.random.default_rng(0)
    T, N, settings = 40, 6, bench.plain_ppo.Settings(gamma=0.9, gae_lambda=0.8)
    terminated, truncated, valid = np.zeros((T, N), bool), np.zeros((T, N), bool), np.ones((T, N), bool)
    for t in range(T):
        if t:
            valid[t] = ~(terminated[t - 1] | truncated[t - 1])  # a row that carries the reset
        ends = random.random((2, N)) < 0.15
        terminated[t], truncated[t] = ends[0] & valid[t], ends[1] & ~ends[0] & valid[t]
    rewards, values = random.normal(size=(T, N)) * valid, random.normal(size=(T + 1, N))
    assert (~valid).sum() > 20
    assert terminated.any()
    assert truncated.any()
    expected, _ = reference.gae(
        *map(torch.as_tensor, (rewards, values, terminated, truncated)),
        gamma=0.9, gae_lambda=0.8, valid=torch.as_tensor(valid),
    )  # fmt: skip
    found = bench.plain_ppo.advantages_of(rewards, values, terminated, truncated, valid, settings)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)


def test_its_loss_and_gradients_are_the_references(bench):
    torch.manual_seed(0)
    n, settings = 50, bench.plain_ppo.Settings()
    agent = bench.plain_ppo.Agent(5, 3, 16).double()
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor([0.3, -0.2, 0.1]))
    obs, actions, advantages = torch.randn(n, 5).double(), torch.randn(n, 3).double(), torch.randn(n).double()
    logp = agent.log_prob(obs, actions).detach() + 0.4 * torch.randn(n)  # ratios on both sides of the clip range
    old_values, returns = torch.randn(n).double(), torch.randn(n).double()
    loss = bench.plain_ppo.loss_of(agent, (obs, actions, logp, old_values, advantages, returns), settings)
    expected, _ = reference.ppo_loss(
        mean=agent.actor(obs), log_std=agent.log_std, actions=actions, old_logp=logp, advantages=advantages,
        values=agent.critic(obs)[:, 0], old_values=old_values, returns=returns, clip_coef=0.2, value_clip_coef=0.2,
        vf_coef=0.5, norm_adv=True,
    )  # fmt: skip
    parameters = list(agent.parameters())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_its_statistics_are_those_of_all_rows(bench):
    random = np.random.default_rng(1)
    rows = random.normal(3.0, 2.0, size=(100, 4))
    statistics = bench.plain_ppo.RunningStatistics((4,))
    for first in range(0, 100, 7):
        statistics.update(rows[first : first + 7])
        statistics.update(rows[:0])
    np.testing.assert_allclose(statistics.mean, rows.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(statistics.var, rows.var(axis=0), rtol=1e-4)


def test_its_environments_count_episodes_and_mask_resets(bench):
    """InvertedPendulum rewards every step by 1, so an episode's return is its length."""
    settings = bench.plain_ppo.Settings(num_envs=3)
    envs = bench.plain_ppo.Environments("InvertedPendulum-v4", 1, settings)
    ended, valid_steps, before = 0, 0, envs.valid
    for _ in range(200):
        rewards, terminated, truncated = envs.step(torch.ones(3, envs.action_size))
        valid_steps += before.sum()
        assert (rewards[~before] == 0).all()
        assert not (terminated | truncated)[~before].any()
        assert (envs.valid == ~(terminated | truncated)).all()
        assert (envs.obs.abs() <= settings.limit).all()
        ended += int((terminated | truncated).sum())
        before = envs.valid
    assert ended == len(envs.finished) > 10
    assert sum(envs.finished) + envs._totals.sum() == valid_steps


class Script:
    """EnvPool's answers of two environments, written down: one is cut off in step 2, the other ends in step 3."""

    observation_space, action_space = spaces.Box(-9, 9, (1,)), spaces.Box(-1.0, 1.0, (1,))
    obs = np.array([[1.0, -1.0], [2.0, 0.5], [4.0, 0.0], [0.5, 3.0], [1.5, -2.0], [2.5, 0.0]])[..., None]
    rewards = np.array([[1.0, 2.0], [3.0, -1.0], [0.0, 5.0], [2.0, 0.0], [1.0, 1.0]])
    terminated = np.array([[0, 0], [0, 0], [0, 1], [0, 0], [0, 0]], bool)
    truncated = np.array([[0, 0], [1, 0], [0, 0], [0, 0], [0, 0]], bool)
    valid = np.array([[1, 1], [1, 1], [0, 1], [1, 0], [1, 1]], bool)
    """Rows before each step: the row after an end carries the reset."""

    def __init__(self):
        self.t, self.sent = 0, []

    def reset(self):
        return self.obs[0], {}

    def step(self, actions):
        t, self.t = self.t, self.t + 1
        self.sent.append(actions)
        return self.obs[t + 1], self.rewards[t], self.terminated[t], self.truncated[t], {}


@pytest.fixture
def script(bench, monkeypatch):
    pool = Script()
    monkeypatch.setattr(bench.plain_ppo.envpool, "make_gymnasium", lambda *_, **__: pool)
    return pool


def test_its_environments_step_by_step(bench, script):
    """Flags, scales and observations, from the definitions: of all that was seen so far, valid rows alone."""
    settings = bench.plain_ppo.Settings(num_envs=2, gamma=0.5, limit=1.5)
    envs = bench.plain_ppo.Environments("made up", 1, settings)
    seen, returns, running = [*Script.obs[0, :, 0]], [], np.zeros(2)

    def normalised(obs):
        return np.clip((obs - np.mean(seen)) / np.std(seen), -1.5, 1.5)

    np.testing.assert_allclose(envs.obs.numpy(), normalised(Script.obs[0]), rtol=1e-3)
    limited = 0
    for t in range(5):
        live = Script.valid[t]
        assert (envs.valid == live).all()
        rewards, terminated, truncated = envs.step(torch.tensor([[3.0], [-0.25]]))
        assert (terminated == Script.terminated[t]).all()
        assert (truncated == Script.truncated[t]).all()
        for i in np.flatnonzero(live):
            running[i] = 0.5 * running[i] + Script.rewards[t, i]
            returns.append(running[i])
        running[Script.terminated[t] | Script.truncated[t]] = 0.0
        expected = np.where(live, np.clip(Script.rewards[t] / np.std(returns), -1.5, 1.5), 0.0)
        np.testing.assert_allclose(rewards, expected, rtol=1e-3)
        limited += (np.abs(expected) == 1.5).sum()
        following = Script.valid[t + 1] if t < 4 else ~(terminated | truncated)
        seen.extend(Script.obs[t + 1, following, 0])
        np.testing.assert_allclose(envs.obs.numpy(), normalised(Script.obs[t + 1]), rtol=1e-3, atol=1e-3)
    assert 0 < limited < 8
    assert envs.finished == [4.0, 6.0]
    assert np.array_equal(script.sent[0], [[1.0], [-0.25]])  # within the bounds


def test_a_rollout_bootstraps_where_an_episode_was_cut_off(bench, script):
    settings = bench.plain_ppo.Settings(num_envs=2, num_steps=5, gamma=0.5, gae_lambda=0.0)
    envs = bench.plain_ppo.Environments("made up", 1, settings)
    torch.manual_seed(0)
    agent = bench.plain_ppo.Agent(1, 1, 4)
    values, rewards, step = [], [], envs.step

    def kept(actions):
        values.append(agent.value(envs.obs).detach().numpy())
        answer = step(actions)
        rewards.append(answer[0])
        return answer

    envs.step = kept
    obs, actions, logp, old_values, advantages, returns = bench.plain_ppo.rollout(envs, agent, settings)
    values.append(agent.value(envs.obs).detach().numpy())
    expected = [
        rewards[t][i] + (0.0 if Script.terminated[t, i] else 0.5 * values[t + 1][i]) - values[t][i]
        for t, i in np.argwhere(Script.valid)
    ]
    assert len(expected) == 8
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns.numpy(), expected + old_values.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logp.numpy(), agent.log_prob(obs, actions).detach().numpy(), rtol=1e-5)


def test_its_update_limits_the_gradient(bench):
    torch.manual_seed(0)
    settings = bench.plain_ppo.Settings(num_minibatches=1, update_epochs=1, max_grad_norm=1e-3)
    agent = bench.plain_ppo.Agent(2, 1, 4)
    before = [p.detach().clone() for p in agent.parameters()]
    obs, actions, (advantages, old_values, returns) = torch.randn(20, 2), torch.randn(20, 1), torch.randn(3, 20)
    batch = (obs, actions, agent.log_prob(obs, actions).detach(), old_values, advantages, returns)
    bench.plain_ppo.update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, settings)
    moved = torch.cat([(p - old).flatten() for p, old in zip(agent.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_its_learning_rate_falls_to_nothing(bench, monkeypatch):
    rates, rows = [], []

    def update(agent, optimizer, batch, settings):
        rates.append(optimizer.param_groups[0]["lr"])
        rows.append(len(batch[0]))

    monkeypatch.setattr(bench.plain_ppo, "update", update)
    settings = bench.plain_ppo.Settings(total_timesteps=400, num_envs=3, num_steps=16, learning_rate=2.0)
    bench.plain_ppo.train("InvertedPendulum-v4", 1, settings)
    assert rates == pytest.approx([2.0 * (1 - sum(rows[:i]) / 400) for i in range(len(rows))])
    assert rates[0] == 2.0
    assert rates[-1] < 0.5


def test_statistics_fixed_in_a_rollout_begin_with_random_play(bench):
    settings = bench.plain_ppo.Settings(num_envs=3, warmup_steps=50)
    envs = bench.plain_ppo.Environments("InvertedPendulum-v4", 1, settings)
    statistics = envs._obs_statistics
    mean, count = statistics.mean.copy(), statistics.count
    assert count == pytest.approx(150, abs=1e-3)
    valid_rows = 3  # of the reset
    for _ in range(20):
        envs.step(torch.ones(3, envs.action_size))
        valid_rows += envs.valid.sum()
    assert (statistics.mean == mean).all()
    envs.learn_statistics()
    assert statistics.count == pytest.approx(150 + valid_rows, abs=1e-3)
    assert (statistics.mean != mean).any()


def test_it_learns_and_repeats(bench):
    settings = bench.plain_ppo.Settings(total_timesteps=12_000, learning_rate=1e-3)
    steps, returns, seconds = bench.plain_ppo.train("InvertedPendulum-v4", 1, settings)
    assert steps[-1] >= 12_000
    assert seconds > 0
    assert returns[-1] > 2 * returns[0]
    assert bench.plain_ppo.train("InvertedPendulum-v4", 1, settings)[:2] == (steps, returns)


def test_the_table_sets_it_beside_table_1(bench, tmp_path, monkeypatch):
    asked = []

    def run_jobs(jobs, path, parallel):
        asked.extend(job.key for job in jobs)
        return []

    monkeypatch.setattr(bench.plain, "run_jobs", run_jobs)

    def write(path, jobs, scores, cpu):
        score_of = dict(zip((job.key for job in jobs), scores, strict=True))
        results = {key: {"score": score, "diverged": None, "curve": [[], []]} for key, score in score_of.items()}
        write_records(path, jobs, lambda job: results[job.key], cpu_seconds=cpu)

    full = bench.plain.STEPS
    write(
        tmp_path / "plain.jsonl",
        [bench.plain.job_of("each step", "HalfCheetah-v4", s, full) for s in (1, 2, 3)],
        [1700.0, 1800.0, 1600.0],
        400.0,
    )
    ours = [bench.table1.job_of("X", "clip 0.2", "HalfCheetah-v4", seed, full) for seed in (1, 2, 3)]
    write(tmp_path / "table1.jsonl", ours, [1800.0, 1900.0, 1700.0], 60.0)
    page = tmp_path / "results.md"
    page.write_text("<!-- plain -->\n<!-- /plain -->\n")
    files = ["--results", str(tmp_path / "plain.jsonl"), "--table1", str(tmp_path / "table1.jsonl")]
    bench.plain.main(["--only", "HalfCheetah-v4", "--seeds", "1-3", *files, "--docs", str(tmp_path)])
    variants = ("each step", "each rollout")
    assert asked == [f"plain, {variant}/HalfCheetah-v4/s{seed}" for seed in (1, 2, 3) for variant in variants]
    rows = {
        tuple(line.strip("| ").split(" | ")[:2]): line.strip("| ").split(" | ")[1:]
        for line in page.read_text().splitlines()
    }
    cells = rows["HalfCheetah-v4", "each step"]
    assert cells[1] == "1700.0 ± 81.6 (3)"
    assert cells[2] == "1800.0 ± 81.6 (3)"
    assert cells[3].startswith("100.0 [")
    low, high = (float(x) for x in cells[3].split("[")[1].rstrip("]").split(", "))
    assert -100 <= low < 100 < high <= 300
    assert cells[4:] == ["1700.0, 1800.0, 1600.0", "400", "60"]
    assert rows["HalfCheetah-v4", "each rollout"][1:] == ["–", "1800.0 ± 81.6 (3)", "–", "–", "–", "60"]
    assert rows["Hopper-v4", "each step"][1:] == ["–"] * 6
    assert "3 runs, 2026-11-23, commit abc" in page.read_text()


def test_without_a_run_there_is_no_table(bench, tmp_path):
    (tmp_path / "results.md").write_text("<!-- plain -->\n<!-- /plain -->\n")
    (tmp_path / "plain.jsonl").touch()
    bench.plain.main(["--report", "--results", str(tmp_path / "plain.jsonl"), "--docs", str(tmp_path)])
    assert (tmp_path / "results.md").read_text() == "<!-- plain -->\nNot run yet.\n<!-- /plain -->\n"
