"""`ops.gather_minibatch` against torch's indexing: any dtype, width and count, unused slots, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyppo import ops, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.uint8, torch.int8, torch.bool, torch.complex64)  # fmt: skip
# Of a row's elements: words of every width, an odd number of bytes, more than a block of words, none.
SHAPES = ((), (1,), (3,), (4,), (17,), (2, 5), (129,), (84, 84), (0,), (2, 0, 3))


def tensor(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=g).to(dtype)


def call_of(seed: int, capacity: int, count: int, part: int, num_parts: int, layouts: list[Any]) -> dict[str, Any]:
    """Arguments; the columns have more rows than are asked for, and order and rows hold garbage behind `count`."""
    g = torch.Generator().manual_seed(seed)
    num_rows, slots = capacity + 3, -(-capacity // num_parts)
    columns = [tensor(g, dtype, num_rows + i % 2, *shape) for i, (dtype, shape) in enumerate(layouts)]
    rows = torch.randperm(num_rows, generator=g)[:capacity]
    order = torch.cat([torch.randperm(count, generator=g), torch.full((capacity - count,), 10**12)])
    rows[count:] = -1
    return {
        "columns": columns, "rows": rows, "order": order, "count": torch.tensor([count]),
        "part": torch.tensor([part]), "num_parts": num_parts,
        "out": [torch.full((slots, *x.shape[1:]), 77).to(x.dtype) for x in columns],
        "weights": torch.full((slots,), float("nan")),
    }  # fmt: skip


def fresh(call: dict[str, Any]) -> dict[str, Any]:
    """The same with outputs of its own."""
    return call | {"out": [torch.zeros_like(x) for x in call["out"]], "weights": torch.zeros_like(call["weights"])}


def assert_as_reference(call: dict[str, Any]) -> None:
    expected = fresh(call)
    reference.gather_minibatch(**expected)
    assert ops.gather_minibatch(**call) is None
    for i, (x, y) in enumerate(zip(call["out"], expected["out"], strict=True)):
        assert torch.equal(x, y), i
    assert torch.equal(call["weights"], expected["weights"])


layouts = st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES[:7] + SHAPES[8:])), min_size=1, max_size=9)


@given(st.integers(0, 2**31), st.integers(1, 200), st.floats(0, 1), st.integers(1, 40), st.floats(0, 1), layouts)
def test_against_the_reference(
    seed: int, capacity: int, used: float, num_parts: int, part: float, layouts: list[Any]
) -> None:
    count = round(used * capacity)
    assert_as_reference(call_of(seed, capacity, count, min(int(part * num_parts), num_parts - 1), num_parts, layouts))


def test_by_hand() -> None:
    column, out, weights = torch.arange(10.0) * 10, torch.zeros(3), torch.zeros(3)
    rows, order = torch.tensor([1, 3, 5, 7, 9, 0]), torch.tensor([4, 2, 0, 1, 3, 0])
    # Of five rows in two parts, the second has order[2:5] = 0, 1, 3: rows 1, 3, 7.
    for part, expected, counted in ((1, [10.0, 30.0, 70.0], [1.0, 1.0, 1.0]), (0, [90.0, 50.0, 90.0], [1.0, 1.0, 0.0])):
        ops.gather_minibatch(
            (column,), rows, order, count=torch.tensor([5]), part=torch.tensor([part]), num_parts=2, out=(out,),
            weights=weights,
        )  # fmt: skip
        assert out.tolist() == expected
        assert weights.tolist() == counted


@pytest.mark.parametrize("count", [0, 1, 2, 99, 100])
def test_the_parts_are_the_whole(count: int) -> None:
    """Every valid row is in one part once, in the order's order; the parts differ by one row at most."""
    seen, sizes = [], []
    for part in range(7):
        call = call_of(3, 100, count, part, 7, [(torch.int64, ())])
        call["columns"] = [torch.arange(200)]
        ops.gather_minibatch(**call)
        kept = call["out"][0][call["weights"] == 1]
        seen.append(kept)
        sizes.append(len(kept))
    assert torch.equal(torch.cat(seen), call["rows"][call["order"][:count]])
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shape", [(84, 84), (4, 84, 84)])
def test_large_rows_on_several_threads(shape: tuple[int, ...], kernel_threads: Callable[[int], None]) -> None:
    for threads in (1, 3):
        kernel_threads(threads)
        assert_as_reference(call_of(5, 130, 127, 1, 2, [(torch.uint8, shape), (torch.float32, ()), (torch.bool, (6,))]))


def test_the_most_columns() -> None:
    assert_as_reference(call_of(1, 33, 30, 2, 4, [(dtype, (3,)) for dtype in (DTYPES * 3)[:32]]))


def test_no_capacity() -> None:
    assert_as_reference(call_of(1, 0, 0, 0, 4, [(torch.float32, (3,))]))


def test_huge_counts_of_parts() -> None:
    """More parts than rows: most are empty, and count * part does not overflow."""
    parts = 2**31 - 1
    for part in (0, 1, 2**30, parts - 1):
        assert_as_reference(call_of(1, 9, 9, part, parts, [(torch.float32, (3,))]))


