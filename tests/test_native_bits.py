"""NativeEngine's own promises: the same bits however its work is divided and wherever its memory lies."""

import copy

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
    engine_on,
    filled,
    new_rollout,
    schedule,
    settings,
    some_valid,
    state_of,
)

from pyppo.engines import valid_indices
from pyppo.engines.objective import APPROX_KL, STATS


def written(rollout):
    return [rollout.actions, rollout.logp, rollout.values, *(rollout.dist_params or {}).values()]


# --- however the work is divided --------------------------------------------------------------------------------------


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


@DOUBLE
@pytest.mark.parametrize("shared_trunk", [False, True])
def test_a_state_dependent_deviation_changes_none_of_this(shared_trunk, double, kernel_threads):
    """The same bits in any batch and at any number of threads, and ratios that are exactly 1."""
    rows, space = 67, SPACES["box"]
    config = settings(num_envs=rows, num_minibatches=3, update_epochs=2, objective="kl", clip_coef=1e-7)
    results = []
    for threads, parts in ((1, [rows]), (2, [1, 32, 34]), (7, [1] * rows)):
        kernel_threads(threads)
        how = {"double": double, "shared_trunk": shared_trunk, "hidden_sizes": (64, 7), "state_dependent_std": True}
        engine = engine_on("native", space, config, **how)
        rollout = filled(engine, space, rows=rows)
        rollout.steps -= T
        act_in(engine, rollout, parts)
        table = engine._minibatches(valid_indices(rollout.valid), schedule(config), 0)
        assert double or table[0, APPROX_KL] == 0.0
        results.append([table, *written(rollout), *state_of(engine).values()])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


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


# --- rows that do not count -------------------------------------------------------------------------------------------


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


def test_a_policy_that_is_not_a_number_is_refused():
    space = SPACES["discrete"]
    engine = engine_on("native", space, settings())
    rollout = new_rollout(engine, space)
    rollout.obs["obs"][1, 7] = torch.nan
    engine.act(rollout, 0, slice(0, N))
    with pytest.raises(ValueError, match="row 7"):
        engine.act(rollout, 1, slice(4, N))


# --- the memory that it is bound to -----------------------------------------------------------------------------------


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
