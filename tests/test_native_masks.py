"""NativeEngine under action masks: what TorchEngine does, to rounding, and the same bits however it is divided."""

import numpy as np
import pytest
import torch
from engine_cases import (
    DOUBLE,
    MASKABLE,
    SPACES,
    N,
    T,
    act_in,
    allowed,
    assert_same_metrics,
    assert_same_state,
    engine_on,
    engine_pair,
    filled,
    masked_obs,
    new_rollout,
    schedule,
    settings,
    some_valid,
    state_of,
)
from gymnasium import spaces

from pyppo import ops
from pyppo.engines import valid_indices
from pyppo.engines.native_engine import NativeEngine
from pyppo.engines.objective import APPROX_KL, STATS

FAMILY = pytest.mark.parametrize("name", MASKABLE)
TRUNK = pytest.mark.parametrize("shared_trunk", [False, True], ids=["", "shared-trunk"])
EXACT = {"rtol": 1e-8, "atol": 1e-10}
ROUGH = {"rtol": 2e-4, "atol": 2e-5}
SEVERAL = {
    "b": spaces.Box(-1, 1, (2,), np.float32), "a": spaces.Box(0, 255, (2,), np.uint8), "c": spaces.Discrete(3),
}  # fmt: skip


def several_obs(space):
    return spaces.Dict({**masked_obs(space).spaces, **SEVERAL})


def masks_of(rollout, steps=T):
    return rollout.obs["action_mask"][:steps].flatten(0, 1)


def written(rollout):
    return [rollout.actions, rollout.logp, rollout.values, *(rollout.dist_params or {}).values()]


# --- as TorchEngine does ----------------------------------------------------------------------------------------------


@FAMILY
@DOUBLE
@TRUNK
def test_act_is_the_general_engines(name, double, shared_trunk):
    space, config = SPACES[name], settings(objective="kl")
    obs_space = masked_obs(space)
    pair = engine_pair(space, config, obs_space=obs_space, double=double, shared_trunk=shared_trunk, norm_obs=True)
    rollouts = [new_rollout(engine, space, obs_space=obs_space) for engine in pair]
    sent = [act_in(engine, rollout, [4, N - 4]) for engine, rollout in zip(pair, rollouts, strict=True)]
    np.testing.assert_array_equal(*sent)
    near = {"rtol": 1e-6, "atol": 1e-6} if double else {"rtol": 2e-5, "atol": 1e-5}
    for ours, theirs in zip(*map(written, rollouts), strict=True):
        torch.testing.assert_close(ours, theirs, **near)
    assert allowed(pair[0].distribution, masks_of(rollouts[0]), rollouts[0].actions.flatten(0, 1)).all()


@FAMILY
@DOUBLE
@TRUNK
@pytest.mark.parametrize("objective", ["clip", "kl"])
def test_updates_are_the_general_engines(name, double, shared_trunk, objective):
    """Also the exact KL. The masks of rows that do not count allow nothing."""
    space, config = SPACES[name], settings(objective=objective, ent_coef=0.1, clip_coef=0.1)
    obs_space = masked_obs(space)
    how = {"double": double, "shared_trunk": shared_trunk, "hidden_sizes": (8, 5)}
    pair = engine_pair(space, config, obs_space=obs_space, **how)
    near = EXACT if double else ROUGH
    for iteration in range(2):
        rollout = filled(pair[1], space, obs_space=obs_space, valid=some_valid(), drift=0.1)
        rollout.obs["action_mask"][:T][~rollout.valid] = False
        metrics = [engine.update(rollout, schedule(config), iteration) for engine in pair]
        assert_same_state(*pair, **near)
        assert_same_metrics(*metrics, **near)
    assert metrics[0]["updates"] == 12
    assert (metrics[0]["kl"] > 1e-5) == (objective == "kl")


