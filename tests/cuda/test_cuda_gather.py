"""`ops.gather_minibatch` on a GPU: the CPU's bits, replayed as count and part change, and what is out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import DEVICE, gather_case, gather_inputs

from pyppo import ops, reference


def expected_of(case: dict[str, Any]) -> dict[str, Any]:
    """The reference on the CPU."""
    expected = gather_inputs(case, "cpu")
    reference.gather_minibatch(**expected)
    return expected


def assert_same(inputs: dict[str, Any], expected: dict[str, Any]) -> None:
    for i, (x, y) in enumerate(zip(inputs["out"], expected["out"], strict=True)):
        assert torch.equal(x.cpu(), y), i
    assert torch.equal(inputs["weights"].cpu(), expected["weights"])


@pytest.mark.parametrize(("count", "part"), [(0, 0), (0, 2), (1, 0), (1, 2), (2, 1), (255, 0), (256, 1), (300, 2)])
@pytest.mark.parametrize("num_parts", [3, 7])
def test_matches_the_reference(count: int, part: int, num_parts: int) -> None:
    case = gather_case(300, count, part, num_parts)
    inputs = gather_inputs(case)
    ops.gather_minibatch(**inputs)
    assert_same(inputs, expected_of(case))


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_matches_at_any_alignment(shift: int) -> None:
    """Columns and outputs that begin some bytes after an aligned address."""
    case = gather_case(40, 37, 1, 2)
    case["columns"] = [torch.arange(45 * 48, dtype=torch.int32).to(torch.uint8).view(45, 48)]
    inputs = gather_inputs(case)
    for name in ("columns", "out"):
        whole = torch.zeros(inputs[name][0].numel() + shift, dtype=torch.uint8, device=DEVICE)
        moved = whole[shift:].view_as(inputs[name][0])
        inputs[name] = [moved.copy_(inputs[name][0])]
    ops.gather_minibatch(**inputs)
    assert_same(inputs, expected_of(case))


def test_empty() -> None:
    inputs = gather_inputs(gather_case(0, 0, 0, 3))
    ops.gather_minibatch(**inputs)
    assert inputs["weights"].shape == (0,)


def test_replays_follow_count_and_part() -> None:
    case = gather_case(300, 300, 0, 4)
    inputs = gather_inputs(case)
    ops.gather_minibatch(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gather_minibatch(**inputs)
    for count in (300, 117, 1, 0):
        g = torch.Generator().manual_seed(count)
        order = torch.cat([torch.randperm(count, generator=g), torch.zeros(300 - count, dtype=torch.int64)])
        inputs["order"].copy_(order)
        inputs["count"].fill_(count)
        for part in range(4):
            inputs["part"].fill_(part)
            graph.replay()
            torch.cuda.synchronize()
            changed = {"order": order, "count": torch.tensor([count]), "part": torch.tensor([part])}
            assert_same(inputs, expected_of({**case, **changed}))


@pytest.mark.parametrize("name", ["rows", "order", "count", "part"])
@pytest.mark.parametrize("bad", [-1, 10**15])
def test_out_of_range_is_noted(name: str, bad: int) -> None:
    inputs = gather_inputs(gather_case(30, 30, 1, 2))
    ops.check_errors(DEVICE)
    inputs[name][:] = bad
    ops.gather_minibatch(**inputs)
    with pytest.raises(ValueError, match="out of range for slot 0 of a minibatch"):
        ops.check_errors(DEVICE)
    ops.check_errors(DEVICE)
    assert all(x.isfinite().all() for x in inputs["out"])


def test_only_the_slot_concerned_is_noted() -> None:
    case = gather_case(30, 30, 1, 2)
    inputs = gather_inputs(case)
    inputs["rows"][inputs["order"][15 + 4]] = 35
    ops.gather_minibatch(**inputs)
    with pytest.raises(ValueError, match="slot 4 of a minibatch"):
        ops.check_errors(DEVICE)
    expected = expected_of(case)
    keep = [i for i in range(15) if i != 4]
    for x, y in zip(inputs["out"], expected["out"], strict=True):
        assert torch.equal(x.cpu()[keep], y[keep])
