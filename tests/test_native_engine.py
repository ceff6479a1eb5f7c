"""NativeEngine against TorchEngine, and what it promises beyond: the same bits however its work is divided."""

import copy

import numpy as np
import pytest
import torch
from engine_cases import (
    SPACES,
    N,
    T,
    act_in,
    assert_same_metrics,
    assert_same_state,
    engine_on,
    engine_pair,
    filled,
    new_rollout,
    schedule,
    settings,
    some_valid,
    state_of,
)
from gymnasium import spaces

from pyppo.engines import valid_indices
from pyppo.engines.objective import APPROX_KL, STATS

DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
FAMILY = pytest.mark.parametrize("name", SPACES)

# (state, metrics): tolerances of one step and of a whole update. The rollout is float32 in either case.
EXACT = {"rtol": 1e-8, "atol": 1e-10}
ROUGH = {"rtol": 2e-4, "atol": 2e-5}


def tolerance(double):
    return EXACT if double else ROUGH


def box_of(features):
    return spaces.Dict({"obs": spaces.Box(-np.inf, np.inf, (features,), np.float32)})


# --- acting -----------------------------------------------------------------------------------------------------------


def assert_acts_alike(native, general, space, *, double, **shape):
    rollouts = [new_rollout(engine, space, **shape) for engine in (native, general)]
    sent = [act_in(engine, rollout, [4, N - 4]) for engine, rollout in zip((native, general), rollouts, strict=True)]
    assert sent[0].dtype == sent[1].dtype
    assert sent[0].shape == sent[1].shape
    near = {"rtol": 1e-6, "atol": 1e-6} if double else {"rtol": 2e-5, "atol": 1e-5}
    np.testing.assert_allclose(sent[0], sent[1], **near)
    for field in ("actions", "logp", "values"):
        ours, theirs = (getattr(rollout, field) for rollout in rollouts)
        torch.testing.assert_close(ours, theirs, **near, msg=lambda text, field=field: f"{field}: {text}")
    for key, kept in (rollouts[0].dist_params or {}).items():
        torch.testing.assert_close(kept, rollouts[1].dist_params[key], **near)
    return sent[0], rollouts[0]


@FAMILY
@DOUBLE
@pytest.mark.parametrize("norm_obs", [False, True])
def test_act_is_the_general_engines(name, double, norm_obs):
    config = settings(adaptive_lr_kl=0.01, anneal_lr=False)  # so that the distribution is kept
    native, general = engine_pair(SPACES[name], config, double=double, norm_obs=norm_obs, log_std_init=0.3)
    assert_acts_alike(native, general, SPACES[name], double=double)


SENT = {
    "start": (spaces.Discrete(3, start=-1), "clip"),
    "starts": (spaces.MultiDiscrete([2, 3], start=[4, -7]), "clip"),
    "int32": (spaces.MultiDiscrete([2, 3], dtype=np.int32), "clip"),
    "grid": (spaces.MultiDiscrete([[2, 3], [4, 2]]), "clip"),
    "bits": (spaces.MultiBinary((2, 2)), "clip"),
    "float64": (spaces.Box(-0.5, 0.25, (2,), np.float64), "clip"),
    "one side": (spaces.Box(np.array([-0.1, -np.inf]), np.array([np.inf, 0.1]), dtype=np.float32), "clip"),
    "number": (spaces.Box(-0.5, 0.5, (), np.float32), "clip"),
    "matrix": (spaces.Box(-0.5, 0.5, (2, 2), np.float32), "clip"),
    "rescaled": (spaces.Box(np.array([0.0, -np.inf]), np.array([10.0, np.inf]), dtype=np.float32), "rescale"),
    "rescaled float64": (spaces.Box(-3.0, 0.5, (2, 2), np.float64), "rescale"),
}


@pytest.mark.parametrize("name", SENT)
@DOUBLE
def test_environments_are_sent_what_their_space_takes(name, double):
    space, action_bounds = SENT[name]
    native, general = engine_pair(space, settings(action_bounds=action_bounds), double=double)
    sent, rollout = assert_acts_alike(native, general, space, double=double)
    assert sent.dtype == space.dtype
    assert all(space.contains(np.asarray(action, dtype=space.dtype)) for step in sent for action in step)
    if not double:
        wanted = native.distribution.to_env(rollout.actions.flatten(0, 1).numpy())
        atol = 1e-6 if action_bounds == "rescale" else 0
        np.testing.assert_allclose(sent.reshape(wanted.shape), wanted, rtol=0, atol=atol)


