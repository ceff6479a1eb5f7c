"""NativeEngine does what TorchEngine does, to rounding: it acts, updates and goes on alike."""

import numpy as np
import pytest
import torch
from engine_cases import (
    DOUBLE,
    FAMILY,
    SPACES,
    N,
    T,
    act_in,
    assert_same_metrics,
    assert_same_state,
    box_obs,
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
from pyppo.engines.objective import APPROX_KL

# (state, metrics): tolerances of one step and of a whole update. The rollout is float32 in either case.
EXACT = {"rtol": 1e-8, "atol": 1e-10}
ROUGH = {"rtol": 2e-4, "atol": 2e-5}


def tolerance(double):
    return EXACT if double else ROUGH


# --- acting -----------------------------------------------------------------------------------------------------------


def assert_acts_alike(native, general, space, *, double, **shape):
    rollouts = [new_rollout(engine, space, **shape) for engine in (native, general)]
    parts = [4, rollouts[0].num_envs - 4]
    sent = [act_in(engine, rollout, parts) for engine, rollout in zip((native, general), rollouts, strict=True)]
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
    how = {"obs_space": box_obs(features), "hidden_sizes": hidden_sizes, "shared_trunk": shared_trunk}
    assert_updates_alike(SPACES[name], settings(update_epochs=2), double=True, valid=some_valid(), **how)


@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (1, 2), (3, 21), (5, 67), (16, 32), (16, 67)])
@DOUBLE
def test_sizes_of_rollouts(steps, rows, double):
    config = settings(num_steps=steps, num_envs=rows, num_minibatches=1 if steps * rows < 3 else 3, update_epochs=2)
    assert_updates_alike(SPACES["box"], config, double=double, shape={"steps": steps, "rows": rows})


# Layers whose weights are packed for minibatches of 128 rows and more: hidden ones, the first, a head behind a trunk.
WIDE = {
    "hidden": (SPACES["box"], {"hidden_sizes": (257, 301)}),
    "first": (SPACES["discrete"], {"hidden_sizes": (256,), "obs_space": box_obs(261)}),
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


# --- a log-std of each state's own ------------------------------------------------------------------------------------


OWN_STD = {"state_dependent_std": True, "log_std_init": -0.5}


@DOUBLE
@pytest.mark.parametrize("shared_trunk", [False, True])
@pytest.mark.parametrize("actions", [1, 2, 3, 4, 11])
def test_a_state_dependent_deviation(actions, shared_trunk, double):
    """Acting, updates with a KL penalty, and the exact KL; widths that tiles are loaded and stored by in every way."""
    space = spaces.Box(-1.0, 1.0, (actions,), np.float32)
    config = settings(objective="kl", ent_coef=0.1, num_envs=67)
    how = {"shared_trunk": shared_trunk, "norm_obs": True, **OWN_STD}
    shape = {"rows": 67}
    pair = engine_pair(space, config, double=double, **how)
    sent, rollout = assert_acts_alike(*pair, space, double=double, **shape)
    assert sent.shape == (T, 67, actions)
    assert rollout.dist_params["log_std"].std() > 0.1
    _, metrics = assert_updates_alike(space, config, double=double, drift=0.1, shape=shape, iterations=2, **how)
    assert metrics["kl"] > 1e-5


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_settings_with_a_state_dependent_deviation(fields):
    config = settings(**fields)
    assert_updates_alike(SPACES["box"], config, double=True, valid=some_valid(), drift=0.1, **OWN_STD)


# --- going on ---------------------------------------------------------------------------------------------------------


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
