"""`ops.gae` against hand-worked cases, the reference, and what must hold of any advantage estimate."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from cases import EDGES, assert_near, cast, coin, floats, generator, normal, restride, seeds
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pyppo import ops, reference

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(1)


def flags(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.bool).unsqueeze(1)


# gamma = lambda = 0.5, so gamma * lambda = 0.25; rewards 1, 2, 3 and values 4, 5, 6, then 7 unless said otherwise.
HAND_WORKED = {
    # delta = 1 + 2.5 - 4, 2 + 3 - 5, 3 + 3.5 - 6 = -0.5, 0, 0.5
    # A2 = 0.5, A1 = 0 + 0.25 * 0.5 = 0.125, A0 = -0.5 + 0.25 * 0.125 = -0.46875
    "nothing ends": ({}, [-0.46875, 0.125, 0.5]),
    # delta1 = 2 - 5 = -3 and no trace: A1 = -3, A0 = -0.5 - 0.75
    "terminated": ({"terminated": [0, 1, 0]}, [-1.25, -3.0, 0.5]),
    # delta1 = 2 + 0.5 * 6 - 5 = 0 bootstraps from the row after, but takes no trace: A0 = -0.5
    "truncated": ({"truncated": [0, 1, 0]}, [-0.5, 0.0, 0.5]),
    # The final observation's value 9: delta1 = 2 + 4.5 - 5 = 1.5, A0 = -0.5 + 0.375
    "truncated, final value given": (
        {"truncated": [0, 1, 0], "final_values": [100.0, 9.0, 100.0]},
        [-0.125, 1.5, 0.5],
    ),
    "both: terminated wins": (
        {"terminated": [0, 1, 0], "truncated": [0, 1, 0], "final_values": [100.0, 9.0, 100.0]},
        [-1.25, -3.0, 0.5],
    ),
    # Row 1 is passed over: delta0 = 1 + 0.5 * 6 - 4 = 0, A0 = 0 + 0.25 * 0.5
    "a hole": ({"valid": [1, 0, 1]}, [0.125, 0.0, 0.5]),
    # The last row is a hole: delta1 = 2 + 0.5 * 7 - 5 = 0.5, A0 = -0.5 + 0.25 * 0.5
    "a hole at the end": ({"valid": [1, 1, 0]}, [-0.375, 0.5, 0.0]),
    # Next-step autoreset: step 0 is truncated, row 1 carries the reset. delta0 = 1 + 0.5 * 5 - 4
    "truncated, then the reset row": ({"truncated": [1, 0, 0], "valid": [1, 0, 1]}, [-0.5, 0.0, 0.5]),
    # delta0 = 1 - 4
    "terminated, then the reset row": ({"terminated": [1, 0, 0], "valid": [1, 0, 1]}, [-3.0, 0.0, 0.5]),
    # A flag in a row that is not valid says nothing: A1 = 0.125 as in "nothing ends"
    "flags in an invalid row": ({"terminated": [1, 0, 0], "truncated": [1, 0, 0], "valid": [0, 1, 1]}, [0, 0.125, 0.5]),
    # delta2 = 3 - 6; A1 = 0 - 0.75, A0 = -0.5 - 0.1875
    "terminated at the last step": ({"terminated": [0, 0, 1]}, [-0.6875, -0.75, -3.0]),
    "nothing is valid": ({"valid": [0, 0, 0]}, [0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("name", HAND_WORKED)
@pytest.mark.parametrize("function", [ops.gae, reference.gae], ids=["ops", "reference"])
def test_hand_worked(name: str, function: Any) -> None:
    changes, expected = HAND_WORKED[name]
    masks = {key: flags(*changes.get(key, [0, 0, 0])) for key in ("terminated", "truncated")}
    optional = {}
    if "valid" in changes:
        optional["valid"] = flags(*changes["valid"])
    if "final_values" in changes:
        optional["final_values"] = column(*changes["final_values"])
    rewards, values = column(1, 2, 3), column(4, 5, 6, 7)
    advantages, returns = function(rewards, values, *masks.values(), gamma=0.5, gae_lambda=0.5, **optional)
    assert advantages[:, 0].tolist() == expected
    counted = optional.get("valid", flags(1, 1, 1))
    assert returns.tolist() == torch.where(counted, advantages + values[:-1], 0.0).tolist()


def random_case(
    seed: int, steps: int, envs: int, *, done: float = 0.15, holes: bool = False, final: bool = False
) -> dict[str, Any]:
    g = generator(seed)
    case: dict[str, Any] = {
        "rewards": normal(g, steps, envs),
        "values": 3.0 * normal(g, steps + 1, envs),
        "terminated": coin(g, done, steps, envs),
        "truncated": coin(g, done, steps, envs),
    }
    if holes:
        case["valid"] = coin(g, 0.8, steps, envs)
    if final:
        case["final_values"] = 3.0 * normal(g, steps, envs)
    return case


def check_against_reference(case: dict[str, Any], dtype: torch.dtype, **discounts: float) -> None:
    case = cast(case, dtype)
    actual = ops.gae(**case, **discounts)
    expected = reference.gae(**cast(case, torch.float64), **discounts)
    # A return may be small beside the value that it is a sum with: the error is relative to the larger of all.
    values = case["values"]
    for name, a, e in zip(("advantages", "returns"), actual, expected, strict=True):
        assert a.dtype == dtype
        a, e = torch.cat([a, values]), torch.cat([e, values.double()])
        assert_near(a, e, TOLERANCE[dtype] * (1 + case["rewards"].shape[0] ** 0.5), name)


shapes = st.one_of(
    st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)),
    st.sampled_from([(1, 1), (1, 4099), (2048, 1), (1531, 3), (128, 8), (1021, 17), (5, 2049), (257, 65)]),
)


@given(
    seed=seeds,
    shape=shapes,
    dtype=floats,
    done=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    holes=st.booleans(),
    final=st.booleans(),
    gamma=st.sampled_from([0.0, 0.9, 0.99, 1.0]),
    gae_lambda=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
@example(1, (2048, 1), torch.float32, 0.0, False, False, 1.0, 1.0)
@example(2230, (1, 1), torch.float32, 0.0, False, False, 0.0, 0.0)  # a return that is nearly 0
@example(2, (128, 8), torch.float32, 0.02, True, True, 0.99, 0.95)
def test_matches_reference(
    seed: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    done: float,
    holes: bool,
    final: bool,
    gamma: float,
    gae_lambda: float,
) -> None:
    case = random_case(seed, *shape, done=done, holes=holes, final=final)
    check_against_reference(case, dtype, gamma=gamma, gae_lambda=gae_lambda)


@given(seed=seeds, dtype=floats, how=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_strides(seed: int, dtype: torch.dtype, how: list[int]) -> None:
    case = cast(random_case(seed, 19, 13, holes=True, final=True), dtype)
    expected = ops.gae(**case)
    strided = {name: restride(x, h) for (name, x), h in zip(case.items(), how, strict=True)}
    for a, e in zip(ops.gae(**strided), expected, strict=True):
        assert torch.equal(a, e)


def test_expanded_input() -> None:
    rewards, values = torch.ones(1, 1).expand(6, 5), torch.ones(1).expand(7, 5)
    nothing = torch.zeros(1, dtype=torch.bool).expand(6, 5)
    actual = ops.gae(rewards, values, nothing, nothing)
    expected = ops.gae(rewards.contiguous(), values.contiguous(), nothing.contiguous(), nothing.contiguous())
    assert torch.equal(actual[0], expected[0])
    # Constant reward and value 1: delta = gamma, so A_0 = 0.99 * sum of (0.99 * 0.95)^k, k < 6
    assert actual[0][0, 0].item() == pytest.approx(0.99 * sum((0.99 * 0.95) ** k for k in range(6)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_flag_dtypes(dtype: torch.dtype) -> None:
    case = random_case(3, 17, 9)
    expected = ops.gae(**case)
    case |= {name: case[name].to(dtype) for name in ("terminated", "truncated")}
    assert torch.equal(ops.gae(**case)[0], expected[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy(dtype: type) -> None:
    case = cast(random_case(4, 12, 5, holes=True, final=True), torch.float64)
    arrays = {k: v.numpy().astype(dtype) if v.is_floating_point() else v.numpy() for k, v in case.items()}
    advantages, returns = ops.gae(**arrays)
    assert isinstance(advantages, np.ndarray)
    assert isinstance(returns, np.ndarray)
    assert advantages.dtype == dtype
    assert returns.dtype == dtype
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    np.testing.assert_array_equal(advantages, ops.gae(**tensors)[0].numpy())
    np.testing.assert_array_equal(returns, ops.gae(**tensors)[1].numpy())


def test_numpy_fortran_order_and_negative_strides() -> None:
    arrays = {k: v.numpy() for k, v in random_case(5, 11, 6).items()}
    expected = ops.gae(**arrays)
    fortran = {k: np.asfortranarray(v) for k, v in arrays.items()}
    backwards = {k: np.ascontiguousarray(v[::-1])[::-1] for k, v in arrays.items()}
    for variant in (fortran, backwards):
        for a, e in zip(ops.gae(**variant), expected, strict=True):
            np.testing.assert_array_equal(a, e)


def test_out() -> None:
    case = random_case(6, 9, 7)
    expected = ops.gae(**case)
    out = torch.full((9, 7), -1.0, dtype=torch.float64), torch.full((9, 7), -1.0, dtype=torch.float64)
    actual = ops.gae(**case, out=out)
    assert actual[0] is out[0]
    assert actual[1] is out[1]
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


def test_inputs_are_left_alone() -> None:
    case = random_case(7, 33, 16, holes=True, final=True)
    before = {name: x.clone() for name, x in case.items()}
    ops.gae(**case)
    assert all(torch.equal(case[name], before[name]) for name in case)


@given(seed=seeds, dtype=floats, final=st.booleans(), steps=st.sampled_from([1, 2, 16, 33]))
def test_garbage_where_nothing_is_read(seed: int, dtype: torch.dtype, final: bool, steps: int) -> None:
    """NaN in whatever the recursion must not look at changes no bit of the answer."""
    case = cast(random_case(seed, steps, 9, done=0.3, holes=True, final=final), dtype)
    expected = ops.gae(**case)
    terminated, truncated, valid = case["terminated"], case["truncated"], case["valid"]
    bootstraps = truncated & ~terminated & valid
    nan = float("nan")
    spoiled = dict(case, rewards=case["rewards"].masked_fill(~valid, nan))
    read = valid.clone()
    if final:
        spoiled["final_values"] = case["final_values"].masked_fill(~bootstraps, nan)
    else:
        read[1:] |= bootstraps[:-1]
    spoiled["values"] = case["values"].clone()
    spoiled["values"][:-1].masked_fill_(~read, nan)
    if not final:
        bootstraps = torch.zeros_like(bootstraps)
    last_read = torch.stack([valid[:, n].nonzero().amax() if valid[:, n].any() else torch.tensor(-1) for n in range(9)])
    for n, t in enumerate(last_read.tolist()):
        ends = t < 0 or bool(terminated[t, n]) or bool(bootstraps[t, n]) or (bool(truncated[t, n]) and t < steps - 1)
        if ends:
            spoiled["values"][-1, n] = nan
    for a, e in zip(ops.gae(**spoiled), expected, strict=True):
        assert torch.equal(a, e)


def test_nan_that_counts_is_not_hidden() -> None:
    case = random_case(8, 5, 3, done=0.0)
    case["rewards"][3, 1] = float("nan")
    advantages, _ = ops.gae(**case)
    assert advantages[:4, 1].isnan().all()
    assert not advantages[4, 1].isnan()
    assert not advantages[:, [0, 2]].isnan().any()


@given(seed=seeds, gamma=st.sampled_from([0.5, 0.9, 1.0]))
def test_lambda_one_is_the_discounted_return(seed: int, gamma: float) -> None:
    case = random_case(seed, 20, 3, done=0.1)
    advantages, returns = ops.gae(**case, gamma=gamma, gae_lambda=1.0)
    terminated, truncated, values = case["terminated"], case["truncated"], case["values"]
    for t, n in itertools.product(range(20), range(3)):
        total, discount = 0.0, 1.0
        for k in range(t, 20):
            total += discount * case["rewards"][k, n]
            discount *= gamma
            if terminated[k, n]:
                break
            if truncated[k, n] or k == 19:
                total += discount * values[k + 1, n]
                break
        assert float(returns[t, n]) == pytest.approx(float(total), abs=1e-11)
        assert float(advantages[t, n]) == pytest.approx(float(total - values[t, n]), abs=1e-11)


@given(seed=seeds, gamma=st.sampled_from([0.5, 0.99]))
def test_lambda_zero_is_the_temporal_difference_error(seed: int, gamma: float) -> None:
    case = random_case(seed, 20, 5, final=True)
    values = case["values"]
    following = torch.where(case["truncated"], case["final_values"], values[1:])
    error = case["rewards"] + gamma * torch.where(case["terminated"], 0.0, following) - values[:-1]
    torch.testing.assert_close(ops.gae(**case, gamma=gamma, gae_lambda=0.0)[0], error, rtol=0, atol=1e-13)


@given(seed=seeds, dtype=floats)
def test_invalid_rows_can_be_deleted(seed: int, dtype: torch.dtype) -> None:
    """With the final values given, a column without its invalid rows has the same advantages."""
    case = cast(random_case(seed, 40, 1, holes=True, final=True), dtype)
    keep = case["valid"][:, 0]
    advantages, returns = ops.gae(**case)
    kept = {name: x[keep] for name, x in case.items() if name not in ("values", "valid")}
    values = torch.cat([case["values"][:-1][keep], case["values"][-1:]])
    if not keep.any():
        assert not advantages.any()
        return
    shorter = ops.gae(values=values, **kept)
    assert_near(advantages[keep], shorter[0], TOLERANCE[dtype])
    assert_near(returns[keep], shorter[1], TOLERANCE[dtype])
    assert not advantages[~keep].any()
    assert not returns[~keep].any()


@given(seed=seeds, envs=st.sampled_from([1, 4, 9]))
def test_both_autoreset_modes_tell_the_same_story(seed: int, envs: int) -> None:
    """The same episodes laid out for next-step autoreset (reset rows) and for same-step (final values)."""
    g = generator(seed)
    steps = 24
    rewards, state_values, final_values = normal(g, steps, envs), normal(g, steps + 1, envs), normal(g, steps, envs)
    terminated, truncated = coin(g, 0.1, steps, envs), coin(g, 0.1, steps, envs)
    same_step = ops.gae(rewards, state_values, terminated, truncated, final_values=final_values)
    for n in range(envs):
        stream = []  # reward, value, terminated, truncated, valid
        for t in range(steps):
            ends = float(terminated[t, n]), float(truncated[t, n])
            stream.append((float(rewards[t, n]), float(state_values[t, n]), *ends, 1.0))
            if any(ends):  # the reset row: reward 0, and its observation is the final one
                stream.append((0.0, float(final_values[t, n]), 0.0, 0.0, 0.0))
        r, v, *masks = torch.tensor(stream, dtype=torch.float64).unsqueeze(1).unbind(-1)
        ended, cut, valid = (mask.bool() for mask in masks)
        next_step = ops.gae(r, torch.cat([v, state_values[-1:, n : n + 1]]), ended, cut, valid=valid)
        for actual, expected in zip(next_step, same_step, strict=True):
            assert_near(actual[valid], expected[:, n], 1e-14)


def test_columns_are_independent() -> None:
    case = random_case(9, 37, 67, holes=True, final=True)
    whole = ops.gae(**case)
    for n in (0, 1, 31, 63, 64, 66):
        alone = ops.gae(**{name: x[:, n : n + 1] for name, x in case.items()})
        for actual, expected in zip(alone, whole, strict=True):
            assert_near(actual, expected[:, n : n + 1], 1e-14)


def test_splitting_time_changes_nothing() -> None:
    """With lambda 0 a rollout in two halves is the whole: the halves meet in values[T]."""
    case = random_case(10, 30, 11)
    whole = ops.gae(**case, gae_lambda=0.0)[0]
    first = {name: x[: 15 + (name == "values")] for name, x in case.items()}
    second = {name: x[15:] for name, x in case.items()}
    parts = [ops.gae(**half, gae_lambda=0.0)[0] for half in (first, second)]
    assert_near(torch.cat(parts), whole, 1e-15)
