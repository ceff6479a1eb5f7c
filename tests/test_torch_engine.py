"""TorchEngine against plain torch: the same loss, the same optimiser, the same rows."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from engine_cases import WithoutHeads
from gymnasium import spaces
from torch import nn

from pyppo import ops, reference
from pyppo.actions import Distribution, log_prob_entropy
from pyppo.config import Config
from pyppo.engines import Schedule, make_engine, resolve_device
from pyppo.policy import MLPPolicy
from pyppo.rollout import Rollout

T, N, OBS = 12, 5, 3
SPACES = {
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(3),
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
}
OBS_SPACE = spaces.Dict({"obs": spaces.Box(-np.inf, np.inf, (OBS,), np.float32)})


def settings(**fields):
    return Config(**{
        "env_id": "none", "num_envs": N, "num_steps": T, "num_minibatches": 4, "update_epochs": 3, "ent_coef": 0.01,
        "engine": "torch", "device": "cpu", "run_dir": None, **fields,
    })  # fmt: skip


def engine_for(space, config, wrap=lambda policy: policy, **policy_settings):
    distribution = Distribution.from_space(space)
    policy = MLPPolicy(OBS_SPACE, distribution, hidden_sizes=(8,), **policy_settings)
    return make_engine(config, wrap(policy), distribution)


def filled(engine, space, valid=None):
    """A rollout that `engine` acted in, with random advantages and returns."""
    torch.manual_seed(0)
    rollout = Rollout(T, N, OBS_SPACE, space, store_dist=engine.dist_shapes)
    rollout.obs["obs"].normal_()
    for t in range(T):
        for rows in (slice(0, 2), slice(2, N)):
            engine.act(rollout, t, rows)
            rollout.steps[rows] += 1
    engine.bootstrap(rollout)
    rollout.advantages.normal_()
    rollout.returns.normal_()
    rollout.valid[:] = True if valid is None else valid
    return rollout


def schedule(config):
    return Schedule(config.learning_rate, config.clip_coef, config.ent_coef, config.kl_coef)


# --- acting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_act_stores_what_the_policy_says(name):
    engine = engine_for(SPACES[name], settings(), norm_obs=True)
    rollout = filled(engine, SPACES[name])
    obs = {"obs": rollout.obs["obs"][:T].flatten(0, 1)}
    params, values = engine.policy.heads(obs)
    logp, _ = log_prob_entropy(engine.distribution, params, rollout.actions.flatten(0, 1))
    torch.testing.assert_close(rollout.logp.flatten(), logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.values[:T].flatten(), values, atol=1e-6, rtol=0)
    torch.testing.assert_close(rollout.values[T], engine.value({"obs": rollout.obs["obs"][T]}))


@pytest.mark.parametrize("name", SPACES)
def test_actions_do_not_depend_on_the_groups(name):
    engine = engine_for(SPACES[name], settings())
    apart = filled(engine, SPACES[name])
    together = Rollout(T, N, OBS_SPACE, SPACES[name])
    together.obs["obs"].copy_(apart.obs["obs"])
    for t in range(T):
        engine.act(together, t, slice(0, N))
        together.steps += 1
    torch.testing.assert_close(together.actions, apart.actions)


def test_the_environment_gets_a_clipped_copy():
    space = SPACES["box"]
    engine = engine_for(space, settings(), log_std_init=2.0)
    rollout = Rollout(T, N, OBS_SPACE, space)
    sent = engine.act(rollout, 0, slice(0, N))
    assert (rollout.actions[0].abs() > 1).any()
    np.testing.assert_array_equal(sent, rollout.actions[0].clamp(-1, 1).numpy())


# --- updating ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("wrap", [lambda policy: policy, WithoutHeads], ids=["heads", "evaluate"])
def test_every_ratio_is_one_at_first(name, wrap):
    """The clip range is so narrow that a ratio off by 1e-5 would count as clipped."""
    config = settings(num_minibatches=1, update_epochs=1, clip_coef=1e-5)
    engine = engine_for(SPACES[name], config, wrap)
    metrics = engine.update(filled(engine, SPACES[name]), schedule(config), 0)
    assert metrics["clip_fraction"] == 0.0
    assert abs(metrics["approx_kl"]) < 1e-9


def by_hand(policy, distribution, config, rollout, order_seed):
    """The update in plain torch: the reference loss, torch's clipping and Adam; the same permutations."""
    rows = rollout.valid.flatten().nonzero().squeeze(1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, eps=config.adam_eps)
    bounds = [len(rows) * i // config.num_minibatches for i in range(config.num_minibatches + 1)]
    obs = rollout.obs["obs"][:T].flatten(0, 1)
    columns = {
        "actions": rollout.actions.flatten(0, 1), "old_logp": rollout.logp.flatten(),
        "advantages": rollout.advantages.flatten(), "returns": rollout.returns.flatten(),
        "old_values": rollout.values[:T].flatten(),
    }  # fmt: skip
    for epoch in range(config.update_epochs):
        order = rows[ops.permutation(len(rows), seed=order_seed, iteration=3, epoch=epoch)]
        for start, stop in pairwise(bounds):
            index = order[start:stop]
            params, value = policy.heads({"obs": obs[index]})
            loss, _ = reference.ppo_loss(
                **params, **distribution.loss_arguments, **{k: x[index] for k, x in columns.items()}, values=value,
                objective=config.objective, clip_coef=config.clip_coef, clip_coef_high=config.clip_coef_high,
                dual_clip=config.dual_clip, value_clip_coef=config.clip_coef if config.clip_vloss else None,
                ent_coef=config.ent_coef, vf_coef=config.vf_coef, norm_adv=config.norm_adv == "minibatch",
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            optimizer.step()


# Each so far from its default that leaving the field out changes the parameters well beyond the tolerance.
FIELDS = [
    {"clip_coef": 0.01}, {"clip_coef": 0.01, "clip_coef_high": 0.1}, {"dual_clip": 1.01}, {"objective": "unclipped"},
    {"clip_coef": 0.01, "clip_vloss": False}, {"vf_coef": 2.0}, {"ent_coef": 0.5}, {"norm_adv": "none"},
    {"max_grad_norm": 0.05, "adam_eps": 0.1}, {"max_grad_norm": None, "adam_eps": 0.1},
]  # fmt: skip
CASES = [(name, {}) for name in SPACES] + [("discrete", fields) for fields in FIELDS]


@pytest.mark.parametrize(("name", "fields"), CASES, ids=[f"{name}-{fields}" for name, fields in CASES])
@pytest.mark.parametrize("wrap", [lambda policy: policy, WithoutHeads], ids=["heads", "evaluate"])
def test_update_is_plain_torchs(name, fields, wrap):
    config = settings(learning_rate=1e-2, **fields)
    engine = engine_for(SPACES[name], config, wrap)
    valid = torch.rand(T, N, generator=torch.Generator().manual_seed(1)) < 0.8
    rollout = filled(engine, SPACES[name], valid)
    plain = MLPPolicy(OBS_SPACE, engine.distribution, hidden_sizes=(8,))
    metrics = engine.update(rollout, schedule(config), 3)
    by_hand(plain, engine.distribution, config, rollout, engine._order_seed)
    trained = getattr(engine.policy, "inner", engine.policy)
    for (name, ours), theirs in zip(trained.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert metrics["updates"] == engine.step.item() == 12


class Watching(MLPPolicy):
    """Notes the rows of each minibatch by their returns, and adds a loss of its own."""

    weight = 0.0

    def auxiliary_loss(self, minibatch):
        self.__dict__.setdefault("seen", []).append(minibatch.returns.clone())
        return self.weight * sum((p**2).sum() for p in self.parameters())


def watching_engine(config, weight=0.0):
    distribution = Distribution.from_space(SPACES["discrete"])
    policy = Watching(OBS_SPACE, distribution, hidden_sizes=(8,))
    policy.weight = weight
    return make_engine(config, policy, distribution)


def test_minibatches_are_near_equal_and_take_each_valid_row_once_an_epoch():
    config = settings(num_minibatches=4, update_epochs=2)
    engine = watching_engine(config)
    valid = torch.ones(T, N, dtype=torch.bool)
    valid[3, :], valid[7, 1] = False, False
    rollout = filled(engine, SPACES["discrete"], valid)
    rollout.returns.copy_(torch.arange(T * N).reshape(T, N))
    engine.update(rollout, schedule(config), 0)
    sizes = [len(rows) for rows in engine.policy.seen]
    assert sizes == [13, 14, 13, 14] * 2
    epochs = torch.cat(engine.policy.seen[:4]), torch.cat(engine.policy.seen[4:])
    wanted = rollout.returns[valid]
    assert all(torch.equal(rows.sort().values, wanted) for rows in epochs)
    assert not torch.equal(*epochs)


def test_invalid_rows_change_nothing():
    config = settings()
    results = []
    for garbage in (0.0, float("nan")):
        engine = engine_for(SPACES["box"], config)
        rollout = filled(engine, SPACES["box"])
        rollout.valid[2:4] = False
        for tensor in (rollout.logp, rollout.advantages, rollout.returns, rollout.values, rollout.actions):
            tensor[2:4] = garbage
        metrics = engine.update(rollout, schedule(config), 0)
        results.append((engine.flat.data, metrics))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("valid_rows", [0, 1, 3])
def test_few_or_no_valid_rows(valid_rows):
    config = settings(num_minibatches=4, update_epochs=2)
    engine = engine_for(SPACES["box"], config)
    valid = torch.zeros(T, N, dtype=torch.bool)
    valid[0, :valid_rows] = True
    before = engine.flat.data.clone()
    metrics = engine.update(filled(engine, SPACES["box"], valid), schedule(config), 0)
    assert metrics["updates"] == 2 * valid_rows
    assert torch.equal(engine.flat.data, before) == (valid_rows == 0)
    assert engine.flat.data.isfinite().all()


def test_auxiliary_loss_is_added():
    config = settings(max_grad_norm=None, num_minibatches=1, update_epochs=1)
    engines = [watching_engine(config, weight) for weight in (0.0, 0.5)]
    before = engines[0].flat.data.clone()
    for engine in engines:
        engine.update(filled(engine, SPACES["discrete"]), schedule(config), 0)
    without, with_it = (engine.flat.grad for engine in engines)
    torch.testing.assert_close(with_it - without, before)  # the gradient of half the sum of squares


def test_target_kl_stops_before_the_step():
    config = settings(learning_rate=0.1, target_kl=0.01, update_epochs=10)
    engine = engine_for(SPACES["discrete"], config)
    metrics = engine.update(filled(engine, SPACES["discrete"]), schedule(config), 0)
    assert 1 <= metrics["updates"] < 40
    assert engine.step.item() == metrics["updates"]
    free = engine_for(SPACES["discrete"], settings(learning_rate=0.1, num_minibatches=4, update_epochs=10))
    free.update(filled(free, SPACES["discrete"]), schedule(config), 0)
    assert free.step.item() == 40


@pytest.mark.parametrize(("share", "updates"), [(1.51, 1), (1.49, 2)])
def test_target_kl_stops_above_one_and_a_half_times(share, updates):
    """The second step's minibatch has a k3 of `share` times the target."""
    fields = {"learning_rate": 0.1, "num_minibatches": 1}
    config = settings(**fields, update_epochs=1)
    engine = engine_for(SPACES["discrete"], config)
    rollout = filled(engine, SPACES["discrete"])
    engine.update(rollout, schedule(config), 0)
    params, _ = engine.policy.heads({"obs": rollout.obs["obs"][:T].flatten(0, 1)})
    log_ratio = log_prob_entropy(engine.distribution, params, rollout.actions.flatten())[0] - rollout.logp.flatten()
    k3 = (log_ratio.expm1() - log_ratio).mean().item()
    config = settings(**fields, update_epochs=2, target_kl=k3 / share)
    engine = engine_for(SPACES["discrete"], config)
    assert engine.update(filled(engine, SPACES["discrete"]), schedule(config), 0)["updates"] == updates


def test_frozen_parameters_stay():
    config = settings(learning_rate=0.1)

    def freeze(policy):
        policy.actor[0].requires_grad_(False)
        return policy

    engine = engine_for(SPACES["discrete"], config, freeze)
    before = {name: p.clone() for name, p in engine.policy.named_parameters()}
    engine.update(filled(engine, SPACES["discrete"]), schedule(config), 0)
    changed = {name for name, p in engine.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(before) - {"actor.0.weight", "actor.0.bias"}


@pytest.mark.parametrize("name", SPACES)
def test_kl_objective_gives_the_exact_kl_of_the_whole_batch(name):
    config = settings(objective="kl", learning_rate=1e-2, kl_target=0.01)
    engine = engine_for(SPACES[name], config)
    rollout = filled(engine, SPACES[name])
    obs = {"obs": rollout.obs["obs"][:T].flatten(0, 1)}
    old = {key: x.detach().clone() for key, x in engine.policy.heads(obs)[0].items()}
    metrics = engine.update(rollout, schedule(config), 0)
    family = engine.distribution.loss_arguments
    before = reference.make_distribution(**family, **spread(old))
    after = reference.make_distribution(**family, **spread(engine.policy.heads(obs)[0]))
    assert metrics["kl"] == pytest.approx(before.kl(after).mean().item(), rel=1e-3)
    assert metrics["kl"] > 1e-5


def spread(params):
    return {key: x.expand_as(params["mean"]) if key == "log_std" else x for key, x in params.items()}


@pytest.mark.parametrize("fields", [{"objective": "kl"}, {"adaptive_lr_kl": 0.01, "anneal_lr": False}])
def test_the_exact_kl_needs_heads(fields):
    with pytest.raises(ValueError, match="must have heads"):
        engine_for(SPACES["discrete"], settings(**fields), WithoutHeads)


def test_rescaled_actions_need_heads():
    distribution = Distribution.from_space(SPACES["box"], "rescale")
    policy = WithoutHeads(MLPPolicy(OBS_SPACE, distribution))
    with pytest.raises(ValueError, match="action_bounds is 'rescale'; it must be 'clip'"):
        make_engine(settings(action_bounds="rescale"), policy, distribution)


# --- state ------------------------------------------------------------------------------------------------------------


def test_state_is_by_parameter_name_and_continues_the_run():
    config = settings()
    straight, stopped, fresh = (engine_for(SPACES["box"], config) for _ in range(3))
    rollout = filled(straight, SPACES["box"])
    for engine in (straight, stopped):
        engine.update(rollout, schedule(config), 0)
    state = stopped.state_dict()
    assert set(state) == {"step"} | {f"{k}.{n}" for k in ("exp_avg", "exp_avg_sq") for n in stopped.flat.names}
    fresh.policy.load_state_dict(stopped.policy.state_dict())
    fresh.load_state_dict(state)
    for engine in (straight, fresh):
        engine.update(rollout, schedule(config), 1)
    assert torch.equal(straight.flat.data, fresh.flat.data)
    state.pop("exp_avg.log_std")
    with pytest.raises(ValueError, match=r"lacks exp_avg\.log_std"):
        fresh.load_state_dict(state)


def test_parameters_that_moved_are_found_again():
    config = settings()
    still, moved = (engine_for(SPACES["box"], config) for _ in range(2))
    rollout = filled(still, SPACES["box"])
    for engine in (still, moved):
        engine.update(rollout, schedule(config), 0)
    moved.policy.load_state_dict({k: v.clone() for k, v in moved.policy.state_dict().items()}, assign=True)
    for engine in (still, moved):
        engine.update(rollout, schedule(config), 1)
    assert all(torch.equal(a, b) for a, b in zip(still.policy.parameters(), moved.policy.parameters(), strict=True))


def test_double_precision_policy():
    config = settings()
    engine = engine_for(SPACES["box"], config, lambda policy: policy.double())
    assert engine.update(filled(engine, SPACES["box"]), schedule(config), 0)["updates"] == 12
    assert engine.flat.data.dtype == torch.float64


def test_devices():
    module = nn.Linear(1, 1)
    assert resolve_device("auto", module) == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is 'cuda'"):
            resolve_device("cuda", module)
