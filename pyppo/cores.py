"""Which cores collect rollouts: one that all groups of environments share, or one for each, served at the same time."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol

from pyppo.ops import get_num_threads, set_alone

__all__ = ["Cores", "at_once", "thread_ids"]


class Pool(Protocol):
    """Environments that threads step: `pyppo.envpool_envs.EnvPoolVectorEnv`."""

    threads: frozenset[int]
    """The system's numbers of its threads, as `thread_ids` gives them."""
    one_core: bool
    """Whether the caller shares its core with them."""


class Cores:
    """Keeps what collects on one core for a while, or on one for each pool: `with cores: ...`.

    The first core is the one that the caller runs on when the block begins, so that several processes do not all
    choose the same. Afterwards the caller, and threads that were started meanwhile, may run where the caller might
    before. EnvPool's threads have nothing to do until the next block, and stay.

    Args:
        pools: EnvPool's environments, a pool for each group.
        each: one core for each pool, as far as there are enough; the caller's for the first. The threads that serve the
            others begin with `cores.begin(index)`. Kernels that they call run on their own thread.
    """

    def __init__(self, pools: Iterable[Pool], each: bool = False) -> None:
        self._pools = list(pools)
        self.each = each
        get_num_threads()  # decided by the cores that the first to ask may use
        self._before: set[int] = set()
        self._known: frozenset[int] = frozenset()
        self._cores: list[int] = []

    def __enter__(self) -> Cores:
        self._before, self._known = os.sched_getaffinity(0), thread_ids()
        self._cores = self._choose()
        try:
            self.begin(0)
            for pool, core in zip(self._pools, self._cores, strict=True):
                for thread in sorted(pool.threads):
                    with suppress(ProcessLookupError):  # one that another library started meanwhile, and that has ended
                        os.sched_setaffinity(thread, {core})
                pool.one_core = True
        except BaseException:  # Ctrl-C too
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        os.sched_setaffinity(0, self._before)  # first: Ctrl-C may come at any time
        set_alone(False)
        for pool in self._pools:
            pool.one_core = False
        for thread in thread_ids() - self._known:
            with suppress(ProcessLookupError):  # a thread that has ended
                os.sched_setaffinity(thread, self._before)

    def begin(self, index: int) -> None:
        """What a thread does before it serves that pool."""
        os.sched_setaffinity(0, {self._cores[index]})
        set_alone(self.each)

    def _choose(self) -> list[int]:
        """Each pool's core, from the caller's on and far apart: neighbours may be two halves of one."""
        allowed = sorted(self._before)
        first, count = allowed.index(_current_core(self._before)), len(allowed)
        stride = max(1, count // len(self._pools)) if self.each else 0
        return [allowed[(first + i * stride) % count] for i in range(len(self._pools))]


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
Task = Callable[[GivenUp], None]


def at_once(tasks: Sequence[Task], cores: Cores) -> None:
    """Run tasks at the same time, the first on the calling thread, and return or raise when all have ended.

    Args:
        tasks: each is given a function that says whether another has failed, and ends soon where it has.
        cores: in whose block this is called; task i serves its pool i.

    Raises:
        what a task raised, of several the first task's. Ctrl-C counts as the first task's.
    """
    helpers = _Helpers(tasks[1:], cores)
    try:
        helpers.start()
        tasks[0](helpers.given_up)
    except BaseException:  # Ctrl-C too
        helpers.give_up()
        raise
    finally:
        helpers.wait()
    helpers.raise_error()


class _Helpers:
    """The threads beside the caller's. Each says itself when it begins and ends: what `Thread.join` says after Ctrl-C
    came while it waited is not true (before Python 3.13)."""

    def __init__(self, tasks: Sequence[Task], cores: Cores) -> None:
        self._tasks, self._cores = tasks, cores
        self._lock, self._failed = threading.Lock(), threading.Event()
        self._ended: dict[int, threading.Event] = {}
        """Of those that have begun."""
        self._errors: dict[int, BaseException] = {}
        self.given_up = self._failed.is_set

    def start(self) -> None:
        for i in range(len(self._tasks)):
            threading.Thread(target=self._run, args=(i,), daemon=True).start()

    def give_up(self) -> None:
        """Tell those that run, and keep those that have not begun from it."""
        with self._lock:
            self._failed.set()

    def wait(self) -> None:
        """Until none runs; Ctrl-C meanwhile is raised then."""
        interrupt: BaseException | None = None
        while True:
            try:
                if interrupt is not None:
                    self.give_up()
                if self.given_up() or len(self._ended) == len(self._tasks):
                    with self._lock:
                        begun = list(self._ended.values())
                    for ended in begun:
                        ended.wait()
                    break
                time.sleep(1e-4)  # one has been started and not begun yet
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def raise_error(self) -> None:
        if self._errors:
            raise self._errors[min(self._errors)]

    def _run(self, index: int) -> None:
        with self._lock:
            if self.given_up():
                return
            ended = self._ended[index] = threading.Event()
        try:
            self._cores.begin(index + 1)
            self._tasks[index](self.given_up)
        except BaseException as error:  # for the caller to raise
            self._errors[index] = error
            self._failed.set()
        finally:
            ended.set()
