"""What every benchmark shares: timing side by side, the machine's fixed costs, tables, and JSON."""

from __future__ import annotations

import ast
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pyppo import ops

Contender = Callable[[], object]

PAUSE = 0.006
"""Seconds before each sample. torch's OpenMP threads spin for milliseconds after a parallel region, on the cores that
the next contender is about to use."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    minimum: float
    samples: int


def alternate(
    contenders: Mapping[str, Contender], *, seconds: float, sample_seconds: float = 0.002
) -> dict[str, Timing]:
    """Time contenders in turn, A B C A B C ..., so that whatever the machine does meanwhile hits all alike.

    Each sample is the mean of as many calls as take `sample_seconds`, after one call that is not timed.

    Args:
        contenders: functions of no argument by name.
        seconds: how long to measure altogether, pauses included; at least five rounds are made.
    """
    calls = {name: _calls_for(run, sample_seconds) for name, run in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < 5:
        for name, run in contenders.items():
            time.sleep(PAUSE)
            run()
            samples[name].append(_time(run, calls[name]))
    return {name: Timing(statistics.median(found), min(found), len(found)) for name, found in samples.items()}


def _calls_for(run: Contender, sample_seconds: float) -> int:
    """As many calls as fill a sample, from runs that also warm caches and allocators up."""
    run()
    calls = 1
    while (elapsed := _time(run, calls)) * calls < sample_seconds / 4:
        calls *= 4
    return max(1, round(sample_seconds / elapsed))


def _time(run: Contender, calls: int) -> float:
    numbers = range(calls)
    start = time.perf_counter()
    for _ in numbers:
        run()
    return (time.perf_counter() - start) / calls


class CopyOf:
    """A copy that moves as many bytes as a kernel would at the least: half of them read, half written.

    `Tensor.copy_` of float32 between two buffers made beforehand, on torch's threads. Like the kernel's, its buffers
    are in the cache where they fit there.
    """

    def __init__(self, total_bytes: int) -> None:
        elements = max(1, total_bytes // 8)
        self.source = torch.rand(elements)
        self.target = torch.empty_like(self.source).copy_(self.source)

    def __call__(self) -> None:
        self.target.copy_(self.source)


# --- the machine ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_capability": ops.cpu_capability(),
        "kernel_threads": ops.get_num_threads(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class _Empty(torch.autograd.Function):
    """An autograd function that does nothing: what any custom operator pays at the least."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return _Empty.gradient

    gradient = torch.zeros(4)


def fixed_costs(seconds: float) -> dict[str, float]:
    """What this machine takes for next to nothing: microseconds a call, and the bandwidth of large copies in GB/s."""
    x, leaf = torch.zeros(1), torch.zeros(4, requires_grad=True)

    def empty_function() -> None:
        leaf.grad = None
        _Empty.apply(leaf).backward()

    small: dict[str, Contender] = {"torch.empty_like": lambda: torch.empty_like(x), "empty Function": empty_function}
    costs = {f"{name}, us": 1e6 * t.median for name, t in alternate(small, seconds=seconds).items()}
    size = 256 << 20  # far beyond any cache
    copy, one = CopyOf(size), (np.ones(size // 8, np.float32), np.zeros(size // 8, np.float32))
    large: dict[str, Contender] = {"torch copy": copy, "numpy copy, one thread": lambda: np.copyto(one[1], one[0])}
    bandwidths = {f"{name}, GB/s": size / t.median / 1e9 for name, t in alternate(large, seconds=seconds).items()}
    return {name: round(value, 2) for name, value in {**costs, **bandwidths}.items()}


# --- output ---------------------------------------------------------------------------------------------------------

console = Console(width=None if os.isatty(1) else 160, highlight=False)


def show_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Name and value pairs on a line or two."""
    console.print(f"[bold]{title}[/bold]  " + "   ".join(f"{name} {value}" for name, value in facts.items()))


def warn_if_busy(facts: Mapping[str, Any]) -> None:
    """Say so where other work disturbs the figures."""
    if facts["load"] > 0.5:
        console.print(f"[bold]the machine is busy[/bold] (load {facts['load']}): these figures mean little")


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """One table. The first column and those named "<..." are text, the others figures; an empty row is a line."""
    table = Table(title=title, title_justify="left", header_style="dim")
    for i, name in enumerate(columns):
        left = i == 0 or name.startswith("<")
        table.add_column(name.removeprefix("<"), justify="left" if left else "right", no_wrap=True)
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    console.print(table)


def score_text(score: float) -> str:
    """A return with the digits that say something: some environments give thousands, some at most 1."""
    return f"{score:.1f}" if abs(score) >= 10 else f"{score:.3f}"


def parse_fields(texts: Sequence[str]) -> dict[str, Any]:
    """`FIELD=VALUE` as keyword arguments: Python literals, anything else is text."""
    fields: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise SystemExit(f"--set has {text!r}; it must be FIELD=VALUE")
        try:
            fields[name.replace("-", "_")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name.replace("-", "_")] = value
    return fields


def microseconds(seconds: float) -> str:
    """With the digits that mean something."""
    us = 1e6 * seconds
    return f"{us:,.2f}" if us < 10 else f"{us:,.1f}" if us < 1000 else f"{us:,.0f}"


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """The results as they were measured, if a file is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
        console.print(f"wrote {path}")
