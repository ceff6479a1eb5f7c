"""A queue of training runs that can be interrupted and continued: results are appended to a file as they come.

    jobs = [Job(f"CartPole-v1/s{seed}", train, {"env_id": "CartPole-v1", "seed": seed}) for seed in (1, 2, 3)]
    failures = run_jobs(jobs, Path("results.jsonl"), parallel=2)
    results = {key: record["result"] for key, record in finished(jobs, Path("results.jsonl")).items()}

The file has one JSON object a line: key, arguments, result, seconds, cpu_seconds (of its process), finished (date),
commit, extension (SHA-256 of the compiled one), machine (its cores and threads are the run's share), parallel (runs
at a time). A job is done if a line has its key and its arguments, so changed settings are new runs. Changed code
makes none: the line says which commit it was, and to run again is to delete it. What is broken off leaves no line; a
line that is only half there counts for nothing. Several calls may work on one file: each job is locked by who runs
it.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import _child
from _common import console, machine

Record = dict[str, Any]
_THREADS = ("PYPPO_NUM_THREADS", "OMP_NUM_THREADS")
_CODE = (":(top)pyppo", ":(top)csrc", ":(top)bench", ":(top,exclude)bench/results")
_POLL = 0.5  # seconds between looks at whether a process has ended without a word


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        key: names it, in the file and on the screen.
        function: a function of a module's top level, called in a process of its own; it returns JSON values.
        arguments: its keyword arguments, JSON values.
        weight: how long it takes, in any unit that all jobs share (environment steps, say); for the time left.
        upgrade: from the arguments of an older record, which may lack what was added since, to those of today.
    """

    key: str
    function: Callable[..., Mapping[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

    @property
    def identity(self) -> str:
        """What makes two jobs the same."""
        return _identity(self.key, self.arguments)


@dataclass(frozen=True)
class Failure:
    """A job that raised, or whose process ended; it is tried again in the next call."""

    key: str
    why: str


def _identity(key: str, arguments: Mapping[str, Any]) -> str:
    return json.dumps([key, arguments], sort_keys=True)


# --- the file -------------------------------------------------------------------------------------------------------


def read_records(path: Path, *, quiet: bool = False) -> list[Record]:
    """All whole lines of a results file, the oldest first; none if there is no file. The others are told of."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    records = [record for line in lines if line.strip() and (record := _parse(line)) is not None]
    broken = sum(1 for line in lines if line.strip()) - len(records)
    if broken and not quiet:
        console.print(f"{path}: {broken} broken line{'s' if broken > 1 else ''} passed over")
    return records


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    kinds = {"key": str, "arguments": dict, "result": dict, "seconds": (int, float)}
    whole = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in kinds.items())
    return record if whole else None


def finished(jobs: Sequence[Job], path: Path, *, quiet: bool = False) -> dict[str, Record]:
    """The records of those jobs that are done, by key, in the jobs' order; the newest where there are several."""
    wanted = {job.key: job for job in jobs}
    found = {}
    for record in read_records(path, quiet=quiet):
        job = wanted.get(record["key"])
        if job is not None and _is_of(job, record):
            found[job.key] = record
    return {key: found[key] for key in wanted if key in found}


def _is_of(job: Job, record: Record) -> bool:
    """Whether a record of the job's key is of its arguments too."""
    try:
        arguments = job.upgrade(record["arguments"])
    except (KeyError, TypeError, ValueError):  # another program's, whose arguments mean nothing here
        return False
    return _identity(job.key, arguments) == job.identity


class _Locks:
    """Locks in a file beside the results: one to append, one for each job. They end with the process that has them.

    A lock is one byte of the file, which need not be that long; the kernel keeps them apart by process.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.with_name(path.name + ".lock").open("a")

    def take(self, identity: str) -> bool:
        """Whether the job is ours now."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._byte(identity))
        except OSError:
            return False
        return True

    def release(self, identity: str) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._byte(identity))

    @contextmanager
    def appending(self) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, 0)

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def _byte(identity: str) -> int:
        return 1 + int.from_bytes(hashlib.sha256(identity.encode()).digest()[:6], "big")


def _append(path: Path, record: Record, locks: _Locks) -> None:
    """One whole line, and on the disk before anything else happens."""
    line = json.dumps(record) + "\n"
    with locks.appending(), path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
            line = "\n" + line  # what was broken off there stays a line of its own
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


# --- running --------------------------------------------------------------------------------------------------------


def run_jobs(jobs: Sequence[Job], path: Path, *, parallel: int = 1) -> list[Failure]:
    """Run the jobs that are not done, in their order, `parallel` at a time, and append their results to `path`.

    Each runs in a new process (EnvPool hangs after a fork), on its own share of the cores: on one core, a process and
    its environments' threads spend no time on waking one another. A line after each says how many are done and how long
    the rest takes. Ctrl-C ends the running ones and the program; no more is lost.

    Returns:
        The jobs that failed; the others went on.

    Raises:
        ValueError: two jobs are the same, or `parallel` is below 1.
    """
    if parallel < 1:
        raise ValueError(f"parallel is {parallel}; it must be at least 1")
    if len({job.key for job in jobs}) < len(jobs):
        keys = [job.key for job in jobs]
        raise ValueError(f"jobs has {next(k for k in keys if keys.count(k) > 1)!r} twice; each key must be there once")
    path.parent.mkdir(parents=True, exist_ok=True)
    queue = _Queue(jobs, path, parallel)
    with _share_of_cores(parallel):
        try:
            queue.run()
        except KeyboardInterrupt:
            console.print("broken off; the same command goes on from here")
            raise SystemExit(130) from None
        finally:
            queue.close()
    return queue.failures


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    start: float
    slot: int
    """Which share of the cores is its own."""
    facts: Mapping[str, Any]
    """Commit, extension, machine and `parallel` when the process began: what it imports, and what ran beside it."""