def test_what_was_sent_is_a_copy():
    space = SPACES["box"]
    engine = engine_on("native", space, settings())
    rollout = new_rollout(engine, space)
    first = engine.act(rollout, 0, slice(0, N))
    kept = first.copy()
    engine.act(rollout, 1, slice(0, N))
    np.testing.assert_array_equal(first, kept)
    first[:] = 9.0
    assert not (rollout.actions[0] == 9.0).any()


OBSERVATIONS = {
    "matrix": spaces.Dict(obs=spaces.Box(-1, 1, (2, 3), np.float32)),
    "number": spaces.Dict(obs=spaces.Box(-1, 1, (), np.float32)),
    "float64": spaces.Dict(obs=spaces.Box(-1, 1, (3,), np.float64)),
    "bytes": spaces.Dict(obs=spaces.Box(0, 255, (2, 2), np.uint8)),
    "integers": spaces.Dict(obs=spaces.Box(0, 255, (2,), np.int64)),
    "several": spaces.Dict(b=spaces.Box(-1, 1, (2,), np.float32), a=spaces.Box(0, 255, (2,), np.uint8)),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
@pytest.mark.parametrize("norm_obs", [False, True])
def test_every_kind_of_observation(name, norm_obs):
    space, config = SPACES["box"], settings()
    how = {"obs_space": OBSERVATIONS[name]}
    native, general = engine_pair(space, config, norm_obs=norm_obs, clip_obs=1.5, **how)
    assert_acts_alike(native, general, space, double=False, **how)
    rollout = filled(general, space, **how)
    metrics = [engine.update(rollout, schedule(config), 0) for engine in (native, general)]
    assert_same_state(native, general, **ROUGH)
    assert_same_metrics(*metrics, **ROUGH)
    some = {key: x[2] for key, x in rollout.obs.items()}
    torch.testing.assert_close(native.value(some), general.value(some), rtol=1e-5, atol=1e-5)


def test_values_of_other_observations():
    native, general = engine_pair(SPACES["box"], settings(), norm_obs=True)
    obs = {"obs": np.random.default_rng(0).normal(size=(5, 3))}  # float64, as Gymnasium may give them
    unbound = native.value(obs)
    act_in(native, new_rollout(native, SPACES["box"]))
    for values in (unbound, native.value(obs)):
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, general.value(obs))


def test_statistics_are_those_of_the_policy_at_each_rollout():
    """Statistics change between rollouts, and the second rollout begins where the first ended."""
    native, general = engine_pair(SPACES["box"], settings(), norm_obs=True)
    rollouts = [new_rollout(engine, SPACES["box"]) for engine in (native, general)]
    for _ in range(2):
        for engine, rollout in zip((native, general), rollouts, strict=True):
            act_in(engine, rollout)
            engine.policy.normalizer.update({"obs": rollout.obs["obs"][0] * 5 + 2})
        torch.testing.assert_close(rollouts[0].logp, rollouts[1].logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rollouts[0].values, rollouts[1].values, rtol=1e-5, atol=1e-5)


def test_a_policy_that_is_not_a_number_is_refused():
    space = SPACES["discrete"]
    engine = engine_on("native", space, settings())
    rollout = new_rollout(engine, space)
    rollout.obs["obs"][1, 7] = torch.nan
    engine.act(rollout, 0, slice(0, N))
    with pytest.raises(ValueError, match="row 7"):
        engine.act(rollout, 1, slice(4, N))


# --- the same bits ----------------------------------------------------------------------------------------------------


def written(rollout):
    return [rollout.actions, rollout.logp, rollout.values, *(rollout.dist_params or {}).values()]


