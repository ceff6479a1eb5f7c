"""`ops.normalize`: the reference's bits for every type that observations are stored in, and where it serves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import generator, normal, restride, seeds
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from pyppo import ops, reference
from pyppo.normalize import ObservationNormalizer

TYPES = (torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
shapes = st.sampled_from([(), (1,), (3,), (4,), (17,), (64,), (65,), (2, 5), (7, 3, 2), (1021,), (0,)])


def stored(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Numbers of all sizes that the type holds, and some that float32 does not."""
    g = generator(seed)
    if dtype.is_floating_point:
        return (normal(g, *shape) * 10 ** (3 * normal(g, *shape))).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=g) < 0.5
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min // 2, limits.max // 2, shape, generator=g).to(dtype)


@given(
    seeds, st.sampled_from(TYPES), st.sampled_from([0, 1, 2, 15, 16, 130]), shapes, st.sampled_from([None, 0.7, 10.0])
)
def test_the_reference_s_bits(
    seed: int, dtype: torch.dtype, rows: int, shape: tuple[int, ...], clip: float | None
) -> None:
    g = generator(seed + 1)
    x, mean, var = stored(seed, dtype, rows, *shape), 5 * normal(g, *shape), normal(g, *shape).square()
    expected = reference.normalize(x, mean, var, clip=clip)
    for given_x in (x, restride(x, seed % 4)):
        actual = ops.normalize(given_x, mean, var, clip=clip)
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)
    out = torch.full(x.shape, math.nan)
    assert ops.normalize(x, mean, var, clip=clip, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)


def test_by_hand() -> None:
    x = torch.tensor([[3, 10], [9, -100]])
    mean, var = torch.tensor([1.0, 10.0]).double(), torch.tensor([4.0, 0.0]).double()
    # 2 / 2, 0 / 0.1; 8 / 2, -110 / 0.1, held at -5
    result = ops.normalize(x, mean, var, eps=0.01, clip=5.0)
    np.testing.assert_allclose(result, [[2 / math.sqrt(4.01), 0.0], [8 / math.sqrt(4.01), -5.0]], rtol=1e-6)


def test_what_is_not_finite() -> None:
    x = torch.tensor([[math.nan], [math.inf], [-math.inf], [1e300]], dtype=torch.float64)
    mean, var = torch.zeros(1).double(), torch.ones(1).double()
    assert ops.normalize(x, mean, var, clip=2.0).flatten().tolist()[1:] == [2.0, -2.0, 2.0]
    assert ops.normalize(x, mean, var, clip=2.0)[0].isnan()
    assert ops.normalize(x, mean, var).flatten().tolist()[1:] == [math.inf, -math.inf, math.inf]


def test_a_row_does_not_depend_on_its_batch() -> None:
    x, mean, var = stored(1, torch.float32, 300, 11), normal(generator(2), 11), normal(generator(3), 11).square()
    whole = ops.normalize(x, mean, var, clip=10.0)
    for first, last in ((0, 1), (37, 161), (299, 300)):
        assert torch.equal(ops.normalize(x[first:last], mean, var, clip=10.0), whole[first:last])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_normalizer_is_the_kernel(dtype: type) -> None:
    """And both are what `mean_and_scale` says, which the native engine reads, to the bit."""
    normalizer = ObservationNormalizer(spaces.Box(-np.inf, np.inf, (6,), dtype), clip=3.0)
    x = torch.from_numpy(np.random.default_rng(1).normal(2.0, 5.0, (200, 6)).astype(dtype))
    normalizer.update({"obs": x[:50]})
    mean, scale = normalizer.mean_and_scale("obs")
    assert torch.equal(normalizer({"obs": x})["obs"], ((x.float() - mean) * scale).clamp(-3.0, 3.0))
    statistics = normalizer.statistics["obs"]
    assert torch.equal(normalizer({"obs": x})["obs"], ops.normalize(x, statistics.mean, statistics.var, clip=3.0))


def test_gradients_flow_through_the_normalizer() -> None:
    """No kernel then: an input that requires grad is differentiated as before."""
    normalizer = ObservationNormalizer(spaces.Box(-np.inf, np.inf, (2,)), clip=1.0)
    x = torch.tensor([[0.5, 7.0]], requires_grad=True)
    normalizer({"obs": x})["obs"].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 0.0]]
