"""`ops.adam` against torch.optim and torch.nn.utils.clip_grad_norm_, step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import EDGES, assert_near, floats, generator, normal, seeds
from hypothesis import given
from hypothesis import strategies as st

from pyppo import ops, reference

TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}


def state_of(size: int, dtype: torch.dtype, seed: int = 1) -> dict[str, torch.Tensor]:
    g = generator(seed)
    return {
        "params": normal(g, size).to(dtype),
        "grads": normal(g, size).to(dtype),
        "exp_avg": torch.zeros(size, dtype=dtype),
        "exp_avg_sq": torch.zeros(size, dtype=dtype),
        "step": torch.zeros(1, dtype=torch.int64),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
def test_a_hundred_steps_of_torch(dtype: torch.dtype, weight_decay: float, max_grad_norm: float | None) -> None:
    state, g = state_of(203, dtype), generator(2)
    expected = torch.nn.Parameter(state["params"].double().clone())
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-5}
    optimizer = (
        torch.optim.AdamW([expected], weight_decay=weight_decay, **options)
        if weight_decay
        else torch.optim.Adam([expected], **options)
    )
    for i in range(100):
        state["grads"] = (normal(g, 203) * 10 ** math.sin(i)).to(dtype)
        expected.grad = state["grads"].double().clone()
        limit = math.inf if max_grad_norm is None else max_grad_norm
        total = torch.nn.utils.clip_grad_norm_([expected], limit)
        optimizer.step()
        before = state["grads"].clone()
        norm = ops.adam(
            **state, learning_rate=3e-3, betas=(0.8, 0.99), eps=1e-5, weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
        )  # fmt: skip
        assert norm.shape == ()
        assert norm.dtype == dtype
        assert float(norm) == pytest.approx(float(total), rel=1e-6 if dtype == torch.float32 else 1e-14)
        assert torch.equal(state["grads"], before)
        assert_near(state["params"], expected.detach(), TOLERANCE[dtype], f"step {i}: params")
    assert int(state["step"]) == 100
    moments = optimizer.state[expected]
    assert_near(state["exp_avg"], moments["exp_avg"], TOLERANCE[dtype])
    assert_near(state["exp_avg_sq"], moments["exp_avg_sq"], TOLERANCE[dtype])


def test_hand_worked() -> None:
    """First step: m / (1 - b1) = g and v / (1 - b2) = g^2, so each parameter moves by lr * g / (|g| + eps).

    g = (3, -4), eps = 1: 0.1 * 3 / 4 and 0.1 * 4 / 5. The norm is 5; clipped to 2.5 with the 1e-6, g is halved (less
    1e-7): 0.1 * 1.5 / 2.5 and 0.1 * 2 / 3. Weight decay 0.5 takes 0.1 * 0.5 of the parameter first.
    """

    def after(**options: Any) -> list[float]:
        state = state_of(2, torch.float64) | {
            "params": torch.tensor([1.0, 2.0], dtype=torch.float64),
            "grads": torch.tensor([3.0, -4.0], dtype=torch.float64),
        }
        assert float(ops.adam(**state, learning_rate=0.1, eps=1.0, **options)) == 5.0
        return state["params"].tolist()

    assert after() == pytest.approx([1 - 0.075, 2 + 0.08], abs=1e-14)
    assert after(max_grad_norm=2.5) == pytest.approx([1 - 0.06, 2 + 0.2 / 3], abs=1e-7)
    assert after(weight_decay=0.5) == pytest.approx([0.95 - 0.075, 1.9 + 0.08], abs=1e-14)


@given(
    seed=seeds,
    size=st.one_of(st.sampled_from(EDGES), st.integers(1, 5000)),
    dtype=floats,
    step=st.sampled_from([0, 1, 10, 1000, 10**6]),
    max_grad_norm=st.sampled_from([None, 0.01, 0.5, 1e9]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.5, 0.9)]),
    scale=st.sampled_from([1e-12, 1.0, 1e8]),
)
def test_matches_reference(
    seed: int,
    size: int,
    dtype: torch.dtype,
    step: int,
    max_grad_norm: float | None,
    weight_decay: float,
    betas: tuple[float, float],
    scale: float,
) -> None:
    state = state_of(size, dtype, seed)
    state["grads"] *= scale
    state["exp_avg"] = 0.1 * scale * normal(generator(seed + 1), size).to(dtype)
    state["exp_avg_sq"] = scale**2 * normal(generator(seed + 2), size).to(dtype).square()
    state["step"].fill_(step)
    expected = {name: x.double().clone() if x.is_floating_point() else x.clone() for name, x in state.items()}
    options = {"betas": betas, "max_grad_norm": max_grad_norm, "weight_decay": weight_decay, "eps": 1e-8}
    before = state["params"].double().clone()
    norm = ops.adam(**state, learning_rate=1e-2, **options)
    assert float(norm) == pytest.approx(float(reference.adam(**expected, learning_rate=1e-2, **options)), rel=1e-5)
    for name, terms in (("exp_avg", scale), ("exp_avg_sq", scale**2)):  # of which a sum may leave next to nothing
        error = (state[name].double() - expected[name]).abs()
        assert (error <= TOLERANCE[dtype] * (expected[name].abs() + terms)).all(), name
    # A parameter is good to its own rounding, and what it moved by (at most 10 learning rates) to that of the moments.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    error = (state["params"].double() - expected["params"]).abs()
    moved = (expected["params"] - before).abs()
    assert (error <= tolerance * moved + 2 * torch.finfo(dtype).eps * before.abs()).all()
    assert int(state["step"]) == step + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_buffer(dtype: torch.dtype) -> None:
    """Large enough for several threads."""
    state = state_of(300_007, dtype)
    expected = {name: x.double().clone() if x.is_floating_point() else x.clone() for name, x in state.items()}
    norm = ops.adam(**state, learning_rate=1e-3, max_grad_norm=0.5)
    assert float(norm) == pytest.approx(
        float(reference.adam(**expected, learning_rate=1e-3, max_grad_norm=0.5)), rel=1e-6
    )
    assert_near(state["params"], expected["params"], TOLERANCE[dtype])


def test_learning_rate_as_a_tensor() -> None:
    one, two = state_of(77, torch.float64), state_of(77, torch.float64)
    for rate in (1e-2, 3e-3, 0.0):
        ops.adam(**one, learning_rate=rate)
        ops.adam(**two, learning_rate=torch.tensor(rate, dtype=torch.float64))
        assert torch.equal(one["params"], two["params"])
        assert torch.equal(one["step"], two["step"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skip(dtype: torch.dtype) -> None:
    state = state_of(65, dtype)
    ops.adam(**state, learning_rate=1e-2)
    before = {name: x.clone() for name, x in state.items()}
    norm = ops.adam(**state, learning_rate=1e-2, max_grad_norm=0.1, skip=torch.tensor([True]))
    assert all(torch.equal(state[name], x) for name, x in before.items())
    assert float(norm) == pytest.approx(float(state["grads"].norm()), rel=1e-6)
    twin = {name: x.clone() for name, x in state.items()}
    ops.adam(**state, learning_rate=1e-2, skip=torch.tensor([False]))
    ops.adam(**twin, learning_rate=1e-2)
    assert all(torch.equal(state[name], x) for name, x in twin.items())
    assert not torch.equal(state["params"], before["params"])
    assert int(state["step"]) == 2


def test_skip_with_nan_gradients() -> None:
    """What skip is for: a step that went wrong leaves no trace."""
    state = state_of(9, torch.float32)
    state["grads"][4] = math.nan
    before = {name: x.clone() for name, x in state.items()}
    ops.adam(**state, learning_rate=1e-2, max_grad_norm=0.5, skip=torch.tensor([True]))
    assert all(torch.equal(state[name], x) for name, x in before.items() if name != "grads")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_bad_gradients_do_what_torch_does(bad: float, max_grad_norm: float | None) -> None:
    state = state_of(7, torch.float64)
    state["grads"][2] = bad
    parameter = torch.nn.Parameter(state["params"].clone())
    parameter.grad = state["grads"].clone()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_([parameter], max_grad_norm)
    torch.optim.Adam([parameter], lr=1e-2).step()
    norm = float(ops.adam(**state, learning_rate=1e-2, max_grad_norm=max_grad_norm))
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    assert torch.equal(state["params"].isnan(), parameter.detach().isnan())
    assert state["params"].isnan().any()


def test_zero_gradients() -> None:
    state = state_of(33, torch.float32)
    state["grads"].zero_()
    before = state["params"].clone()
    assert float(ops.adam(**state, learning_rate=1e-2, max_grad_norm=0.5)) == 0.0
    assert torch.equal(state["params"], before)


def test_in_place_writes_are_seen_by_autograd() -> None:
    """A graph that saved the parameters must notice that they changed under it."""
    state = state_of(5, torch.float64)
    versions = {name: state[name]._version for name in ("params", "exp_avg", "exp_avg_sq", "step")}
    x = torch.ones(5, dtype=torch.float64, requires_grad=True)
    y = (x * state["params"]).sum()
    ops.adam(**state, learning_rate=0.1)
    assert all(state[name]._version > version for name, version in versions.items())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_views_of_a_larger_buffer() -> None:
    """Contiguous slices at any offset: nothing outside them is touched."""
    for offset in range(5):
        buffers = {name: torch.full((50,), 7.0) for name in ("params", "grads", "exp_avg", "exp_avg_sq")}
        views = {name: buffer[offset : offset + 19] for name, buffer in buffers.items()}
        views["exp_avg"].zero_(), views["exp_avg_sq"].zero_()
        ops.adam(**views, step=torch.zeros(1, dtype=torch.int64), learning_rate=0.5)
        assert views["params"].tolist() == pytest.approx([6.5] * 19, abs=1e-5)
        for buffer in buffers.values():
            assert (buffer[:offset] == 7.0).all()
            assert (buffer[offset + 19 :] == 7.0).all()
