"""`ops.normalize` on a GPU against the same in float64, for every type that observations are stored in."""

from __future__ import annotations

import pytest
import torch
from cases import generator, normal
from gpu_cases import DEVICE

from pyppo import ops

TYPES = (torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


LARGE = [pytest.param((70_001, 3), id="large"), pytest.param((2, 140_003), id="large and wide")]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (1000, 17), (5, 33, 3), *LARGE])
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = generator(sum(shape))
    x, mean, var = (30 * normal(g, *shape)).to(dtype), normal(g, *shape[1:]), normal(g, *shape[1:]).square() + 0.1
    expected = ((x.double() - mean) / (var + 1e-8).sqrt()).clamp(-5.0, 5.0)
    actual = ops.normalize(x.to(DEVICE), mean.to(DEVICE), var.to(DEVICE), clip=5.0)
    assert actual.dtype == torch.float32
    assert ((actual.cpu() - expected).abs() <= 1e-6 * (1.0 + x.double().abs() + expected.abs())).all()


def test_out_is_written() -> None:
    x, mean, var = torch.randn(9, 5), torch.zeros(5).double(), torch.ones(5).double()
    out = torch.full((9, 5), float("nan"), device=DEVICE)
    result = ops.normalize(x.to(DEVICE), mean.to(DEVICE), var.to(DEVICE), out=out)
    assert result.data_ptr() == out.data_ptr()
    assert (out.cpu() - x).abs().max() < 1e-6


def test_nan_stays() -> None:
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    x = torch.tensor([[float("nan")], [float("inf")], [-1e30]], device=DEVICE)
    result = ops.normalize(x, 0 * one, one, clip=2.0)
    assert result[0].isnan()
    assert result[1:].flatten().tolist() == [2.0, -2.0]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    statistic = torch.ones(shape[1], dtype=torch.float64, device=DEVICE)
    assert ops.normalize(torch.zeros(shape, device=DEVICE), statistic, statistic).shape == shape
