"""`ops.adam` and `ops.permutation` on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_near, generator, normal
from gpu_cases import DEVICE

from pyppo import ops

TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}


def state_of(size: int, dtype: torch.dtype, shift: int = 0) -> dict[str, torch.Tensor]:
    """Buffers that begin `shift` elements after an aligned address."""
    g = generator(size)
    state = {name: torch.zeros(size + shift, dtype=dtype, device=DEVICE)[shift:] for name in ("exp_avg", "exp_avg_sq")}
    for name in ("params", "grads"):
        state[name] = normal(g, size + shift).to(dtype).to(DEVICE)[shift:]
    return state | {"step": torch.zeros(1, dtype=torch.int64, device=DEVICE)}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize("size", [1, 3, 4, 255, 2049, 100_003, 3_000_001])
def test_steps_of_torch(size: int, max_grad_norm: float | None, dtype: torch.dtype, shift: int) -> None:
    state, g = state_of(size, dtype, shift), generator(2)
    expected = torch.nn.Parameter(state["params"].to("cpu", torch.float64, copy=True))
    optimizer = torch.optim.AdamW([expected], lr=3e-3, betas=(0.8, 0.99), eps=1e-5, weight_decay=0.1)
    for i in range(5):
        state["grads"].copy_(normal(g, size) * 10 ** math.sin(i))
        expected.grad = state["grads"].to("cpu", torch.float64, copy=True)
        limit = math.inf if max_grad_norm is None else max_grad_norm
        total = torch.nn.utils.clip_grad_norm_([expected], limit)
        optimizer.step()
        norm = ops.adam(
            **state, learning_rate=torch.tensor(3e-3, dtype=dtype, device=DEVICE), betas=(0.8, 0.99), eps=1e-5,
            weight_decay=0.1, max_grad_norm=max_grad_norm,
        )  # fmt: skip
        assert float(norm) == pytest.approx(float(total), rel=1e-6 if dtype == torch.float32 else 1e-13)
        assert_near(state["params"].cpu(), expected.detach(), TOLERANCE[dtype], f"step {i}: params")
    assert int(state["step"]) == 5


def test_skip_changes_nothing() -> None:
    state = state_of(1021, torch.float32)
    before = {name: x.clone() for name, x in state.items()}
    norm = ops.adam(**state, learning_rate=0.1, skip=torch.tensor([True], device=DEVICE))
    assert all(torch.equal(state[name], x) for name, x in before.items())
    assert float(norm) == pytest.approx(float(before["grads"].norm()), rel=1e-6)
    ops.adam(**state, learning_rate=0.1, skip=torch.tensor([False], device=DEVICE))
    assert int(state["step"]) == 1


def test_nan_is_not_hidden() -> None:
    state = state_of(1021, torch.float32)
    state["grads"][5] = math.nan
    norm = ops.adam(**state, learning_rate=0.1, max_grad_norm=0.5)
    assert math.isnan(float(norm))
    assert state["params"].isnan().all()


def test_empty() -> None:
    state = state_of(0, torch.float32)
    assert float(ops.adam(**state, learning_rate=0.1)) == 0


@pytest.mark.parametrize("n", [0, 1, 2, 255, 257, 4097, 1_000_003])
def test_permutation_is_the_cpu_s(n: int) -> None:
    on_gpu = ops.permutation(n, seed=3, iteration=2, epoch=7, device=DEVICE)
    assert torch.equal(on_gpu.cpu(), ops.permutation(n, seed=3, iteration=2, epoch=7))
    out = torch.full((n,), -1, device=DEVICE)
    assert torch.equal(ops.permutation(n, seed=3, iteration=2, epoch=7, out=out).cpu(), on_gpu.cpu())
