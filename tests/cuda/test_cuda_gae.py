"""`ops.gae` on a GPU against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from cases import assert_near, coin, generator, normal
from gpu_cases import DEVICE, on_device

from pyppo import ops, reference

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
# One row, one column; less and more than a thread's rows, a tile's rows and a warp; several tiles; several spans.
SHAPES = [(1, 1), (2, 3), (7, 33), (9, 8), (33, 31), (127, 5), (129, 129), (513, 1), (200, 1000), (2048, 1), (5003, 2),
          (9001, 1), (1030, 17), (3, 4099)]  # fmt: skip


def inputs_of(num_steps: int, num_envs: int, valid: float | None, final: bool) -> dict[str, torch.Tensor]:
    g, shape = generator(num_steps * 7919 + num_envs), (num_steps, num_envs)
    inputs = {
        "rewards": normal(g, *shape),
        "values": normal(g, num_steps + 1, num_envs),
        "terminated": coin(g, 0.05, *shape),
        "truncated": coin(g, 0.05, *shape),
    }
    if valid is not None:
        inputs["valid"] = coin(g, valid, *shape)
    if final:
        inputs["final_values"] = normal(g, *shape)
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("valid", "final"), [(None, False), (0.8, False), (0.9, True), (0.05, False), (0.0, False)])
@pytest.mark.parametrize(("num_steps", "num_envs"), SHAPES)
def test_matches_reference(num_steps: int, num_envs: int, valid: float | None, final: bool, dtype: torch.dtype) -> None:
    inputs = inputs_of(num_steps, num_envs, valid, final)
    typed = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    actual = ops.gae(**on_device(typed), gamma=0.97, gae_lambda=0.9)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in typed.items()}
    expected = reference.gae(**exact, gamma=0.97, gae_lambda=0.9)
    assert_near(actual[0].cpu(), expected[0], TOLERANCE[dtype], "advantages")
    assert_near(actual[1].cpu(), expected[1], TOLERANCE[dtype], "returns")


@pytest.mark.parametrize("gae_lambda", [0.0, 1.0])
@pytest.mark.parametrize(("num_steps", "num_envs"), [(9001, 1), (300, 70)])
def test_extreme_lambda(num_steps: int, num_envs: int, gae_lambda: float) -> None:
    inputs = inputs_of(num_steps, num_envs, 0.9, False)
    actual = ops.gae(**on_device(inputs), gamma=1.0, gae_lambda=gae_lambda)
    expected = reference.gae(**inputs, gamma=1.0, gae_lambda=gae_lambda)
    assert_near(actual[0].cpu(), expected[0], 1e-11)


@pytest.mark.parametrize(("num_steps", "num_envs"), [(9001, 1), (9001, 3), (100, 100), (40, 3)])
def test_nan_does_not_pass_a_cut(num_steps: int, num_envs: int) -> None:
    inputs = inputs_of(num_steps, num_envs, 0.8, False)
    middle = num_steps // 2
    inputs["valid"][middle] = inputs["terminated"][middle] = True
    clean = reference.gae(**inputs)
    inputs["rewards"][middle + 1 :] = float("nan")
    inputs["values"][middle + 1 :] = float("nan")
    advantages, returns = ops.gae(**on_device(inputs))
    assert_near(advantages[: middle + 1].cpu(), clean[0][: middle + 1], 1e-11)
    assert_near(returns[: middle + 1].cpu(), clean[1][: middle + 1], 1e-11)


def test_out_is_written() -> None:
    inputs = on_device(inputs_of(300, 40, 0.9, False))
    expected = ops.gae(**inputs)
    out = (torch.full_like(expected[0], float("nan")), torch.full_like(expected[0], float("nan")))
    actual = ops.gae(**inputs, out=out)
    assert actual[0].data_ptr() == out[0].data_ptr()
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


@pytest.mark.parametrize(("num_steps", "num_envs"), [(0, 3), (3, 0)])
def test_empty(num_steps: int, num_envs: int) -> None:
    empty = torch.zeros(num_steps, num_envs, device=DEVICE)
    values = torch.zeros(num_steps + 1, num_envs, device=DEVICE)
    advantages, returns = ops.gae(empty, values, empty.bool(), empty.bool())
    assert advantages.shape == returns.shape == (num_steps, num_envs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("valid", "final"), [(None, False), (0.8, True), (0.05, False), (0.0, False)])
@pytest.mark.parametrize(("num_steps", "num_envs"), SHAPES)
def test_moments_match(num_steps: int, num_envs: int, valid: float | None, final: bool, dtype: torch.dtype) -> None:
    """Beside the same estimates: count, mean and squared deviations of what was written."""
    inputs = inputs_of(num_steps, num_envs, valid, final)
    inputs["values"] += 1000.0  # a sum of squares would lose digits
    typed = on_device({k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    moments = torch.full((2, 3), float("nan"), dtype=torch.float64, device=DEVICE)
    estimates = ops.gae(**typed, moments=moments)
    keep = typed["valid"] if valid is not None else torch.ones_like(typed["terminated"])
    for row, x, alone in zip(moments.cpu(), estimates, ops.gae(**typed), strict=True):
        assert torch.equal(x, alone)
        kept = x[keep].double().cpu()
        mean = kept.sum() / max(1, len(kept))
        expected = torch.stack([torch.tensor(len(kept)).double(), mean, (kept - mean).square().sum()])
        assert_near(row, expected, 1e-12)


@pytest.mark.parametrize(("num_steps", "num_envs"), [(0, 3), (3, 0)])
def test_empty_moments(num_steps: int, num_envs: int) -> None:
    empty = torch.zeros(num_steps, num_envs, device=DEVICE)
    values = torch.zeros(num_steps + 1, num_envs, device=DEVICE)
    moments = torch.full((2, 3), float("nan"), dtype=torch.float64, device=DEVICE)
    ops.gae(empty, values, empty.bool(), empty.bool(), moments=moments)
    assert moments.tolist() == [[0.0] * 3] * 2
