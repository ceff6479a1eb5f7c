"""How the kernels run: streams, captured graphs, repeated launches, several devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_cases import DEVICE, KERNELS, loss_kernel
from torch import Tensor

from pyppo import ops


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def halve(inputs: dict[str, object]) -> None:
    """Other numbers in the same memory."""
    for x in inputs.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.mul_(0.5)


@pytest.mark.parametrize("name", KERNELS)
def test_a_thousand_launches_give_the_same_bits(name: str) -> None:
    kernel = KERNELS[name](DEVICE)
    first = kernel.call()
    for _ in range(1000):
        assert_same(kernel.call(), first)


@pytest.mark.parametrize("name", KERNELS)
def test_runs_on_the_current_stream(name: str) -> None:
    kernel = KERNELS[name](DEVICE)
    halve(kernel.inputs)
    expected = kernel.call()
    for x in kernel.inputs.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.mul_(2.0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a launch on any other stream would read the inputs before they are halved
        halve(kernel.inputs)
        actual = kernel.call()
    stream.synchronize()
    assert_same(actual, expected)


@pytest.mark.parametrize("name", KERNELS)
def test_capture_and_replay(name: str) -> None:
    kernel = KERNELS[name](DEVICE)
    kernel.call()  # once before the capture, as graphs need
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.call()
    for _ in range(3):
        halve(kernel.inputs)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, kernel.call())


@pytest.mark.parametrize("name", KERNELS)
def test_launches_on_other_streams_and_replays_do_not_disturb(name: str) -> None:
    """Whichever block of a launch is last finishes it: launches at the same time must not count each other's."""
    kernel = KERNELS[name](DEVICE)
    expected = kernel.call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.call()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    torch.cuda._sleep(100_000_000)  # so that all of it is queued before any of it runs
    together = torch.cuda.Event()
    together.record()
    for stream in streams:
        stream.wait_event(together)
    for _ in range(20):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(kernel.call())
    torch.cuda.synchronize()
    for actual in [captured, *found]:
        assert_same(actual, expected)


def test_the_first_count_may_be_taken_while_capturing() -> None:
    """Its memory is allocated then. One block needs none, so the kernel can be loaded without."""
    code = """
import torch
from gpu_cases import gae_kernel
gae_kernel(33, 7, moments=True).call()
kernel = gae_kernel(130, 1000, moments=True)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = kernel.call()
graph.replay()
torch.cuda.synchronize()
assert all(torch.equal(x, y) for x, y in zip(captured, kernel.call(), strict=True))
"""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=True)


@pytest.mark.parametrize("name", KERNELS)
def test_the_tensors_device_counts(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device: this needs two")
    expected = KERNELS[name]("cuda:0").call()
    with torch.cuda.device(0):
        actual = KERNELS[name]("cuda:1").call()
        assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in actual)
    assert_same(tuple(x.cpu() for x in actual), tuple(x.cpu() for x in expected))


def test_one_call_one_device() -> None:
    kernel = loss_kernel("categorical", 10, 3)
    with pytest.raises(ValueError, match="actions"):
        ops.ppo_loss_grad(**{**kernel.inputs, "actions": kernel.inputs["actions"].cpu()})
    with pytest.raises(ValueError, match="returns"):
        ops.ppo_loss_grad(**{**kernel.inputs, "returns": kernel.inputs["returns"].cpu()})


def test_half_precision_is_the_network_s_alone() -> None:
    kernel = loss_kernel("categorical", 10, 3)
    with pytest.raises(TypeError, match="advantages"):
        ops.ppo_loss_grad(**{**kernel.inputs, "advantages": kernel.inputs["advantages"].half()})
