"""Policies with a memory: sequences replayed as they were lived, whatever their episodes and however they are cut."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from gymnasium import spaces
from memory_envs import Bits, MaskedTMaze, TMaze
from probes import Scripted
from torch import nn

import pyppo
from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.engines import Schedule, make_engine
from pyppo.envs import EnvGroup
from pyppo.policy import Memory, RecurrentPolicy
from pyppo.policy.recipes import policy_from_recipe
from pyppo.rollout import Collector, Rollout
from pyppo.trainer import Trainer

KIND = pytest.mark.parametrize("kind", ["gru", "lstm"])
OBS = spaces.Dict({"obs": spaces.Box(-1e6, 1e6, (1,), np.float32)})


def settings(**fields):
    return Config(**{
        "env_id": "none", "num_envs": 4, "num_steps": 12, "num_minibatches": 2, "update_epochs": 2, "device": "cpu",
        "run_dir": None, "recurrent": "gru", "recurrent_size": 8, "hidden_sizes": (8,), "norm_obs": True,
        "warmup_rows": 0, **fields,
    })  # fmt: skip


def policy_for(kind="gru", space=None, obs_space=OBS, **how):
    distribution = Distribution.from_space(space or spaces.Discrete(2))
    policy = RecurrentPolicy(obs_space, distribution, recurrent=kind, recurrent_size=8, hidden_sizes=(8,), **how)
    with torch.no_grad():  # heads of gain 0.01 would hide most of what can go wrong
        policy.actor[-1].weight.normal_(generator=torch.Generator().manual_seed(1))
    return policy


# --- the layer --------------------------------------------------------------------------------------------------------


def by_hand(memory, x, state, starts):
    """The equations of torch's documentation, a row at a time."""
    w_in, w_state, b_in, b_state = (p for _, p in memory.cells.named_parameters())
    rows = []
    for t in range(len(x)):
        state = torch.where(starts[t].view(-1, *(1,) * (state.dim() - 1)), 0.0, state)
        hidden = state if memory.kind == "gru" else state[:, 0]
        given, kept = x[t] @ w_in.T + b_in, hidden @ w_state.T + b_state
        if memory.kind == "gru":
            (r, z, n), (r_kept, z_kept, n_kept) = given.chunk(3, 1), kept.chunk(3, 1)
            r, z = torch.sigmoid(r + r_kept), torch.sigmoid(z + z_kept)
            state = (1 - z) * torch.tanh(n + r * n_kept) + z * hidden
            rows.append(state)
        else:
            i, f, g, o = (given + kept).chunk(4, 1)
            cell = torch.sigmoid(f) * state[:, 1] + torch.sigmoid(i) * torch.tanh(g)
            rows.append(torch.sigmoid(o) * torch.tanh(cell))
            state = torch.stack([rows[-1], cell], 1)
    return torch.stack(rows), state


@KIND
@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_sequences_with_episodes_in_them_are_a_row_at_a_time(kind, share, length):
    generator = torch.Generator().manual_seed(0)
    memory = Memory(kind, 3, 5, generator).double()
    x = torch.randn(length, 6, 3, generator=generator, dtype=torch.float64)
    state = torch.randn(6, *memory.state_shape, generator=generator, dtype=torch.float64)
    starts = torch.rand(length, 6, generator=generator) < share
    grads = []
    for run in (memory, lambda *given: by_hand(memory, *given)):
        given = [x.clone().requires_grad_(), state.clone().requires_grad_()]
        out, last = run(*given, starts)
        assert out.shape == (length, 6, 5)
        assert last.shape == state.shape
        loss = (out * torch.arange(out.numel()).view_as(out).sin()).sum() + last.square().sum()
        grads.append([out, last, *torch.autograd.grad(loss, [*given, *memory.parameters()])])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@KIND
def test_an_environment_does_not_depend_on_those_beside_it(kind):
    memory = Memory(kind, 3, 5, torch.Generator().manual_seed(0))
    x, state = torch.randn(9, 6, 3), torch.randn(6, *memory.state_shape)
    starts = torch.rand(9, 6, generator=torch.Generator().manual_seed(2)) < 0.3
    together, last = memory(x, state, starts)
    for i in range(6):
        alone, own = memory(x[:, i : i + 1], state[i : i + 1], starts[:, i : i + 1])
        torch.testing.assert_close(alone[:, 0], together[:, i])
        torch.testing.assert_close(own[0], last[i])