@FAMILY
@DOUBLE
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
def test_act_gives_the_same_bits_however_rows_are_batched(name, double, activation):
    rows = 37
    space, config = SPACES[name], settings(objective="kl", num_envs=rows)
    engine = engine_on("native", space, config, double=double, hidden_sizes=(17, 64), activation=activation)
    together = new_rollout(engine, space, rows=rows)
    sent = act_in(engine, together)
    for parts in ([1] * rows, [5, 16, 1, 15], [rows - 1, 1]):
        apart = new_rollout(engine, space, rows=rows)
        np.testing.assert_array_equal(act_in(engine, apart, parts), sent)
        assert all(torch.equal(a, b) for a, b in zip(written(apart), written(together), strict=True))


@FAMILY
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
@pytest.mark.parametrize("hidden_sizes", [(), (17,), (64, 64), (100, 3, 5)])
@pytest.mark.parametrize("shared_trunk", [False, True])
def test_every_ratio_is_one_at_first(name, activation, hidden_sizes, shared_trunk):
    """To the bit, in whatever groups the rows acted and in whatever minibatch they are now."""
    space = SPACES[name]
    config = settings(num_minibatches=5, update_epochs=1, clip_coef=1e-7)
    how = {"hidden_sizes": hidden_sizes, "activation": activation, "shared_trunk": shared_trunk, "norm_obs": True}
    engine = engine_on("native", space, config, **how)
    rollout = filled(engine, space)
    act_in(engine, rollout, [1, 4, N - 5])
    rollout.valid[:] = some_valid()
    table = engine._minibatches(valid_indices(rollout.valid), schedule(config), 0)
    assert table.shape == (5, 10)
    assert table[0, APPROX_KL] == 0.0
    assert table[0, STATS.index("clip_fraction")] == 0.0
    assert table[:, len(STATS)].sum() == rollout.valid.sum()


@pytest.mark.parametrize("name", ["discrete", "box"])
@DOUBLE
@pytest.mark.parametrize("shared_trunk", [False, True])
@pytest.mark.parametrize("hidden_sizes", [(64, 64), (64, 3), (7, 31)])
def test_threads_change_no_bit(name, double, shared_trunk, hidden_sizes, kernel_threads):
    space, shape = SPACES[name], {"steps": 64, "rows": 64}
    config = settings(num_steps=64, num_envs=64, num_minibatches=3, update_epochs=2, objective="kl", target_kl=10.0)
    results = []
    for threads in (1, 2, 7):
        kernel_threads(threads)
        how = {"double": double, "hidden_sizes": hidden_sizes, "shared_trunk": shared_trunk}
        engine = engine_on("native", space, config, **how)
        rollout = filled(engine, space, **shape)
        metrics = engine.update(rollout, schedule(config), 0)
        results.append((metrics, state_of(engine), written(rollout)))
    for metrics, state, stored in results[1:]:
        assert metrics == results[0][0]
        assert all(torch.equal(x, results[0][1][key]) for key, x in state.items())
        assert all(torch.equal(x, y) for x, y in zip(stored, results[0][2], strict=True))


# --- updating ---------------------------------------------------------------------------------------------------------


def assert_updates_alike(space, config, *, double, valid=None, drift=0.0, shape=None, iterations=1, **how):
    """Both engines, from one rollout that the general engine acted in."""
    native, general = engine_pair(space, config, double=double, **how)
    sizes = {**(shape or {}), **({"obs_space": how["obs_space"]} if "obs_space" in how else {})}
    for iteration in range(iterations):
        rollout = filled(general, space, valid=valid, drift=drift, **sizes)
        metrics = [engine.update(rollout, schedule(config), iteration) for engine in (native, general)]
        assert_same_state(native, general, **tolerance(double))
        assert_same_metrics(*metrics, **tolerance(double))
    return native, metrics[0]


@FAMILY
@DOUBLE
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
@pytest.mark.parametrize("shared_trunk", [False, True])
def test_one_step(name, double, activation, shared_trunk):
    config = settings(num_minibatches=1, update_epochs=1)
    how = {"activation": activation, "shared_trunk": shared_trunk, "hidden_sizes": (8, 5)}
    _, metrics = assert_updates_alike(SPACES[name], config, double=double, drift=0.1, **how)
    assert metrics["updates"] == 1


