"""What a process that `_runs` starts does. It imports next to nothing, so that the process is there soon."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any


def call(connection: Connection, function: Callable[..., Mapping[str, Any]], arguments: Mapping[str, Any]) -> None:
    """Send the function's result, or what went wrong, and the process's CPU time: (result or None, traceback, seconds).

    On a machine that others use too, CPU time says what a run costs, and the clock does not.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback; the parent tells
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = json.loads(json.dumps(function(**arguments)))  # a result that is no JSON fails here, with its reason
        connection.send((result, "", time.process_time()))
    except BaseException:
        connection.send((None, traceback.format_exc(), time.process_time()))
    finally:
        connection.close()


def _end_with_parent() -> None:
    """A parent that was killed takes no result: without this, a run would go on for nothing, on cores others need."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
