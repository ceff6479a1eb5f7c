"""Pictures of experiments that vary a setting: curves over steps, and what each setting came to. A column an
environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

Curve = Sequence[Sequence[float]]
"""[steps, values]."""


def grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, columns]."""
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)  # never pyplot: that would choose a display
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_curves(axis: Any, curves: Sequence[Curve], color: str, label: str) -> None:
    """The geometric mean of runs, for quantities of several orders of magnitude; a diverged run stays where it was."""
    curves = [curve for curve in curves if curve[0]]
    if not curves:
        return
    first, last = max(curve[0][0] for curve in curves), max(curve[0][-1] for curve in curves)
    steps = np.linspace(first, max(first, last), 200)
    logs = [np.interp(steps, curve[0], np.log(np.maximum(curve[1], 1e-12))) for curve in curves]
    axis.plot(steps, np.exp(np.mean(logs, axis=0)), color=color, lw=1.4, label=label)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k


def draw_settings(axis: Any, values: Mapping[str, Sequence[float]], color: str, label: str) -> None:
    """Each run a dot over its setting's name, the means joined by a line."""
    kept = [(i, runs) for i, runs in enumerate(values.values()) if len(runs)]
    if not kept:
        return
    axis.plot([i for i, _ in kept], [np.mean(runs) for _, runs in kept], color=color, lw=1.4, label=label)
    for i, runs in kept:
        axis.plot([i] * len(runs), runs, ".", color=color, ms=5, alpha=0.7)
    axis.set_xticks(range(len(values)), list(values))


def log_scale(axis: Any) -> None:
    """Powers of ten upwards, where anything is drawn: an empty panel has no such scale."""
    if axis.lines:
        axis.set_yscale("log")


def save(figure: Figure, axes: np.ndarray, path: Path) -> Path:
    """Write the picture; lines of several names are named above it, where they hide none."""
    found = [row[0].get_legend_handles_labels() for row in axes]
    handles, labels = max(found, key=lambda pair: len(pair[1]))
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