@FAMILY
@pytest.mark.parametrize("norm_obs", [False, True])
def test_several_entries_beside_the_mask(name, norm_obs):
    """What the policy prepares is then a dict of features and mask."""
    space, config = SPACES[name], settings()
    obs_space = several_obs(space)
    pair = engine_pair(space, config, obs_space=obs_space, norm_obs=norm_obs)
    rollouts = []
    for engine in pair:
        rollout = new_rollout(engine, space, obs_space=obs_space)
        rollout.obs["c"] %= 3
        act_in(engine, rollout)
        rollouts.append(rollout)
    for ours, theirs in zip(*map(written, rollouts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5)
    rollouts[0].returns.copy_(torch.linspace(-1, 1, T * N).view(T, N))
    rollouts[0].advantages.copy_(rollouts[0].returns.flip(1))
    rollouts[0].valid[:] = True
    metrics = [engine.update(rollouts[0], schedule(config), 0) for engine in pair]
    assert_same_state(*pair, **ROUGH)
    assert_same_metrics(*metrics, **ROUGH)
    some = {key: x[2] for key, x in rollouts[0].obs.items()}
    torch.testing.assert_close(pair[0].value(some), pair[1].value(some), rtol=1e-5, atol=1e-5)


def test_many_actions_and_rows(kernel_threads):
    """More actions than a block has lanes, and more rows; in every third step all but one are forbidden."""
    space, config = spaces.Discrete(300), settings(num_steps=16, num_envs=67, num_minibatches=3, objective="kl")
    shape = {"obs_space": masked_obs(space), "steps": 16, "rows": 67}
    states = []
    for threads in (1, 3):
        kernel_threads(threads)
        pair = engine_pair(space, config, obs_space=shape["obs_space"], double=True)
        rollout = new_rollout(pair[0], space, **shape)
        rollout.obs["action_mask"][:, ::3] = False
        rollout.obs["action_mask"][:, ::3, 299] = True
        act_in(pair[0], rollout)
        assert (rollout.actions[:, ::3] == 299).all()
        assert (rollout.logp[:, ::3] == 0).all()
        rollout.advantages.copy_(rollout.obs["obs"][:-1, :, 0])
        rollout.valid[:] = True
        metrics = [engine.update(rollout, schedule(config), 0) for engine in pair]
        assert_same_state(*pair, **EXACT)
        assert_same_metrics(*metrics, **EXACT)
        states.append(state_of(pair[0]))
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())


# --- to the bit -------------------------------------------------------------------------------------------------------


@FAMILY
@DOUBLE
def test_a_forbidden_action_has_no_probability(name, double):
    """It is never drawn, whatever its logit, and its logit has no gradient at all: neither from the loss nor from the
    entropy nor from the KL.
    """
    space, config = SPACES[name], settings(objective="kl", ent_coef=0.1, num_minibatches=1, update_epochs=2)
    obs_space = masked_obs(space)
    engine = engine_on("native", space, config, obs_space=obs_space, double=double)
    with torch.no_grad():
        engine.policy.actor[-1].bias[1] = 50.0
    rollout = new_rollout(engine, space, obs_space=obs_space)
    mask = rollout.obs["action_mask"]
    mask[:, :, 1], mask[:, :, 0] = False, True
    act_in(engine, rollout)
    assert allowed(engine.distribution, masks_of(rollout), rollout.actions.flatten(0, 1)).all()
    rollout.advantages.copy_(rollout.obs["obs"][:-1, :, 0])
    rollout.valid[:] = True
    rollout.dist_params["logits"] += 0.3
    metrics = engine.update(rollout, schedule(config), 0)
    gradient = engine.policy.actor[-1].weight.grad
    assert (gradient[1] == 0).all()
    assert engine.policy.actor[-1].bias.grad[1] == 0
    assert gradient.any()
    assert all(np.isfinite(value) for value in metrics.values())


@FAMILY
@DOUBLE
def test_act_gives_the_same_bits_however_rows_are_batched(name, double):
    rows = 37
    space, config = SPACES[name], settings(objective="kl", num_envs=rows)
    obs_space = masked_obs(space)
    engine = engine_on("native", space, config, obs_space=obs_space, double=double, hidden_sizes=(17, 64))
    together = new_rollout(engine, space, rows=rows, obs_space=obs_space)
    sent = act_in(engine, together)
    for parts in ([1] * rows, [5, 16, 1, 15], [rows - 1, 1]):
        apart = new_rollout(engine, space, rows=rows, obs_space=obs_space)
        np.testing.assert_array_equal(act_in(engine, apart, parts), sent)
        assert all(torch.equal(a, b) for a, b in zip(written(apart), written(together), strict=True))


@FAMILY
@TRUNK
def test_every_ratio_is_one_at_first(name, shared_trunk):
    space, config = SPACES[name], settings(num_minibatches=5, update_epochs=1, clip_coef=1e-7)
    obs_space = masked_obs(space)
    engine = engine_on("native", space, config, obs_space=obs_space, shared_trunk=shared_trunk, norm_obs=True)
    rollout = filled(engine, space, obs_space=obs_space, valid=some_valid())
    act_in(engine, rollout, [1, 4, N - 5])
    table = engine._minibatches(valid_indices(rollout.valid), schedule(config), 0)
    assert table[0, APPROX_KL] == 0.0
    assert table[0, STATS.index("clip_fraction")] == 0.0
    rollout.obs["action_mask"][:] = True
    assert engine._minibatches(valid_indices(rollout.valid), schedule(config), 0)[0, APPROX_KL] > 0.01