def test_a_state_that_is_not_a_number_ends_with_its_episode():
    memory = Memory("gru", 3, 5, torch.Generator().manual_seed(0))
    starts = torch.tensor([[True, False], [False, True]])
    state = torch.full((2, 5), float("nan"))
    out, _ = memory(torch.randn(2, 2, 3), state, starts)
    assert out[:, 0].isfinite().all()
    assert out[1, 1].isfinite().all()
    assert out[0, 1].isnan().all()


@KIND
def test_fresh_weights_follow_the_seed_and_leave_the_global_generator_alone(kind):
    before = torch.get_rng_state()
    first, second, other = (policy_for(kind, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not torch.equal(first.memory.cells.weight_hh_l0, other.memory.cells.weight_hh_l0)
    gate = first.memory.cells.weight_hh_l0[:8]
    torch.testing.assert_close(gate @ gate.T, torch.eye(8), atol=1e-5, rtol=0)


# --- rollouts ---------------------------------------------------------------------------------------------------------

ENDINGS = [[(3, "C"), (5, "T")], [(1, "T"), (2, "C"), (4, "C")], [(30, "C")], [(2, "C"), (2, "T"), (1, "C")]]


class WithoutHeads(nn.Module):
    """A recurrent policy that shows nothing but the protocol's two methods and its state's shape."""

    def __init__(self, policy):
        super().__init__()
        self.inner, self.state_shape = policy, policy.state_shape

    def evaluate(self, obs, actions, state, starts=None):
        return self.inner.evaluate(obs, actions, state, starts)

    def act(self, obs, deterministic=False, *, state):
        return self.inner.act(obs, deterministic, state=state)


def collected(kind="gru", same_step=False, rollouts=3, wrap=lambda policy: policy, groups=None, **fields):
    """An engine and what it collected of scripted episodes; the rollouts are those of one storage, one after another.

    Yields (engine, rollout) after each rollout, bootstrapped.
    """
    config = settings(**fields)
    policy = policy_for(kind)
    policy.double()
    engine = make_engine(config, wrap(policy), policy.distribution)
    parts = groups or [ENDINGS]
    firsts = np.cumsum([0, *map(len, parts)])
    envs = [
        EnvGroup(Scripted(part, same_step, first_row=int(first)), first_env=int(first))
        for part, first in zip(parts, firsts[:-1], strict=True)
    ]
    rollout = Rollout(
        config.num_steps, config.num_envs, OBS, spaces.Discrete(2), same_step=same_step, state_shape=engine.state_shape
    )
    collector = Collector(envs, rollout, engine.act, engine.value)
    collector.reset(0)
    for _ in range(rollouts):
        collector.collect()
        engine.bootstrap(rollout)
        yield engine, rollout


@cache
def lived(kind, count):
    """The values of scripted episodes, an observation at a time in double precision: {(row, episode): [values]}."""
    policy = policy_for(kind).double()
    values = {}
    for row, endings in enumerate(ENDINGS):
        for episode in range(count):
            length = endings[episode % len(endings)][0]
            state, found = torch.zeros(1, *policy.state_shape, dtype=torch.float64), []
            for step in range(length + 1):  # the final observation too
                obs = torch.tensor([1000.0 * row + 100.0 * episode + step]).view(1, 1)
                hidden, _ = policy._hidden({"obs": obs})
                out, state = by_hand(policy.memory, hidden[None], state, torch.zeros(1, 1, dtype=torch.bool))
                found.append(policy.critic(out[0]).item())
            values[row, episode] = found
    return values


@KIND
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("steps", [12, 5, 1])
@pytest.mark.parametrize("wrap", [lambda policy: policy, WithoutHeads], ids=["heads", "evaluate"])
def test_every_row_has_the_value_of_its_own_episode_so_far(kind, same_step, steps, wrap):
    """Across resets and edges of rollouts; a cut off episode's bootstrap goes on from its own state."""
    wanted = lived(kind, 40)
    rollouts = 36 // steps
    same = {"same_step": same_step, "wrap": wrap, "num_steps": steps}
    cut = 0
    for _, rollout in collected(kind, rollouts=rollouts, **same):
        obs = rollout.obs["obs"][..., 0].long()
        for t, row in np.argwhere(rollout.valid.numpy()):
            episode, step = divmod(int(obs[t, row]) - 1000 * int(row), 100)
            known = wanted[row, episode]
            assert rollout.values[t, row].item() == pytest.approx(known[step], abs=1e-5)
            if rollout.truncated[t, row]:
                after = rollout.final_values[t, row] if same_step else rollout.values[t + 1, row]
                assert after.item() == pytest.approx(known[step + 1], abs=1e-5)
                cut += 1
        for row in range(4):  # what follows the last step, where the episode goes on
            if not (rollout.terminated | rollout.truncated)[-1, row] and rollout.valid[-1, row]:
                episode, step = divmod(int(obs[-1, row]) - 1000 * row, 100)
                assert rollout.values[-1, row].item() == pytest.approx(wanted[row, episode][step], abs=1e-5)
    assert cut > 10


def test_groups_change_nothing():
    """Two groups of two, one of four."""
    runs = [[], []]
    for run, groups in zip(runs, ([ENDINGS], [ENDINGS[:2], ENDINGS[2:]]), strict=True):
        for _, rollout in collected(groups=groups):
            run.append([x.clone() for x in (rollout.values, rollout.logp, rollout.states, rollout.starts.double())])
    for one, two in zip(*runs, strict=True):
        for ours, theirs in zip(one, two, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


# --- updates ----------------------------------------------------------------------------------------------------------


def schedule(config):
    return Schedule(config.learning_rate, config.clip_coef, config.ent_coef, config.kl_coef)


def fill(rollout):
    generator = torch.Generator().manual_seed(1)
    for x in (rollout.advantages, rollout.returns):
        x.copy_(torch.randn(x.shape, generator=generator))


@KIND
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("wrap", [lambda policy: policy, WithoutHeads], ids=["heads", "evaluate"])
def test_every_ratio_is_one_at_first(kind, same_step, wrap):
    """The clip range is so narrow that a ratio off by 1e-5 would count as clipped; in the third rollout too."""
    one = {"num_minibatches": 1, "update_epochs": 1, "clip_coef": 1e-5}
    for engine, rollout in collected(kind, same_step, wrap=wrap, **one):  # noqa: B007
        pass
    assert rollout.states[0].abs().sum() > 0
    assert rollout.starts[1:].any()
    fill(rollout)
    metrics = engine.update(rollout, schedule(engine.config), 0)
    assert metrics["clip_fraction"] == 0.0
    assert abs(metrics["approx_kl"]) < 1e-9


@pytest.mark.parametrize("wrap", [lambda policy: policy, WithoutHeads], ids=["heads", "evaluate"])
def test_rows_that_carry_a_reset_change_nothing(wrap):
    results = []
    for garbage in (0.0, float("nan")):
        for engine, rollout in collected(wrap=wrap):  # noqa: B007
            pass
        fill(rollout)
        assert not rollout.valid.all()
        for x in (rollout.logp, rollout.advantages, rollout.returns):
            x[~rollout.valid] = garbage
        rollout.actions[~rollout.valid] = 0 if garbage == 0 else 1
        metrics = engine.update(rollout, schedule(engine.config), 0)
        results.append((engine.flat.data, metrics))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][1]["updates"] == 4


def test_the_gradient_is_that_of_the_rows_one_at_a_time():
    """One minibatch of everything; the loss of plain torch on what the equations give, row by row."""
    one = {"num_minibatches": 1, "update_epochs": 1, "max_grad_norm": None, "norm_adv": "none", "clip_vloss": False}
    for engine, rollout in collected(**one, ent_coef=0.01):  # noqa: B007
        pass
    fill(rollout)
    rollout.logp += 0.3 * torch.randn(rollout.logp.shape, generator=torch.Generator().manual_seed(5))
    policy, config, length = policy_for().double(), engine.config, rollout.num_steps
    hidden, _ = policy._hidden({"obs": rollout.obs["obs"][:length].flatten(0, 1)})
    out, _ = by_hand(
        policy.memory, hidden.unflatten(0, (length, 4)), rollout.states[0].double(), rollout.starts[:length]
    )
    family = torch.distributions.Categorical(logits=policy.actor(out))
    ratio = (family.log_prob(rollout.actions) - rollout.logp).exp()
    advantages = rollout.advantages
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    value_loss = 0.5 * (policy.critic(out).squeeze(-1) - rollout.returns) ** 2
    loss = -clipped + config.vf_coef * value_loss - 0.01 * family.entropy()
    loss[rollout.valid].mean().backward()
    engine.update(rollout, schedule(config), 0)
    for (name, p), q in zip(engine.policy.named_parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_minibatches_are_whole_environments_each_once_an_epoch():
    class Watching(RecurrentPolicy):
        def auxiliary_loss(self, minibatch):
            assert minibatch.state.shape == (2, 8)
            assert minibatch.starts.shape == minibatch.valid.shape == minibatch.logp.shape == (12, 2)
            self.__dict__.setdefault("seen", []).append(minibatch.returns.clone())
            return 0.0 * self.critic[0].weight.sum()

    distribution = Distribution.from_space(spaces.Discrete(2))
    policy = Watching(OBS, distribution, recurrent_size=8)
    engine = make_engine(settings(), policy, distribution)
    rollout = Rollout(12, 4, OBS, spaces.Discrete(2), state_shape=engine.state_shape)
    rollout.valid[:] = True
    rollout.returns.copy_(torch.arange(4).expand(12, 4))
    engine.update(rollout, schedule(engine.config), 0)
    epochs = [torch.cat(policy.seen[i : i + 2], dim=1) for i in (0, 2)]
    assert all(torch.equal(rows.sort(dim=1).values, rollout.returns) for rows in epochs)


@KIND
def test_the_exact_kl_is_of_whole_sequences(kind, monkeypatch):
    for engine, rollout in collected(kind, objective="kl", learning_rate=1e-2):  # noqa: B007
        pass
    fill(rollout)
    rollout.dist_params = {"logits": torch.zeros(12, 4, 2)}
    batch = engine._flatten(rollout)
    with torch.no_grad():
        old = engine.policy.heads(batch.whole.obs, batch.whole.state, batch.whole.starts)[0]["logits"]
    rollout.dist_params["logits"].copy_(old)
    monkeypatch.setattr("pyppo.engines.sequence_engine.KL_CHUNK", 12)  # an environment at a time
    metrics = engine.update(rollout, schedule(engine.config), 0)
    with torch.no_grad():
        new = engine.policy.heads(batch.whole.obs, batch.whole.state, batch.whole.starts)[0]["logits"]
    families = (torch.distributions.Categorical(logits=x) for x in (old, new))
    wanted = torch.distributions.kl_divergence(*families)[rollout.valid].mean().item()
    assert metrics["kl"] == pytest.approx(wanted, rel=1e-4)
    assert wanted > 1e-5


def test_more_minibatches_than_environments_are_refused():
    config = settings(num_minibatches=8)  # as good as any until the environments are known
    with pytest.raises(ValueError, match=r"num_minibatches is 8; it must be at most num_envs = 4, since the policy"):
        make_engine(config, policy_for(), Distribution.from_space(spaces.Discrete(2)))


def test_native_says_why_not():
    with pytest.raises(ValueError, match="engine is 'native'; it must be 'auto' or 'torch', since the policy is recur"):
        make_engine(settings(engine="native"), policy_for(), Distribution.from_space(spaces.Discrete(2)))


# --- acting and saving ------------------------------------------------------------------------------------------------


@KIND
def test_act_carries_the_state_and_changes_nothing(kind):
    policy = policy_for(kind)
    obs = torch.randn(6, 3, 1)
    logits, _, last = policy.heads({"obs": obs}, policy.initial_state(3))
    state = policy.initial_state(3)
    for t in range(6):
        given = state.clone()
        actions, after = policy.act(obs[t].numpy(), deterministic=True, state=state)
        np.testing.assert_array_equal(actions, logits["logits"][t].argmax(1))
        assert torch.equal(state, given)
        state = after
    torch.testing.assert_close(state, last)
    one, state = policy.act(obs[0, 0].numpy(), state=policy.initial_state(1))
    assert np.shape(one) == ()
    assert state.shape == (1, *policy.state_shape)


@pytest.mark.parametrize("state", [None, torch.zeros(2, 8), torch.zeros(3, 9)])
def test_act_without_the_right_state_says_what_to_pass(state):
    with pytest.raises(ValueError, match=r"state is .*; it must be a tensor of shape \(3, 8\): policy.initial_state"):
        policy_for().act(np.zeros((3, 1), np.float32), state=state)


@KIND
def test_recipe_makes_the_same_module(kind):
    policy = policy_for(kind, norm_obs=True)
    recipe = json.loads(json.dumps({"class": "RecurrentPolicy", **policy.to_dict()}))
    again = policy_from_recipe(recipe)
    assert type(again) is RecurrentPolicy
    again.load_state_dict(policy.state_dict())
    obs, state = {"obs": torch.randn(4, 2, 1)}, policy.initial_state(2)
    assert torch.equal(again.value(obs, state), policy.value(obs, state))


@pytest.mark.parametrize(
    "space", [spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3), spaces.Box(-1, 1, (2,), np.float32)]
)
@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_families_masks_images_and_memory_together(space, state_dependent_std):
    distribution = Distribution.from_space(space)
    entries = {
        "image": spaces.Box(0, 255, (7, 7, 3), np.uint8), "speed": spaces.Box(-1, 1, (2,), np.float32),
        "way": spaces.Discrete(4),
    }  # fmt: skip
    if distribution.kind != "normal":
        entries["action_mask"] = spaces.MultiBinary(distribution.num_params)
    obs_space = spaces.Dict(entries)
    policy = policy_for("lstm", space, obs_space, norm_obs=True, state_dependent_std=state_dependent_std)
    assert policy.network == "combined"
    config = settings(num_minibatches=1, update_epochs=1, clip_coef=1e-5)
    engine = make_engine(config, policy, distribution)
    rollout = Rollout(12, 4, obs_space, space, state_shape=engine.state_shape)
    torch.manual_seed(0)
    rollout.obs["image"].random_(0, 11)
    rollout.obs["speed"].normal_()
    rollout.obs["way"].random_(0, 4)
    if "action_mask" in entries:
        rollout.obs["action_mask"] = torch.rand(13, 4, distribution.num_params) < 0.7
        rollout.obs["action_mask"][..., [0, 2]] = True
    rollout.starts[0], rollout.starts[5, 1] = True, True
    for t in range(12):
        engine.act(rollout, t, slice(0, 4))
        rollout.steps += 1
    engine.bootstrap(rollout)
    fill(rollout)
    rollout.valid[:] = True
    assert engine.update(rollout, schedule(config), 0)["clip_fraction"] == 0.0


# --- learning ---------------------------------------------------------------------------------------------------------


def maze_config(**fields):
    return Config(**{
        "env_id": "maze", "num_envs": 16, "num_steps": 64, "num_minibatches": 4, "update_epochs": 4,
        "total_timesteps": 12_000, "learning_rate": 3e-3, "ent_coef": 0.01, "recurrent": "gru", "recurrent_size": 32,
        "hidden_sizes": (32,), "clip_vloss": False, "run_dir": None, "device": "cpu", **fields,
    })  # fmt: skip


@pytest.mark.parametrize(("kind", "maze", "same_step"), [("gru", TMaze, False), ("lstm", MaskedTMaze, True)])
def test_a_t_maze_is_solved_with_a_memory(kind, maze, same_step):
    with Trainer(maze_config(recurrent=kind), envs=maze(same_step=same_step), quiet=True) as trainer:
        result = trainer.train()
    for envs in (maze(), maze(same_step=True)):
        assert pyppo.evaluate(result.policy, envs=envs, episodes=64).mean > 0.95


def test_a_t_maze_is_not_solved_without_one():
    config = maze_config(recurrent="none", total_timesteps=20_000)
    with Trainer(config, envs=TMaze(), quiet=True) as trainer:
        result = trainer.train()
    assert 0.3 < pyppo.evaluate(result.policy, envs=TMaze(), episodes=100, deterministic=False).mean < 0.7


@pytest.mark.parametrize("kind", ["binary", "discrete"])
def test_several_actions_at_once_are_learned(kind):
    config = maze_config(recurrent="none", total_timesteps=8_000, num_steps=32)
    with Trainer(config, envs=Bits(kind), quiet=True) as trainer:
        result = trainer.train()
    assert pyppo.evaluate(result.policy, envs=Bits(kind), episodes=50).mean > 0.95


def test_a_run_is_saved_loaded_and_resumed(tmp_path):
    config = maze_config(total_timesteps=2_000, run_dir=str(tmp_path), num_steps=16, recurrent="lstm")
    with Trainer(config, envs=TMaze(), quiet=True) as trainer:
        run = trainer.train().run_dir
    loaded = pyppo.load(run)
    obs, state = {"obs": torch.randn(4, 2, 2)}, loaded.initial_state(2)
    assert torch.equal(loaded.value(obs, state), trainer.policy.value(obs, state))
    recipe = json.loads(
        (run / "checkpoints" / (run / "checkpoints/latest").read_text().strip() / "state.json").read_text()
    )
    assert recipe["policy"]["network"] == "mlp"
    assert recipe["engine"] == {"name": "torch", "reason": "native cannot: the policy is recurrent"}
    with Trainer.resume(run, envs=TMaze(), quiet=True, total_timesteps=3_000) as resumed:
        assert resumed.train().history["step"][-1] >= 3_000
    with pytest.raises(ValueError, match="recurrent is 'gru'; it must be 'lstm', as in the run"):
        Trainer.resume(run, envs=TMaze(), recurrent="gru", total_timesteps=4_000)