@FAMILY
@DOUBLE
@pytest.mark.parametrize("shared_trunk", [False, True])
def test_updates(name, double, shared_trunk):
    how = {"shared_trunk": shared_trunk, "norm_obs": True, "log_std_init": -0.5}
    native, metrics = assert_updates_alike(
        SPACES[name], settings(), double=double, valid=some_valid(), drift=0.1, iterations=2, **how
    )
    assert metrics["updates"] == 12
    assert native.step.item() == 24


SIZES = [
    (1, (1,)), (3, ()), (1, ()), (17, (3, 17)), (64, (64, 64)), (100, (100,)), (3, (17, 1, 3)), (5, (130, 65)),
    (2, (16, 32, 48)),
]  # fmt: skip


@pytest.mark.parametrize(("features", "hidden_sizes"), SIZES)
@pytest.mark.parametrize("name", ["multi-discrete", "box"])
@pytest.mark.parametrize("shared_trunk", [False, True])
def test_sizes_of_layers(features, hidden_sizes, name, shared_trunk):
    how = {"obs_space": box_of(features), "hidden_sizes": hidden_sizes, "shared_trunk": shared_trunk}
    assert_updates_alike(SPACES[name], settings(update_epochs=2), double=True, valid=some_valid(), **how)


@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (1, 2), (3, 21), (5, 67), (16, 32), (16, 67)])
@DOUBLE
def test_sizes_of_rollouts(steps, rows, double):
    config = settings(num_steps=steps, num_envs=rows, num_minibatches=1 if steps * rows < 3 else 3, update_epochs=2)
    assert_updates_alike(SPACES["box"], config, double=double, shape={"steps": steps, "rows": rows})


# Layers whose weights are packed for minibatches of 128 rows and more: hidden ones, the first, a head behind a trunk.
WIDE = {
    "hidden": (SPACES["box"], {"hidden_sizes": (257, 301)}),
    "first": (SPACES["discrete"], {"hidden_sizes": (256,), "obs_space": box_of(261)}),
    "head": (spaces.Discrete(300), {"hidden_sizes": (31, 301), "shared_trunk": True}),
    "trunk": (SPACES["multi-discrete"], {"hidden_sizes": (256, 256), "shared_trunk": True}),
}
WIDE_ROLLOUT = {"steps": 16, "rows": 35}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("num_minibatches", [1, 3, 5], ids=["560 rows", "187 rows", "112 rows, not packed"])
def test_wide_layers(name, num_minibatches):
    space, how = WIDE[name]
    config = settings(num_steps=16, num_envs=35, num_minibatches=num_minibatches, update_epochs=2)
    assert_updates_alike(space, config, double=True, shape=WIDE_ROLLOUT, **how)


@pytest.mark.parametrize("name", WIDE)
@DOUBLE
def test_wide_layers_give_the_same_bits_packed_or_not(name, double, kernel_threads):
    """Acting packs nothing, so a ratio that is not 1 at first would be a difference; nor do threads make one."""
    space, how = WIDE[name]
    config = settings(num_steps=16, num_envs=35, num_minibatches=2, update_epochs=2)
    states = []
    for threads in (1, 2, 7):
        kernel_threads(threads)
        engine = engine_on("native", space, config, double=double, **how)
        obs_space = {"obs_space": how["obs_space"]} if "obs_space" in how else {}
        rollout = filled(engine, space, **WIDE_ROLLOUT, **obs_space)
        table = engine._minibatches(valid_indices(rollout.valid), schedule(config), 0)
        assert double or table[0, APPROX_KL] == 0.0
        states.append(state_of(engine))
    for state in states[1:]:
        assert all(torch.equal(x, states[0][key]) for key, x in state.items())


