"""Panels of curves and of scores, a panel an environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Curve = Sequence[Sequence[float]]
"""[steps, values]."""


def panels(count: int, columns: int, *, rows: int | None = None) -> tuple[Figure, list[Any]]:
    """A figure and its axes, row by row; what is left over stays empty."""
    rows = rows or -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)  # never pyplot: that would choose a display
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).ravel())
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes


def draw_curves(axis: Any, curves: Sequence[Curve], color: str, label: str) -> None:
    """The mean of runs over the steps that all have, in a band from the lowest to the highest."""
    curves = [curve for curve in curves if curve[0]]
    if not curves:
        return
    first, last = max(curve[0][0] for curve in curves), min(curve[0][-1] for curve in curves)
    grid = np.linspace(first, max(first, last), 200)
    values = np.stack([np.interp(grid, *curve) for curve in curves])
    axis.plot(grid, values.mean(axis=0), color=color, lw=1.4, label=label)
    if len(curves) > 1:
        axis.fill_between(grid, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0)


def draw_scores(axis: Any, scores: Mapping[str, Sequence[float]], color: str, label: str, shift: float = 0.0) -> None:
    """Each run a dot, means joined by a line; settings side by side, under their names."""
    kept = [(i + shift, values) for i, values in enumerate(scores.values()) if len(values)]
    axis.plot([x for x, _ in kept], [np.mean(values) for _, values in kept], color=color, lw=1.4, label=label)
    for x, values in kept:
        axis.plot([x] * len(values), values, ".", color=color, ms=4)
    axis.set_xticks(range(len(scores)), list(scores))


def save(figure: Figure, path: Path, axes: Sequence[Any]) -> None:
    """Write the picture; the first panel has the legend."""
    axes[0].legend(frameon=False, fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.margins(x=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
