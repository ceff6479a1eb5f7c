"""`ops.permutation`: a bijection, counted by seed, iteration and epoch, that looks random."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyppo import ops


def draw(n: int, seed: int = 1, iteration: int = 2, epoch: int = 3) -> torch.Tensor:
    return ops.permutation(n, seed=seed, iteration=iteration, epoch=epoch)


def test_out_is_written() -> None:
    out = torch.full((1000,), -1)
    assert ops.permutation(700, seed=1, iteration=2, epoch=3, out=out[:700]).data_ptr() == out.data_ptr()
    assert torch.equal(out[:700], draw(700))
    assert (out[700:] == -1).all()


def test_a_graph_that_saved_out_notices() -> None:
    out = torch.zeros(5, dtype=torch.int64)
    picked = torch.ones(5, requires_grad=True)[out]
    ops.permutation(5, seed=1, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        picked.sum().backward()


def is_bijection(p: torch.Tensor) -> bool:
    return torch.equal(p.sort().values, torch.arange(p.numel()))


def test_every_small_size_is_a_bijection() -> None:
    for n in range(1, 2001):
        p = draw(n, seed=n)
        assert p.dtype == torch.int64
        assert p.shape == (n,)
        assert is_bijection(p), n


@given(
    n=st.integers(1, 50_000),
    seed=st.integers(0, 2**63 - 1),
    iteration=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 1000),
)
def test_any_key_gives_a_bijection(n: int, seed: int, iteration: int, epoch: int) -> None:
    assert is_bijection(draw(n, seed, iteration, epoch))


@pytest.mark.parametrize("n", [2**16 - 1, 2**16, 2**16 + 1, 1_000_003])
def test_large_sizes(n: int) -> None:
    assert is_bijection(draw(n))


def test_nothing_to_permute() -> None:
    assert draw(1).tolist() == [0]


def test_counted() -> None:
    first = draw(1000)
    assert torch.equal(first, draw(1000))
    changed = [draw(1000, seed=9), draw(1000, iteration=9), draw(1000, epoch=9), draw(1000, iteration=3, epoch=2)]
    changed.append(draw(1000, seed=1 + 2**32))
    seen = [first, *changed]
    for i, a in enumerate(seen):
        for b in seen[:i]:
            # Two random permutations agree in 1 +- 1 places.
            assert (a == b).sum() < 10


def test_positions_are_uniform() -> None:
    """Where each of 16 elements lands, over 8,000 permutations: chi-square with 15^2 degrees of freedom.

    The threshold is exceeded with probability about 1e-6; the keys are fixed.
    """
    n, trials = 16, 8000
    counts = torch.zeros(n, n, dtype=torch.float64)
    for epoch in range(trials):
        counts[torch.arange(n), draw(n, seed=77, iteration=epoch % 50, epoch=epoch // 50)] += 1
    expected = trials / n
    statistic = float(((counts - expected).square() / expected).sum())
    degrees = (n - 1) ** 2
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_orders_of_a_few_occur(n: int) -> None:
    orders = [tuple(draw(n, seed=5, iteration=i, epoch=0).tolist()) for i in range(3000)]
    seen = {order: orders.count(order) for order in set(orders)}
    assert len(seen) == math.factorial(n)
    expected = 3000 / len(seen)
    statistic = sum((count - expected) ** 2 / expected for count in seen.values())
    degrees = len(seen) - 1
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


def test_neighbours_are_not_kept_together() -> None:
    """Ranks of neighbours are uncorrelated, and a minibatch of a large permutation covers its whole range."""
    n = 65_521
    p = draw(n).double()
    centred = (p - p.mean()) / p.std()
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 5 / math.sqrt(n)
    assert abs(float((centred * torch.linspace(-1, 1, n, dtype=torch.float64)).mean())) < 5 / math.sqrt(n)
    for part in p.tensor_split(32):
        assert abs(float(part.mean()) / n - 0.5) < 5 / math.sqrt(12 * len(part))


def test_another_epoch_does_not_repeat_the_steps() -> None:
    """Differences between neighbours differ from epoch to epoch: no shared walk with another start."""
    steps = [(draw(4099, epoch=e).roll(-1) - draw(4099, epoch=e)) % 4099 for e in range(3)]
    assert (steps[0] == steps[1]).sum() < 15
    assert (steps[1] == steps[2]).sum() < 15