# Each so far from its default that leaving the field out changes the parameters well beyond the tolerance.
FIELDS = [
    {"clip_coef": 0.01}, {"clip_coef": 0.01, "clip_coef_high": 0.1}, {"dual_clip": 1.01}, {"objective": "unclipped"},
    {"objective": "kl", "kl_coef": 3.0}, {"clip_coef": 0.01, "clip_vloss": False}, {"vf_coef": 2.0}, {"vf_coef": 0.0},
    {"ent_coef": 0.5}, {"ent_coef": 0.0}, {"norm_adv": "none"}, {"norm_adv": "batch"}, {"max_grad_norm": None},
    {"max_grad_norm": 0.05, "adam_eps": 0.1}, {"max_grad_norm": None, "adam_eps": 0.1}, {"learning_rate": 0.02},
    {"adaptive_lr_kl": 0.01, "anneal_lr": False}, {"num_minibatches": 7}, {"num_minibatches": 1},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@FAMILY
def test_settings(fields, name):
    assert_updates_alike(SPACES[name], settings(**fields), double=True, valid=some_valid(), drift=0.1)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_settings_in_single_precision(fields):
    config = settings(**{"update_epochs": 1, **fields})
    assert_updates_alike(SPACES["box"], config, double=False, valid=some_valid(), drift=0.1)


@FAMILY
@DOUBLE
@pytest.mark.parametrize("fields", [{"objective": "kl"}, {"adaptive_lr_kl": 0.01, "anneal_lr": False}], ids=str)
def test_the_exact_kl(name, double, fields):
    config = settings(learning_rate=1e-2, **fields)
    native, general = engine_pair(SPACES[name], config, double=double)
    rollout = filled(general, SPACES[name], valid=some_valid())
    ours, theirs = (engine.update(rollout, schedule(config), 0)["kl"] for engine in (native, general))
    assert ours == pytest.approx(theirs, rel=1e-6 if double else 1e-2)
    assert ours > 1e-4


@pytest.mark.parametrize("name", ["discrete", "box"])
def test_invalid_rows_change_nothing(name):
    results = []
    for garbage in (0.0, float("nan")):
        config = settings(objective="kl")
        engine = engine_on("native", SPACES[name], config)
        rollout = filled(engine, SPACES[name])
        rollout.valid[2:4] = False
        for tensor in (rollout.logp, rollout.advantages, rollout.returns, rollout.values, rollout.obs["obs"]):
            tensor[2:4] = garbage
        rollout.actions[2:4] = garbage if rollout.actions.is_floating_point() else 2**40
        for kept in rollout.dist_params.values():
            kept[2:4] = garbage
        results.append((engine.update(rollout, schedule(config), 0), state_of(engine)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(x, results[1][1][key]) for key, x in results[0][1].items())


@pytest.mark.parametrize("valid_rows", [0, 1, 3])
@pytest.mark.parametrize("norm_adv", ["minibatch", "none"])
def test_few_or_no_valid_rows(valid_rows, norm_adv):
    """Four minibatches of at most one row each."""
    config = settings(update_epochs=2, norm_adv=norm_adv)
    valid = torch.zeros(T, N, dtype=torch.bool)
    valid[0, :valid_rows] = True
    _, metrics = assert_updates_alike(SPACES["box"], config, double=True, valid=valid)
    assert metrics["updates"] == 2 * valid_rows


@FAMILY
@pytest.mark.parametrize("num_minibatches", [1, 4])
def test_target_kl_stops_before_the_same_step(name, num_minibatches):
    config = settings(learning_rate=0.02, target_kl=0.01, update_epochs=20, num_minibatches=num_minibatches)
    native, metrics = assert_updates_alike(SPACES[name], config, double=True)
    assert 1 <= metrics["updates"] < 20 * num_minibatches
    assert native.step.item() == metrics["updates"]


def test_a_first_step_beyond_target_kl_is_not_taken():
    config = settings(target_kl=1e-6)
    native, metrics = assert_updates_alike(SPACES["box"], config, double=True, drift=1.0)
    assert metrics["updates"] == 0
    assert np.isnan(metrics["loss"])
    assert native.step.item() == 0


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("native", "torch"), ("torch", "native")], ids="-".join)
def test_engines_go_on_from_each_other(order):
    space, config = SPACES["box"], settings(learning_rate=1e-2)
    straight = engine_on("torch", space, config, double=True)
    first, second = (engine_on(name, space, config, double=True) for name in order)
    rollout = filled(straight, space)
    for iteration in range(2):
        straight.update(rollout, schedule(config), iteration)
    first.update(rollout, schedule(config), 0)
    second.policy.load_state_dict(first.policy.state_dict())
    second.load_state_dict(first.state_dict())
    second.update(rollout, schedule(config), 1)
    assert_same_state(second, straight, **EXACT)


