"""The kernels that move data, not learn: what bench/kernels.py measures of permutation, gathering and normalising, and
what a call of each kernel costs when there is next to nothing to do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from _common import Contender, CopyOf

from pyppo import ops

LIMIT = "limit (copy)"


class DataCase(NamedTuple):
    """Contenders on one input, and which of them are ours."""

    name: str
    contenders: dict[str, Contender]
    ours: tuple[str, ...]


def permutation_case(n: int) -> DataCase:
    out = torch.empty(n, dtype=torch.int64)
    contenders: dict[str, Contender] = {
        "ops.permutation": lambda: ops.permutation(n, seed=1),
        "ops.permutation(out=)": lambda: ops.permutation(n, seed=1, out=out),
        "torch.randperm": lambda: torch.randperm(n),
        LIMIT: CopyOf(8 * n),
    }
    return DataCase(f"n = {n:,}", contenders, ("ops.permutation", "ops.permutation(out=)"))


def gather_case(rows: int, slots: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> DataCase:
    """One of the parts that `rows` rows fall into: observations of these shapes, actions and four numbers a row."""
    columns = [(100 * torch.rand(rows, *shape)).to(dtype) for shape in shapes]
    columns += [torch.zeros(rows, dtype=torch.int64), *(torch.randn(rows) for _ in range(4))]
    order = torch.randperm(rows)
    out = [torch.empty(slots, *x.shape[1:], dtype=x.dtype) for x in columns]
    arguments: dict[str, Any] = {
        "columns": columns, "rows": torch.arange(rows), "order": order, "count": torch.tensor([rows]),
        "part": torch.tensor([1]), "num_parts": rows // slots, "out": out, "weights": torch.empty(slots),
    }  # fmt: skip
    index = order[slots : 2 * slots]

    def indexing() -> list[torch.Tensor]:
        return [x[index] for x in columns]

    def index_select() -> None:
        for x, to in zip(columns, out, strict=True):
            torch.index_select(x, 0, index, out=to)

    ops.gather_minibatch(**arguments)
    assert all(torch.equal(x, y) for x, y in zip(out, indexing(), strict=True))
    contenders: dict[str, Contender] = {
        "ops.gather_minibatch": lambda: ops.gather_minibatch(**arguments), "indexing": indexing,
        "index_select(out=)": index_select, LIMIT: CopyOf(2 * sum(x.nbytes for x in out)),
    }  # fmt: skip
    return DataCase(f"{slots} of {rows:,} rows, {len(columns)} columns", contenders, ("ops.gather_minibatch",))


def normalize_case(rows: int, features: int, dtype: torch.dtype) -> DataCase:
    x, mean, var = torch.randn(rows, features).to(dtype), torch.zeros(features).double(), torch.ones(features).double()
    contenders: dict[str, Contender] = {
        "ops.normalize": lambda: ops.normalize(x, mean, var, clip=10.0),
        "torch": lambda: ((x.float() - mean.float()) * torch.rsqrt(var + 1e-8).float()).clamp(-10.0, 10.0),
        LIMIT: CopyOf(x.nbytes + 4 * x.numel()),
    }
    return DataCase(f"{rows} x {features}, {str(dtype).removeprefix('torch.')}", contenders, ("ops.normalize",))


def call_case() -> DataCase:
    """Each kernel on the least input: what its call costs."""
    one, skip, moments = torch.ones(1), torch.ones(1, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.float64)
    column, two, row = torch.ones(1, 1), torch.ones(2, 1), torch.zeros(1, 1, dtype=torch.bool)
    logits, action, statistic = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.ones(1).double()
    state = [torch.ones(4) for _ in range(4)]
    index, out, weights = torch.zeros(1, dtype=torch.int64), [torch.zeros(1)], torch.zeros(1)
    count, step = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    contenders: dict[str, Contender] = {
        "gae": lambda: ops.gae(column, two, row, row),
        "gae(moments=)": lambda: ops.gae(column, two, row, row, moments=moments),
        "ppo_loss_grad": lambda: ops.ppo_loss_grad(logits=logits, actions=action, old_logp=one, advantages=one),
        "surrogate_loss": lambda: ops.surrogate_loss(logp=one, old_logp=one, advantages=one),
        "sample": lambda: ops.sample(logits=logits, seed=1),
        "adam": lambda: ops.adam(*state, step, learning_rate=1e-3, skip=skip),
        "permutation": lambda: ops.permutation(1, seed=1),
        "permutation(out=)": lambda: ops.permutation(1, seed=1, out=index),
        "gather_minibatch": lambda: ops.gather_minibatch(
            [one], index, index, count=count, part=action, num_parts=1, out=out, weights=weights
        ),
        "normalize": lambda: ops.normalize(column, statistic, statistic),
    }
    return DataCase("least input", {**contenders, LIMIT: CopyOf(8)}, tuple(contenders))