@FAMILY
@DOUBLE
def test_threads_change_no_bit(name, double, kernel_threads):
    space, shape = SPACES[name], {"steps": 64, "rows": 64, "obs_space": masked_obs(SPACES[name])}
    config = settings(num_steps=64, num_envs=64, num_minibatches=3, update_epochs=2, objective="kl", target_kl=10.0)
    results = []
    for threads in (1, 2, 7):
        kernel_threads(threads)
        engine = engine_on("native", space, config, obs_space=shape["obs_space"], double=double, hidden_sizes=(64, 3))
        rollout = filled(engine, space, **shape)
        results.append((engine.update(rollout, schedule(config), 0), state_of(engine), written(rollout)))
    for metrics, state, stored in results[1:]:
        assert metrics == results[0][0]
        assert all(torch.equal(x, results[0][1][key]) for key, x in state.items())
        assert all(torch.equal(x, y) for x, y in zip(stored, results[0][2], strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_a_flag_may_be_any_byte(dtype):
    space, config = SPACES["discrete"], settings()
    obs_space = masked_obs(space)
    results = []
    for flags in (torch.bool, dtype):
        engine = engine_on("native", space, config, obs_space=obs_space)
        rollout = new_rollout(engine, space, obs_space=obs_space)
        rollout.obs["action_mask"] = rollout.obs["action_mask"].to(flags)
        act_in(engine, rollout)
        results.append(written(rollout))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["discrete", "multi-discrete"])
def test_a_row_that_allows_nothing_is_named(name):
    """By its number among all environments, in the words of `ops.sample`. Of several components one is enough."""
    space = SPACES[name]
    obs_space = masked_obs(space)
    engine = engine_on("native", space, settings(), obs_space=obs_space)
    rollout = new_rollout(engine, space, obs_space=obs_space)
    first = engine.distribution.nvec[0]
    rollout.obs["action_mask"][1, 7, :first] = False
    engine.act(rollout, 0, slice(0, N))
    with pytest.raises(ValueError, match="row 7") as ours:
        engine.act(rollout, 1, slice(4, N))
    arguments = {"nvec": engine.distribution.nvec} if name == "multi-discrete" else {}
    mask = rollout.obs["action_mask"][1]
    with pytest.raises(ValueError, match="row 7") as theirs:
        ops.sample(logits=torch.zeros(mask.shape), action_mask=mask, seed=1, step=1, **arguments)
    assert str(ours.value) == str(theirs.value)
    engine.act(rollout, 1, slice(0, 7))  # the others go on


def test_bits_that_are_all_forbidden_are_all_zero():
    space = SPACES["multi-binary"]
    obs_space = masked_obs(space)
    engine = engine_on("native", space, settings(), obs_space=obs_space)
    rollout = new_rollout(engine, space, obs_space=obs_space)
    rollout.obs["action_mask"][:] = False
    act_in(engine, rollout)
    assert not rollout.actions.any()
    assert not rollout.logp.any()


@FAMILY
def test_an_action_that_its_mask_forbids_is_named(name):
    """By its row of the rollout, t * N + n, wherever the minibatch has it."""
    space, config = SPACES[name], settings(num_minibatches=1)
    obs_space = masked_obs(space)
    engine = engine_on("native", space, config, obs_space=obs_space)
    rollout = filled(engine, space, obs_space=obs_space)
    rollout.actions[2, 3] = 1
    rollout.obs["action_mask"][2, 3, 1] = rollout.obs["action_mask"][2, 3, -1] = False
    before = state_of(engine)
    with pytest.raises(ValueError, match=rf"impossible action in row {2 * N + 3}; .* allowed by action_mask"):
        engine.update(rollout, schedule(config), 0)
    assert all(torch.equal(x, before[key]) for key, x in state_of(engine).items())


def test_a_mask_of_another_shape_is_refused():
    space = SPACES["discrete"]
    obs_space = masked_obs(space)
    engine = engine_on("native", space, settings(), obs_space=obs_space)
    rollout = new_rollout(engine, space, obs_space=obs_space)
    rollout.obs["action_mask"] = torch.ones(T + 1, N, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"action_mask has shape \[7, 11, 5\]; it must be \[7, 11, 4\]"):
        engine.act(rollout, 0, slice(0, N))
    rollout.obs["action_mask"] = torch.ones(T + 1, N, 4)
    with pytest.raises(TypeError, match="action_mask"):
        engine.act(rollout, 0, slice(0, N))


def test_auto_is_native():
    space = SPACES["multi-discrete"]
    engine = engine_on("auto", space, settings(), obs_space=masked_obs(space))
    assert isinstance(engine, NativeEngine)