def test_state_that_lacks_a_parameter_is_refused():
    engine = engine_on("native", SPACES["box"], settings())
    state = engine.state_dict()
    assert set(state) == {"step"} | {f"{k}.{n}" for k in ("exp_avg", "exp_avg_sq") for n in engine.flat.names}
    state.pop("exp_avg.log_std")
    with pytest.raises(ValueError, match=r"lacks exp_avg\.log_std"):
        engine.load_state_dict(state)


def assign(policy):
    policy.load_state_dict({key: x.clone() for key, x in policy.state_dict().items()}, assign=True)


@pytest.mark.parametrize("look", [False, True], ids=["", "state-looked-at"])
@pytest.mark.parametrize("move", [assign, lambda policy: policy.double().float()], ids=["assign", "dtype"])
def test_parameters_that_moved_are_found_again(move, look):
    """Also where the state was saved in between, which binds the flat buffer anew by itself."""
    space, config = SPACES["box"], settings()
    still, moved = (engine_on("native", space, config) for _ in range(2))
    rollouts = [filled(engine, space) for engine in (still, moved)]
    for iteration in range(2):
        for engine, rollout in zip((still, moved), rollouts, strict=True):
            act_in(engine, rollout)
            engine.update(rollout, schedule(config), iteration)
        move(moved.policy)
        if look:
            moved.state_dict()
    for engine, rollout in zip((still, moved), rollouts, strict=True):
        act_in(engine, rollout)
        engine.update(rollout, schedule(config), 2)
    assert all(torch.equal(x, y) for x, y in zip(written(rollouts[0]), written(rollouts[1]), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(state_of(still).values(), state_of(moved).values(), strict=True))


def test_another_dtype_in_the_middle_of_a_run():
    space, config = SPACES["box"], settings()
    native, general = engine_pair(space, config, double=True)
    rollout = filled(general, space)
    for engine in (native, general):
        engine.policy.float()
        engine.update(rollout, schedule(config), 0)
        engine.policy.double()
        engine.update(rollout, schedule(config), 1)
    assert native.flat.data.dtype == torch.float64
    assert_same_state(native, general, **ROUGH)


def test_a_copied_policy_trains_apart():
    space, config = SPACES["box"], settings()
    engine = engine_on("native", space, config)
    rollout = filled(engine, space)
    twin = engine_on("native", space, config)
    twin.policy = copy.deepcopy(engine.policy)
    before = [p.clone() for p in twin.policy.parameters()]
    engine.update(rollout, schedule(config), 0)
    assert all(torch.equal(p, q) for p, q in zip(before, twin.policy.parameters(), strict=True))
    again = type(engine)(copy.deepcopy(engine.policy), config, engine.device, engine.distribution)
    again.load_state_dict(engine.state_dict())
    for one in (engine, again):
        one.update(rollout, schedule(config), 1)
    assert all(torch.equal(x, y) for x, y in zip(state_of(engine).values(), state_of(again).values(), strict=True))


def test_another_rollout_is_bound():
    space, config = SPACES["box"], settings()
    engine = engine_on("native", space, config)
    first, second = filled(engine, space), filled(engine, space)
    assert torch.equal(first.logp, second.logp)
    first.logp.zero_()
    first.steps -= T - 3  # the noise of the fourth step once more
    engine.act(first, 3, slice(0, N))
    assert torch.equal(first.logp[3], second.logp[3])
    assert not first.logp[:3].any()


def test_a_saved_tensor_notices_the_update():
    space, config = SPACES["discrete"], settings()
    engine = engine_on("native", space, config)
    rollout = filled(engine, space)
    loss = engine.policy.value({"obs": rollout.obs["obs"][0]}).square().sum()
    engine.update(rollout, schedule(config), 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_that_no_layer_has_stay_zero():
    """A parameter that the networks do not use is in the flat buffer too; torch gives it no step either."""
    space, config = SPACES["discrete"], settings()
    engine = engine_on("native", space, config)
    engine.policy.extra = torch.nn.Parameter(torch.ones(3))
    rollout = filled(engine, space)
    engine.policy.extra.grad.fill_(5.0)
    engine.update(rollout, schedule(config), 0)
    assert torch.equal(engine.policy.extra, torch.ones(3))