class _Queue:
    """The jobs that wait and those that run."""

    def __init__(self, jobs: Sequence[Job], path: Path, parallel: int) -> None:
        self.path, self.parallel = path, parallel
        self.failures: list[Failure] = []
        done = finished(jobs, path)
        self._waiting = [job for job in jobs if job.key not in done]
        self._running: dict[Connection, _Running] = {}
        self._progress = _Progress(jobs, done, parallel)
        self._locks = _Locks(path)
        self._elsewhere = 0

    def run(self) -> None:
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self.parallel:
                self._start(self._waiting.pop(0))
            for connection in wait(list(self._running), timeout=_POLL):
                assert isinstance(connection, Connection)
                self._finish(connection)
        if self._elsewhere:
            console.print(f"{self._elsewhere} of the runs belong to another call on {self.path}")
        for failure in self.failures:
            console.print(f"failed: {failure.key}\n{failure.why}", markup=False)

    def _start(self, job: Job) -> None:
        if not self._locks.take(job.identity):
            self._elsewhere += 1
            self._progress.leave(job)
            return
        if finished([job], self.path, quiet=True):  # by another call, since this one began
            self._locks.release(job.identity)
            self._progress.add(job, None)
            return
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_child.call, args=(theirs, job.function, dict(job.arguments)), daemon=True)
        slot = min(set(range(self.parallel)) - {one.slot for one in self._running.values()})
        with _inherited_cores(slot, self.parallel) as cores:
            process.start()
        theirs.close()
        threads = int(os.environ[_THREADS[0]])
        shared = machine() | {"cores": len(cores), "kernel_threads": threads, "torch_threads": threads}
        facts = {"commit": commit(), "extension": extension(), "machine": shared, "parallel": self.parallel}
        self._running[ours] = _Running(job, process, time.perf_counter(), slot, facts)

    def _finish(self, connection: Connection) -> None:
        one = self._running.pop(connection)
        try:
            result, why, cpu = connection.recv()
        except (EOFError, OSError):  # without a word, or in the middle of one
            one.process.join()
            result, why, cpu = None, f"the process ended without a result, exit status {one.process.exitcode}", 0.0
        connection.close()
        one.process.join()
        seconds = time.perf_counter() - one.start
        if result is None:
            self.failures.append(Failure(one.job.key, why))
            self._progress.fail(one.job, why)
        else:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            record = {"key": one.job.key, "arguments": one.job.arguments, "result": result}
            record |= {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3), "finished": now}
            record |= one.facts
            _append(self.path, record, self._locks)
            self._progress.add(one.job, seconds)
        self._locks.release(one.job.identity)

    def close(self) -> None:
        """End what still runs."""
        for connection, one in self._running.items():
            one.process.kill()
            one.process.join()
            connection.close()
        self._locks.close()


@contextmanager
def _inherited_cores(slot: int, parallel: int) -> Iterator[Sequence[int]]:
    """New processes may use one of `parallel` shares of the cores; all of them where there are fewer cores."""
    before = os.sched_getaffinity(0)
    share = sorted(before)[slot::parallel] if parallel <= len(before) else sorted(before)
    os.sched_setaffinity(0, share)
    try:
        yield share
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _share_of_cores(parallel: int) -> Iterator[None]:
    """New processes read how many threads they may have from the environment."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, str(max(1, len(os.sched_getaffinity(0)) // parallel))))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- progress -------------------------------------------------------------------------------------------------------


class _Progress:
    """Says how far it is. The time left is what a unit of weight has taken in this call, or in the file until a run has
    ended: those there may be of another day, or of another machine."""

    def __init__(self, jobs: Sequence[Job], done: Mapping[str, Record], parallel: int) -> None:
        self._total, self._done, self._parallel = len(jobs), len(done), parallel
        self._left = sum(job.weight for job in jobs if job.key not in done)
        known = [job for job in jobs if job.key in done]
        self._of_file = sum(job.weight for job in known), sum(done[job.key]["seconds"] for job in known)
        self._weight, self._seconds = 0.0, 0.0  # of this call
        if self._left:
            console.print(f"{self._done} of {self._total} runs are done{self._time_left()}")

    def add(self, job: Job, seconds: float | None) -> None:
        self._done += 1
        self._left -= job.weight
        if seconds is not None:
            self._weight, self._seconds = self._weight + job.weight, self._seconds + seconds
            console.print(f"{self._done}/{self._total} {job.key}: {seconds:.0f} s{self._time_left()}", markup=False)

    def leave(self, job: Job) -> None:
        self._left -= job.weight

    def fail(self, job: Job, why: str) -> None:
        self.leave(job)
        console.print(f"{job.key} failed: {why.strip().splitlines()[-1]}", markup=False)

    def _time_left(self) -> str:
        weight, seconds = (self._weight, self._seconds) if self._weight > 0 else self._of_file
        if weight <= 0 or self._left <= 0:
            return ""
        return f"; {duration(seconds / weight * self._left / self._parallel)} left"


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds where it is less than two minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def commit() -> str:
    """The checkout's commit, with "+" where code has changed or come since; "unknown" outside of one."""
    here = Path(__file__).parent
    try:
        run = {"cwd": here, "check": True, "capture_output": True, "text": True}
        name = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", *_CODE], **run).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed.strip() else "")


def extension() -> str:
    """SHA-256 of the compiled extension, its first digits, since git knows nothing of it; "none" without one."""
    spec = importlib.util.find_spec("pyppo._C")
    if spec is None or spec.origin is None:
        return "none"
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]
