"""What is asked of torch.cuda to capture a step, in which order, and what is left where it fails. torch.cuda is played
by a recorder; `tests/cuda/test_cuda_graph_engine.py` asks the real one."""

from contextlib import contextmanager

import pytest
import torch

from pyppo.engines.captured import CaptureError, Graphs

GPU = torch.device("cuda", 0)


class Recorder:
    """Plays torch.cuda: one current stream, a mode, and a log of what happened."""

    def __init__(self):
        self.log, self.mode, self.pools, self.capturing = [], 0, 0, False
        self.now = self.default = FakeStream(self, "default")

    def Stream(self, device):
        assert device == GPU
        return FakeStream(self, "side")

    def CUDAGraph(self):
        return FakeGraph(self)

    def current_stream(self, device):
        assert device == GPU
        return self.now

    def graph_pool_handle(self):
        self.pools += 1
        return (self.pools, 0)

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph, pool, stream):
        """As torch's: where the end of a capture fails, its stream stays the current one."""
        self.now, graph.pool, self.capturing = stream, pool, True
        try:
            yield
        finally:
            self.capturing = False
            if self.log[-1] == "broken":
                raise RuntimeError("capture is no longer valid")


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeGraph:
    def __init__(self, cuda):
        self.cuda, self.pool = cuda, None

    def replay(self):
        self.cuda.log.append(f"replay on {self.cuda.now.name}")


@pytest.fixture
def cuda(monkeypatch):
    recorder = Recorder()
    for name in (
        "Stream", "CUDAGraph", "current_stream", "graph_pool_handle", "get_sync_debug_mode", "set_sync_debug_mode",
        "stream", "graph",
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, getattr(recorder, name))
    return recorder


def step_on(cuda, fails_at=None, error=None):
    calls = []

    def step():
        calls.append(None)
        if len(calls) == fails_at:
            if cuda.capturing:
                cuda.log.append("broken")
            raise error
        cuda.log.append(f"step on {cuda.now.name}, mode {cuda.mode}{', captured' if cuda.capturing else ''}")

    return step


def test_a_step_is_called_twice_and_then_captured(cuda):
    replay = Graphs(GPU).capture(step_on(cuda), lambda: cuda.log.append("start"))
    replay()
    assert cuda.log == [
        "side waits for default",
        "start",
        "step on side, mode 0",
        "start",
        "step on side, mode error",
        "start",
        "step on side, mode 0, captured",
        "default waits for side",
        "replay on default",
    ]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_where_it_fails_everything_is_as_it_was(cuda, fails_at):
    graphs = Graphs(GPU)
    cause = ValueError("synchronizing\nsecond line")
    with pytest.raises(CaptureError, match=r"^ValueError: synchronizing$"):
        graphs.capture(step_on(cuda, fails_at, cause), lambda: None)
    assert (cuda.now, cuda.mode, cuda.capturing) == (cuda.default, 0, False)
    assert cuda.log[-1] == "default waits for side"
    graphs.capture(step_on(cuda), lambda: None)()
    assert cuda.log[-1] == "replay on default"


def test_a_capture_whose_end_fails_is_ended_for_the_allocator(cuda, monkeypatch):
    for name in ("endAllocateToPool", "releasePool"):
        say = lambda index, pool, name=name: cuda.log.append(f"{name} {index} {pool}")  # noqa: E731
        monkeypatch.setattr(torch._C, f"_cuda_{name}", say)
    monkeypatch.setattr(torch, "zeros", lambda size, device: cuda.log.append(f"capture on {cuda.now.name}"))
    graphs = Graphs(GPU)
    with pytest.raises(CaptureError):
        graphs.capture(step_on(cuda, 3, RuntimeError()), lambda: None)
    ended = ["endAllocateToPool 0 (1, 0)", "releasePool 0 (1, 0)", "capture on side", "default waits for side"]
    assert cuda.log[-4:] == ended


def test_graphs_share_a_pool_until_one_fails_or_all_are_forgotten(cuda):
    graphs, pools = Graphs(GPU), []
    for change in (lambda: None, lambda: None, graphs.forget, lambda: fail(graphs, cuda)):
        change()
        pools.append(graphs.capture(step_on(cuda), lambda: None).__self__.pool)
    assert pools[0] == pools[1]
    assert len(set(pools)) == 3


def fail(graphs, cuda):
    with pytest.raises(CaptureError):
        graphs.capture(step_on(cuda, 2, ValueError()), lambda: None)


def test_an_interrupt_is_no_failure_to_capture(cuda):
    with pytest.raises(KeyboardInterrupt):
        Graphs(GPU).capture(step_on(cuda, 2, KeyboardInterrupt()), lambda: None)
    assert (cuda.now, cuda.mode) == (cuda.default, 0)


def test_on_the_cpu_a_step_is_run_as_it_is():
    calls = []
    step = Graphs(torch.device("cpu")).capture(lambda: calls.append("step"), lambda: calls.append("start"))
    assert calls == []
    step()
    assert calls == ["step"]
