"""How a rollout reaches a GPU: what environments give travels once, as it is, from page-locked memory.

A step's observations are copied on a stream of their own, which the host does not wait for. What the GPU does for one
group overlaps with the steps of another's environments; a copy and an act do not overlap, since the host waits for the
actions of one group before it asks the next one for observations. Events alone keep the order:

- the host writes to a slot again only after its last copy has been made;
- what computes (the stream that is current when a step arrives) waits for the copy before it reads the rows;
- a rollout's copies wait for what was asked of that stream before it began, so that none overtakes the update, or
  whatever else still reads the storage.

So who reads or writes the storage does it on the stream that is current while rollouts are collected, or in order with
it. `Device` is what is asked of a GPU; the tests give a simulated one, whose copies come as late as they may.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Cuda", "Device", "Event", "Results", "Stream", "Uploads"]

Pairs = Iterable[tuple[Tensor, Tensor]]
"""Targets and sources of copies."""


class Stream(Protocol):
    """As `torch.cuda.Stream`."""

    def wait_event(self, event: Any, /) -> None:
        """Let what is asked of the stream from here on wait for the event as it was last recorded."""
        ...


class Event(Protocol):
    """As `torch.cuda.Event`: one that was never recorded is past."""

    def record(self, stream: Any, /) -> None:
        """Take place when what was asked of the stream so far is done."""
        ...

    def synchronize(self) -> None:
        """Wait for it on the host."""
        ...


class Device(Protocol):
    """What is asked of a GPU."""

    @property
    def copies(self) -> Stream:
        """The stream that observations are copied on."""
        ...

    def compute(self) -> Stream:
        """The current stream."""
        ...

    def event(self) -> Event:
        """A new one."""
        ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Page-locked memory, zeros."""
        ...

    def upload(self, x: Tensor) -> Tensor:
        """A new tensor on the device with what `x` holds; nobody waits."""
        ...

    def copy(self, pairs: Pairs, stream: Stream) -> None:
        """Copies each pair's source to its target, in order, on `stream`; nobody waits."""
        ...


class Cuda:
    """A CUDA device, by torch.

    Args:
        device: the device; without an index, the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.copies: Stream = torch.cuda.Stream(self.device)

    def compute(self) -> Stream:
        """The current stream."""
        return torch.cuda.current_stream(self.device)

    def event(self) -> Event:
        """A new one."""
        return torch.cuda.Event()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Page-locked memory, zeros."""
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def upload(self, x: Tensor) -> Tensor:
        """A new tensor on the device, through page-locked memory that torch keeps until it has been read."""
        return x.pin_memory().to(self.device, non_blocking=True)

    def copy(self, pairs: Pairs, stream: Any) -> None:
        """Copies sources to targets, on `stream`."""
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)


class Uploads:
    """One group's way to its rows of the storage, a step at a time: `begin`, `columns[i][t] = array`, `send(t)`.

    A step is one copy for each entry, since entries lie apart in the storage.

    Args:
        storage: entries `[T+1, N, ...]` on the device.
        rows: the group's, of N.
        device: where the storage lies.
        num_slots: how many steps may be on their way before the host waits.

    Attributes:
        columns: for each entry what takes a step's `[n, ...]`, cast to the entry's type.
    """

    def __init__(self, storage: Iterable[Tensor], rows: slice, device: Device, num_slots: int = 2) -> None:
        self._storage, self._rows, self._device = list(storage), rows, device
        shapes = [(x[0, rows].shape, x.dtype) for x in self._storage]
        self._slots = [[device.pinned(*shape) for shape in shapes] for _ in range(num_slots)]
        self._copied = [device.event() for _ in range(num_slots)]
        self._began = device.event()
        self._turn = 0
        self.columns = [SlotColumn([x.numpy() for x in slots]) for slots in zip(*self._slots, strict=True)]

    def fence(self) -> None:
        """Let no later copy overtake what has been asked of the device so far."""
        self._began.record(self._device.compute())
        self._device.copies.wait_event(self._began)

    def begin(self) -> None:
        """Take the next slot, once its last copy has been made; the columns write to it from here on."""
        self._copied[self._turn].synchronize()
        for column in self.columns:
            column.take(self._turn)

    def send(self, t: int) -> None:
        """Start the copies to row t; what is asked of the current stream from here on waits for them."""
        device, copied = self._device, self._copied[self._turn]
        targets = [x[t, self._rows] for x in self._storage]
        device.copy(zip(targets, self._slots[self._turn], strict=True), device.copies)
        copied.record(device.copies)
        device.compute().wait_event(copied)
        self._turn = (self._turn + 1) % len(self._slots)


class SlotColumn:
    """Writes an entry's steps to the slot whose turn it is."""

    def __init__(self, slots: Sequence[np.ndarray]) -> None:
        self._slots, self._slot = slots, slots[0]

    def take(self, turn: int) -> None:
        """Write to this slot from here on."""
        self._slot = self._slots[turn]

    def __setitem__(self, t: int, array: np.ndarray) -> None:
        self._slot[...] = array


class Results:
    """What a rollout's end brings: flags, rewards, and where the valid rows are, three copies on the current stream.

    Args:
        flags: bool `[3, P]` on the device, of each row the first T * N elements: terminated, truncated, valid.
        rewards: float32 `[T, N]` on the device.
        device: where they lie.

    Attributes:
        flags: the three, bool `[T, N]` and page-locked. Written between `begin` and `send`.
    """

    def __init__(self, flags: Tensor, rewards: Tensor, device: Device) -> None:
        self._targets, self._device, self._copied = (flags, rewards), device, device.event()
        self._sources = tuple(device.pinned(x.shape, x.dtype) for x in self._targets)
        self.flags = [x[: rewards.numel()].reshape(rewards.shape) for x in self._sources[0].numpy()]

    def begin(self) -> None:
        """Wait until the last rollout's copies have been made."""
        self._copied.synchronize()

    def send(self, rewards: Tensor) -> Tensor:
        """Start the copies, with these rewards `[T, N]` of the CPU.

        Returns:
            the valid rows on the device, flat indices int64 `[n]`, a new tensor.
        """
        device = self._device
        self._sources[1].copy_(rewards)
        device.copy(zip(self._targets, self._sources, strict=True), device.compute())
        self._copied.record(device.compute())
        return device.upload(torch.from_numpy(np.flatnonzero(self.flags[2])))
