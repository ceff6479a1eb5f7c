"""The moments that `ops.gae` sums up beside the estimates, against NumPy in float64."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import EDGES, cast, coin, floats, generator, normal, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyppo import ops, reference


def inputs_of(seed: int, shape: tuple[int, int], valid: float | None, offset: float = 0.0) -> dict[str, Tensor]:
    g = generator(seed)
    inputs = {
        "rewards": normal(g, *shape), "values": normal(g, shape[0] + 1, shape[1]) + offset,
        "terminated": coin(g, 0.1, *shape), "truncated": coin(g, 0.1, *shape),
    }  # fmt: skip
    return inputs if valid is None else inputs | {"valid": coin(g, valid, *shape)}


def expected_of(estimates: tuple[Tensor, ...], valid: Tensor | None) -> np.ndarray:
    rows = []
    for x in estimates:
        kept = (x if valid is None else x[valid]).double().flatten().numpy()
        rows.append([len(kept), kept.mean(), np.square(kept - kept.mean()).sum()] if len(kept) else [0, 0, 0])
    return np.array(rows)


shapes = st.one_of(
    st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)),
    st.sampled_from([(1, 1), (4096, 1), (4097, 1), (1, 4099), (300, 40), (5, 2049)]),
)


@given(seeds, shapes, floats, st.sampled_from([None, 0.0, 0.05, 0.9]), st.sampled_from([0.0, 1e4]))
def test_match_numpy(seed: int, shape: tuple[int, int], dtype: torch.dtype, valid: float | None, offset: float) -> None:
    inputs = cast(inputs_of(seed, shape, valid, offset), dtype)
    moments = torch.full((2, 3), math.nan, dtype=torch.float64)
    estimates = ops.gae(**inputs, moments=moments)
    expected = expected_of(estimates, inputs.get("valid"))
    np.testing.assert_allclose(moments, expected, rtol=1e-12, atol=1e-12 * max(1.0, offset))
    for estimate, without in zip(estimates, ops.gae(**inputs), strict=True):
        assert torch.equal(estimate, without)


def test_a_large_offset_costs_no_digits() -> None:
    """A sum of squares minus a squared sum would keep none of these deviations: exact, in rational numbers."""
    inputs = inputs_of(1, (700, 9), None, offset=1e9)
    moments = torch.zeros(2, 3, dtype=torch.float64)
    _, returns = ops.gae(**inputs, gae_lambda=0.0, gamma=1.0, moments=moments)
    exact = [Fraction(float(x)) for x in returns.flatten()]
    mean = sum(exact) / len(exact)
    assert float(moments[1, 1]) == pytest.approx(float(mean), rel=1e-15)
    assert float(moments[1, 2]) == pytest.approx(float(sum((x - mean) ** 2 for x in exact)), rel=1e-9)


def test_by_hand() -> None:
    one = torch.ones(3, 1)
    moments = torch.zeros(2, 3, dtype=torch.float64)
    # gamma = 0: advantages are rewards - values, returns are rewards; the middle row does not count.
    rewards, values = torch.tensor([[1.0], [50.0], [4.0]]), torch.zeros(4, 1)
    valid = torch.tensor([[True], [False], [True]])
    ops.gae(rewards, values, ~one.bool(), ~one.bool(), gamma=0.0, valid=valid, moments=moments)
    assert moments.tolist() == [[2.0, 2.5, 4.5], [2.0, 2.5, 4.5]]


@pytest.mark.parametrize(("steps", "envs"), [(0, 3), (3, 0)])
def test_nothing_there(steps: int, envs: int) -> None:
    moments = torch.full((2, 3), math.nan, dtype=torch.float64)
    none = torch.zeros(steps, envs)
    ops.gae(none, torch.zeros(steps + 1, envs), none.bool(), none.bool(), moments=moments)
    assert moments.tolist() == [[0.0] * 3] * 2


def test_nan_is_not_hidden() -> None:
    inputs = inputs_of(1, (20, 3), None)
    inputs["rewards"][3, 1] = math.nan
    moments = torch.zeros(2, 3, dtype=torch.float64)
    ops.gae(**inputs, moments=moments)
    assert moments[:, 0].tolist() == [60.0, 60.0]
    assert moments[:, 1:].isnan().all()


def test_arrays_and_the_reference() -> None:
    inputs = inputs_of(2, (50, 4), 0.8)
    moments, expected = np.zeros((2, 3)), torch.zeros(2, 3, dtype=torch.float64)
    ops.gae(**{name: x.numpy() for name, x in inputs.items()}, moments=moments)
    reference.gae(**inputs, moments=expected)
    np.testing.assert_allclose(moments, expected, rtol=1e-12, atol=1e-13)


def test_must_have_memory_of_its_own() -> None:
    inputs = cast(inputs_of(1, (6, 1), None), torch.float64)
    for name in ("rewards", "values"):
        with pytest.raises(ValueError, match=f"moments shares memory with {name}"):
            ops.gae(**inputs, moments=inputs[name][:6].view(2, 3))
    out = (torch.zeros(6, 1, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"moments shares memory with out\[1\]"):
        ops.gae(**inputs, out=out, moments=out[1].view(2, 3))
