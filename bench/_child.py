"""What a process that `_runs` starts does. It imports next to nothing, so that the process is there soon."""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any


def call(connection: Connection, function: Callable[..., Mapping[str, Any]], arguments: Mapping[str, Any]) -> None:
    """Send the function's result, or what went wrong: (result, "") or (None, traceback)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback; the parent tells
    try:
        result = json.loads(json.dumps(function(**arguments)))  # a result that is no JSON fails here, with its reason
        connection.send((result, ""))
    except BaseException:
        connection.send((None, traceback.format_exc()))
    finally:
        connection.close()