def test_strided_columns_are_read_right() -> None:
    call = call_of(2, 20, 18, 0, 3, [(torch.float32, (4, 5))])
    call["columns"] = [call["columns"][0].transpose(1, 2).contiguous().transpose(1, 2)]
    assert_as_reference(call)


def test_views_of_one_column_may_be_gathered_twice() -> None:
    call = call_of(2, 20, 18, 0, 3, [(torch.float32, (4,)), (torch.float32, (4,))])
    call["columns"][1] = call["columns"][0]
    assert_as_reference(call)


def good() -> dict[str, Any]:
    return call_of(4, 12, 10, 1, 3, [(torch.float32, (2,)), (torch.uint8, (3,))])


BAD: dict[str, tuple[str, type[Exception], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "no columns": ("columns", ValueError, lambda c: {"columns": [], "out": []}),
    "33 columns": ("columns", ValueError, lambda c: {"columns": c["columns"][:1] * 33}),
    "a tensor of columns": ("columns", TypeError, lambda c: {"columns": c["columns"][0]}),
    "None among columns": (r"columns\[1\]", TypeError, lambda c: {"columns": [c["columns"][0], None]}),
    "a scalar column": (r"columns\[0\]", ValueError, lambda c: {"columns": [torch.zeros(()), c["columns"][1]]}),
    "a column without rows": (
        r"columns\[0\]", ValueError, lambda c: {"columns": [c["columns"][0][:0], c["columns"][1]]}
    ),
    "a column that requires grad": (
        r"columns\[0\]", ValueError, lambda c: {"columns": [c["columns"][0].requires_grad_(), c["columns"][1]]}
    ),
    "fewer outputs": ("out", ValueError, lambda c: {"out": c["out"][:1]}),
    "another width": (r"out\[0\]", ValueError, lambda c: {"out": [torch.zeros(4, 3), c["out"][1]]}),
    "another number of slots": (r"out\[1\]", ValueError, lambda c: {"out": [c["out"][0], c["out"][1][:3]]}),
    "another dtype": (r"out\[0\]", TypeError, lambda c: {"out": [c["out"][0].double(), c["out"][1]]}),
    "a strided output": (r"out\[0\]", ValueError, lambda c: {"out": [torch.zeros(2, 4).t(), c["out"][1]]}),
    "an output twice": ("out", ValueError, lambda c: {"columns": c["columns"][:1] * 2, "out": c["out"][:1] * 2}),
    "an output within its column": (r"out\[0\]", ValueError, lambda c: {"out": [c["columns"][0][:4], c["out"][1]]}),
    "int32 rows": ("rows", TypeError, lambda c: {"rows": c["rows"].int()}),
    "rows of two dimensions": ("rows", ValueError, lambda c: {"rows": c["rows"].view(3, 4)}),
    "a shorter order": ("order", ValueError, lambda c: {"order": c["order"][:-1]}),
    "two counts": ("count", ValueError, lambda c: {"count": torch.tensor([1, 2])}),
    "a count that is no tensor": ("count", TypeError, lambda c: {"count": 3}),
    "a count above the capacity": ("count", ValueError, lambda c: {"count": torch.tensor([13])}),
    "a negative count": ("count", ValueError, lambda c: {"count": torch.tensor([-1])}),
    "a part too many": ("part", ValueError, lambda c: {"part": torch.tensor([3])}),
    "a negative part": ("part", ValueError, lambda c: {"part": torch.tensor([-1])}),
    "no parts": ("num_parts", ValueError, lambda c: {"num_parts": 0}),
    "too many parts": ("num_parts", ValueError, lambda c: {"num_parts": 2**31}),
    "float64 weights": ("weights", TypeError, lambda c: {"weights": c["weights"].double()}),
    "too few weights": ("weights", ValueError, lambda c: {"weights": c["weights"][:3]}),
    "a row that is not there": ("rows", ValueError, lambda c: {"rows": c["rows"].clone().fill_(15)}),
    "a negative row": ("rows", ValueError, lambda c: {"rows": c["rows"].clone().fill_(-1)}),
    "an order beyond count": ("order", ValueError, lambda c: {"order": c["order"].clone().fill_(10)}),
    "a negative order": ("order", ValueError, lambda c: {"order": c["order"].clone().fill_(-5)}),
}  # fmt: skip


@pytest.mark.parametrize("problem", BAD)
def test_refused(problem: str) -> None:
    name, error, change = BAD[problem]
    call = good()
    assert_as_reference(fresh(call))
    with pytest.raises(error, match=rf"^{name}\b" if name.isalpha() else rf"^{name}"):
        ops.gather_minibatch(**{**call, **change(call)})


def test_a_graph_that_saved_an_output_notices() -> None:
    call = good()
    leaf = torch.ones(4, 2, requires_grad=True)
    product = leaf * call["out"][0]
    ops.gather_minibatch(**call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
