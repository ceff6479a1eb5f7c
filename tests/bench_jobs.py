"""Functions that the queue's tests run in processes of their own."""

from __future__ import annotations

import os
import struct
import sys
import time
from pathlib import Path


def double(x: float) -> dict[str, float]:
    return {"twice": 2 * x}


def fail_once(mark: str) -> dict[str, str]:
    """Raises the first time, and not once the mark is there."""
    if Path(mark).exists():
        return {"came": "second"}
    Path(mark).touch()
    raise RuntimeError("not this time")


def die() -> dict[str, float]:
    os._exit(7)


def half_a_word() -> dict[str, float]:
    """Ends while its result is being sent."""
    connection = sys._getframe(1).f_locals["connection"]
    os.write(connection.fileno(), struct.pack("!i", 100) + b"half")
    os._exit(8)


def no_json() -> dict[str, object]:
    return {"set": {1, 2}}


def threads() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PYPPO_NUM_THREADS", "OMP_NUM_THREADS")}


def sleep(seconds: float, started: str) -> dict[str, float]:
    Path(started).write_text(str(os.getpid()))
    time.sleep(seconds)
    return {"slept": seconds}


def cores(i: int) -> dict[str, object]:
    time.sleep(0.2)  # so that one process cannot do all
    return {"cores": sorted(os.sched_getaffinity(0)), "i": i}
