"""Which cores collect rollouts: one that all groups of environments share, or one for each, served at the same time."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from pyppo.ops import get_num_threads, set_alone

__all__ = ["OneCore", "at_once", "thread_ids"]


class Pool(Protocol):
    """Environments that threads step: `pyppo.envpool_envs.EnvPoolVectorEnv`."""

    threads: frozenset[int]
    """The system's numbers of its threads, as `thread_ids` gives them."""
    one_core: bool
    """Whether the caller shares its core with them."""


class OneCore:
    """Keeps the calling thread and EnvPool's on one core for a while: `with one_core: ...`.

    The core is the one that the caller runs on when the block begins, so that several processes do not all choose the
    same. Afterwards the caller, and threads that were started meanwhile, may run where the caller might before.
    EnvPool's threads have nothing to do until the next block, and stay.

    Args:
        pools: EnvPool's environments, a pool for each group.
        each: one core for each pool. The first one's is the caller's; in the block, the threads that serve the others
            begin with `with one_core.serving(index): ...`. Kernels that they call run on their own thread.

    Raises:
        ValueError: `each`, and there are more pools than cores (when the block begins).
    """

    def __init__(self, pools: Iterable[Pool], each: bool = False) -> None:
        self._pools = list(pools)
        self.each = each
        get_num_threads()  # decided by the cores that the first to ask may use
        self._before: set[int] = set()
        self._known: frozenset[int] = frozenset()
        self._cores: list[int] = []
        self._torch_threads = 1

    def __enter__(self) -> OneCore:
        self._before, self._known = os.sched_getaffinity(0), thread_ids()
        self._cores = self._choose()
        self._torch_threads = torch.get_num_threads()
        try:
            os.sched_setaffinity(0, {self._cores[0]})  # the caller
            set_alone(self.each)
            for env, core in zip(self._pools, self._cores, strict=True):
                for thread in sorted(env.threads):
                    with suppress(ProcessLookupError):  # one that another library started meanwhile, and that has ended
                        os.sched_setaffinity(thread, {core})
                env.one_core = True
        except BaseException:  # Ctrl-C too
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        set_alone(False)
        for env in self._pools:
            env.one_core = False
        for thread in (0, *(thread_ids() - self._known)):
            with suppress(ProcessLookupError):  # a thread that has ended
                os.sched_setaffinity(thread, self._before)

    @contextmanager
    def serving(self, index: int) -> Iterator[None]:
        """What a thread of its own does around serving that pool."""
        os.sched_setaffinity(0, {self._cores[index]})
        set_alone(True)
        torch.set_num_threads(self._torch_threads)  # which a new thread does not have from the one that started it
        yield

    def _choose(self) -> list[int]:
        """Each pool's core."""
        first = _current_core(self._before)
        if not self.each:
            return [first] * len(self._pools)
        cores = [first, *sorted(self._before - {first})]
        if len(cores) < len(self._pools):
            raise ValueError(f"there are {len(self._pools)} pools; there must be at most {len(cores)}, one for a core")
        return cores[: len(self._pools)]


def _current_core(allowed: set[int]) -> int:
    """The core that the caller runs on; any that it may use where the system does not say."""
    try:
        core = ctypes.CDLL(None).sched_getcpu()
    except (OSError, AttributeError):
        return min(allowed)
    return core if core in allowed else min(allowed)


def thread_ids() -> frozenset[int]:
    """The system's numbers of this process' threads; none where the system does not say."""
    try:
        return frozenset(map(int, os.listdir("/proc/self/task")))  # noqa: PTH208
    except OSError:
        return frozenset()


GivenUp = Callable[[], bool]


def at_once(tasks: Sequence[Callable[[GivenUp], None]], cores: OneCore) -> None:
    """Run tasks at the same time, the first on the calling thread, and return when all have ended.

    Args:
        tasks: each is given a function that says whether another has failed, and ends soon where it has.
        cores: in whose block this is called; task i serves its pool i.

    Raises:
        what a task raised, of several the first task's.
    """
    failed = threading.Event()
    errors: dict[int, BaseException] = {}

    def run(index: int) -> None:
        try:
            with cores.serving(index):
                tasks[index](failed.is_set)
        except BaseException as error:  # for the caller to raise
            errors[index] = error
            failed.set()

    started: list[threading.Thread] = []
    try:
        for i in range(1, len(tasks)):
            thread = threading.Thread(target=run, args=(i,), daemon=True)
            thread.start()
            started.append(thread)
        tasks[0](failed.is_set)
        for thread in started:
            thread.join()
    except BaseException:  # Ctrl-C too, also while the others are waited for
        failed.set()
        for thread in started:
            thread.join()
        raise
    if errors:
        raise errors[min(errors)]
