"""What a run measures and says while it trains: its history, a live display or plain lines, and files of metrics."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import IO, Any, Protocol

Row = dict[str, float]

SCORE_EPISODES = 100
"""The reported return is the mean over this many last finished training episodes."""
PHASES = ("act", "env", "gae", "update")


class Clock:
    """Seconds spent in each phase of an iteration. A phase inside another is not counted in the outer one."""

    def __init__(self) -> None:
        self.total = 0.0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._inner = 0.0
        self._lap_start = time.perf_counter()

    def start(self) -> None:
        """Begin the first lap."""
        self._lap_start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time, less that of the phases inside it."""
        outer, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[name] += elapsed - self._inner
            self._inner = outer + elapsed

    def add(self, name: str, seconds: float) -> None:
        """Count time that was measured inside the running phase: what `phase` does, for a call of microseconds."""
        self._seconds[name] += seconds
        self._inner += seconds

    def lap(self) -> dict[str, float]:
        """The phases' seconds since the last lap, and "other": the rest. They add up to the lap's time."""
        now = time.perf_counter()
        elapsed, self._lap_start = now - self._lap_start, now
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        self.total += elapsed
        return {**seconds, "other": max(0.0, elapsed - sum(seconds.values()))}


class History(dict[str, list[float]]):
    """The run's rows as one dict of columns, and the window of episodes that its score is taken over."""

    def __init__(self) -> None:
        super().__init__()
        self.episodes: deque[tuple[float, int]] = deque(maxlen=SCORE_EPISODES)
        self.episodes_total = 0

    def add(self, counters: Row, finished: Sequence[tuple[float, int]], measured: Row) -> dict[str, float]:
        """Append one iteration.

        Args:
            counters: step, iteration, time and sps.
            finished: return and length of the episodes that ended in it.
            measured: everything else.

        Returns:
            The row: `counters`, the episodes' figures, `measured`.
        """
        self.episodes.extend(finished)
        self.episodes_total += len(finished)
        known = len(self.episodes) > 0
        row = {
            **counters,
            "episode_return": fmean(r for r, _ in self.episodes) if known else math.nan,
            "episode_length": fmean(n for _, n in self.episodes) if known else math.nan,
            "episodes": len(finished),
            "episodes_total": self.episodes_total,
            **measured,
        }
        for name, value in row.items():
            self.setdefault(name, []).append(value)
        return row

    def state_dict(self) -> dict[str, Any]:
        """What the columns do not tell, as JSON values."""
        return {"episodes": [list(episode) for episode in self.episodes], "episodes_total": self.episodes_total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.episodes.clear()
        self.episodes.extend((float(r), int(n)) for r, n in state["episodes"])
        self.episodes_total = int(state["episodes_total"])


# --- displays -------------------------------------------------------------------------------------------------------


class Reporter(Protocol):
    """Told what happens; never asked."""

    def update(self, row: Row) -> None:
        """One iteration is done; `row` is its line of the history."""
        ...

    def message(self, text: str) -> None:
        """Something that a person should read now."""
        ...

    def close(self) -> None:
        """Training is over, for whatever reason."""
        ...


def make_reporter(total_timesteps: int, *, quiet: bool = False, stream: IO[str] | None = None) -> Reporter:
    """The live display if `stream` (standard error) is a terminal, else plain lines; only messages when `quiet`."""
    stream = stream if stream is not None else sys.stderr
    if quiet:
        return QuietReporter(stream)
    return LiveReporter(total_timesteps, stream) if stream.isatty() else LineReporter(total_timesteps, stream)


class QuietReporter:
    """Messages only."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def update(self, row: Row) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """One line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing."""


class LineReporter(QuietReporter):
    """One line every `interval` seconds, for logs: the first and the last iteration always."""

    def __init__(self, total_timesteps: int, stream: IO[str], interval: float = 10.0) -> None:
        super().__init__(stream)
        self._progress, self._interval = _Progress(total_timesteps), interval
        self._last = -math.inf
        self._pending: Row | None = None

    def update(self, row: Row) -> None:
        """A line, if the last is long enough ago."""
        self._progress.update(row)
        self._pending = row
        if time.monotonic() - self._last >= self._interval:
            self._print()

    def close(self) -> None:
        """The last iteration's line, if it was held back."""
        if self._pending is not None:
            self._print()

    def _print(self) -> None:
        assert self._pending is not None
        self.message(" | ".join(f"{name} {text}" for name, text in self._progress.cells(self._pending)))
        self._last, self._pending = time.monotonic(), None


class LiveReporter:
    """rich's live display: a bar with percent and time left, and under it the figures that say how training goes."""

    def __init__(self, total_timesteps: int, stream: IO[str]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._progress = _Progress(total_timesteps)
        self._console = Console(file=stream)
        self._live = Live(console=self._console, refresh_per_second=4, transient=False)
        self._live.start()

    def update(self, row: Row) -> None:
        """Redraw."""
        self._progress.update(row)
        self._live.update(self._render(row))

    def message(self, text: str) -> None:
        """A line above the display."""
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._live.stop()

    def _render(self, row: Row) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        cells = self._progress.cells(row)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name, _ in cells:
            table.add_column(name, justify="right", style="bold", header_style="dim", no_wrap=True)
        table.add_row(*(text for _, text in cells))
        bar = ProgressBar(total=self._progress.total, completed=min(row["step"], self._progress.total), width=60)
        return Group(bar, table)


class _Progress:
    """Speed and time left, and the cells that both displays show."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._start: tuple[float, float] | None = None
        self._speed = math.nan

    def update(self, row: Row) -> None:
        """Speed is the mean since the first iteration seen, which paid for the start-up; until then, that one's."""
        now = (row["time"], row["step"])
        if self._start is None:
            self._start, self._speed = now, row["sps"]
        elif now[0] > self._start[0]:
            self._speed = (now[1] - self._start[1]) / (now[0] - self._start[0])

    def cells(self, row: Row) -> list[tuple[str, str]]:
        left = max(0.0, self.total - row["step"]) / self._speed if self._speed > 0 else math.nan
        return [
            ("steps", f"{row['step']:,.0f}"),
            ("done", f"{min(1.0, row['step'] / self.total):.0%}"),
            ("steps/s", _figure(self._speed, ",.0f")),
            ("return", _figure(row["episode_return"], ".1f")),
            ("KL", _figure(row["approx_kl"], ".4f")),
            ("clipped", _figure(row["clip_fraction"], ".1%")),
            ("left", _duration(left)),
        ]


def _figure(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "-"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# --- files ----------------------------------------------------------------------------------------------------------


class MetricsFile:
    """Appends each row to a file of JSON lines; NaN and infinity, which JSON has not, are written as null."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def __call__(self, row: Row) -> None:
        """Append one row."""
        self._file.write(_json_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Writes each row as TensorBoard scalars; needs the extra `pyppo[tensorboard]`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard is not installed; install it with `pip install 'pyppo[tensorboard]'`"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def __call__(self, row: Row) -> None:
        """Write one row."""
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def read_metrics(path: Path, last_step: float = math.inf) -> dict[str, list[float]]:
    """The columns of a metrics file up to `last_step`; null reads as NaN, a line cut off by a crash is left out.

    Raises:
        ValueError: a line other than the last is not JSON, or one is no row with a step.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), (int, float)):
            raise ValueError(f"{path}, line {number}, is no row with a step")
        if row["step"] <= last_step:
            rows.append(row)
    return to_columns(rows)


def rewrite_metrics(path: Path, history: Mapping[str, list[float]]) -> None:
    """Make the file hold exactly `history`, so that a resumed run repeats no step."""
    names = list(history)
    rows = zip(*history.values(), strict=True)
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.write_text("".join(_json_line(dict(zip(names, row, strict=True))) for row in rows))
    aside.replace(path)


def to_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Rows as one dict of columns; a value that is missing or None becomes NaN."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [math.nan if (v := row.get(name)) is None else v for row in rows] for name in names}


def _json_line(row: Row) -> str:
    plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"
