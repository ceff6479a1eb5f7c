"""A GPU that works as late as it may: what is asked of its streams is done when somebody must wait, in any order that
streams and events allow."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


class Event:
    """Recorded any number of times; the host waits for the last, a stream for the last before it was told to wait."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu, self.recorded, self.past = gpu, 0, 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded
        stream.ask(lambda: setattr(self, "past", number))

    def synchronize(self) -> None:
        number = self.recorded
        self._gpu.work_until(lambda: self.past >= number)


class Stream:
    """Work in order; an entry is what to do and what must have happened before."""

    def __init__(self, gpu: SimulatedGpu, name: str) -> None:
        self._gpu, self.name = gpu, name
        self.queue: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()

    def ask(self, work: Callable[[], None], ready: Callable[[], bool] = lambda: True) -> None:
        self.queue.append((ready, work))

    def wait_event(self, event: Event) -> None:
        number = event.recorded
        self.ask(lambda: None, lambda: event.past >= number)


class SimulatedGpu:
    """A `pyppo.transfer.Device` on CPU tensors.

    Args:
        seed: of the order in which streams go on. reluctant: a stream that works only when none other can; "copies",
            "compute" or "" for none.
    """

    def __init__(self, seed: int = 0, reluctant: str = "") -> None:
        self._rng, self._reluctant = random.Random(seed), reluctant
        self.copies, self._compute = Stream(self, "copies"), Stream(self, "compute")
        self.waits = 0
        """How often the host had to wait for the device."""
        self.copied: list[tuple[str, int]] = []
        """Stream and bytes of each copy that was asked for."""

    def compute(self) -> Stream:
        return self._compute

    def event(self) -> Event:
        return Event(self)

    def pinned(self, shape, dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def upload(self, x: Tensor) -> Tensor:
        return x.clone()

    def copy(self, pairs, stream: Stream) -> None:
        for target, source in pairs:
            assert target.dtype == source.dtype, "a copy that converts waits for the device"
            assert target.shape == source.shape
            assert target.is_contiguous(), "a copy with gaps is many copies"
            assert source.is_contiguous()
            self.copied.append((stream.name, source.nbytes))
            torch.autograd.graph.increment_version(target)  # which torch counts when asked, not when done
            to, what = target.numpy(), source.numpy()
            stream.ask(lambda to=to, what=what: to.__setitem__(..., what))

    # --- working -----------------------------------------------------------------------------------------------------

    def work_until(self, done: Callable[[], bool]) -> None:
        """Some of the work, until that is so."""
        self.waits += not done()
        while not done():
            self._work()

    def finish(self) -> None:
        """All of the work."""
        while self.copies.queue or self._compute.queue:
            self._work()

    def _work(self) -> None:
        able = [s for s in (self.copies, self._compute) if s.queue and s.queue[0][0]()]
        assert able, "the streams wait for each other, or for what nobody asked"
        willing = [s for s in able if s.name != self._reluctant] or able
        self._rng.choice(willing).queue.popleft()[1]()
