"""Learning curves as pictures. matplotlib is imported when first drawn with, without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pyppo.checkpoint import find_checkpoint, read_config, read_state
from pyppo.policy import BUILT_IN
from pyppo.report import SCORE_EPISODES, read_metrics

Curve = tuple[np.ndarray, np.ndarray]  # steps and returns
_POINTS = 400  # of the common grid that seeds are averaged on
_INCIDENTAL = ("seed", "run_dir", "save_interval", "env_threads", "one_core", "torch_threads", "device", "engine")


def plot_history(history: Mapping[str, Sequence[float]], path: str | Path, *, title: str = "") -> Path:
    """Draw one run's return over its steps into `path`; returns the path. The suffix chooses PNG, PDF, SVG …; without
    one it is .png.

    Raises:
        ValueError: no episode has finished, so there is nothing to draw.
    """
    figure, axes = _figure(1, (6.0, 4.0))
    axes[0].plot(*_curve(history, "history"), color="C0")
    return _finish(figure, axes, [title], path)


def plot_runs(runs: Sequence[str | Path], path: str | Path) -> Path:
    """Draw the learning curves of several run folders into `path`; returns the path.

    One picture an environment; runs that differ in nothing but the seed make one curve, their mean, over the steps
    that all of them have, with a band from the lowest to the highest.

    Raises:
        ValueError: no runs, a folder is no run, or no episode has finished in one.
    """
    if not runs:
        raise ValueError("runs is empty; it must name at least one run folder")
    panels = {
        env_id: {_labelled(label, by_seed): [curve for _, curve in by_seed] for label, by_seed in curves.items()}
        for env_id, curves in _group(runs).items()
    }
    return draw(panels, path)


def draw(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]], path: str | Path, *, size: tuple[float, float] = (6.0, 4.0)
) -> Path:
    """Draw a picture a title, and in it a line a label: its curves' mean, with a band from the lowest to the highest.

    Args:
        panels: curves by title and label; a curve is its steps and returns, arrays of one length.
        size: of one picture, in inches.
    """
    figure, axes = _figure(len(panels), size)
    for axis, lines in zip(axes, panels.values(), strict=True):
        for color, (label, curves) in enumerate(lines.items()):
            steps, returns = _align(curves)
            axis.plot(steps, returns.mean(axis=0), color=f"C{color}", label=label)
            if len(curves) > 1:
                axis.fill_between(steps, returns.min(axis=0), returns.max(axis=0), color=f"C{color}", alpha=0.2, lw=0)
    _name_lines(figure, axes)
    return _finish(figure, axes, list(panels), path)


def _name_lines(figure: Any, axes: Sequence[Any]) -> None:
    """One legend above all pictures where they share their lines' names, so that it hides none; else one in each."""
    names = [axis.get_legend_handles_labels()[1] for axis in axes]
    if len(axes) > 1 and all(found == names[0] for found in names):
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        return
    for axis in axes:
        axis.legend(loc="best", frameon=False)


def _labelled(label: str, by_seed: Sequence[tuple[int, Curve]]) -> str:
    count = _count([seed for seed, _ in by_seed])
    return f"{label} ({count})" if label else count


def _count(seeds: Sequence[int]) -> str:
    """How many runs a curve is the mean of: seeds, if no two share one."""
    what = "seed" if len(set(seeds)) == len(seeds) else "run"
    return f"{len(seeds)} {what}{'s' if len(seeds) > 1 else ''}"


def _group(runs: Sequence[str | Path]) -> dict[str, dict[str, list[tuple[int, Curve]]]]:
    """Seeds and curves by environment, then by a label that names the settings in which its runs differ from others."""
    configs = [_settings(Path(run)) for run in runs]
    groups: dict[str, dict[str, list[tuple[int, Curve]]]] = {}
    for run, config in zip(runs, configs, strict=True):
        same_env = [other for other in configs if other["env_id"] == config["env_id"]]
        label = ", ".join(f"{name} {value}" for name, value in _differences(config, same_env).items())
        metrics = Path(run) / "metrics.jsonl"
        if not metrics.is_file():
            raise ValueError(f"{run} has no metrics.jsonl; it must be a run folder that has begun to train")
        curve = _curve(read_metrics(metrics), str(run))
        groups.setdefault(config["env_id"], {}).setdefault(label, []).append((config["seed"], curve))
    return groups


def _settings(run: Path) -> dict[str, Any]:
    """A run's Config as a dict, and what no Config says: a policy or environments of the user's own. That is in its
    checkpoints; a run without any has the built-in ones, for all that is known."""
    said = {"policy": "built-in", "own_envs": False}
    with suppress(FileNotFoundError, ValueError):
        state = read_state(find_checkpoint(run))
        kind = state["policy"]["class"]
        said = {"policy": "built-in" if kind in BUILT_IN else kind, "own_envs": bool(state.get("own_envs"))}
    return {**read_config(run).to_dict(), **said}


def _differences(settings: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: value
        for name, value in settings.items()
        if name not in _INCIDENTAL and any(other[name] != value for other in others)
    }


def _curve(history: Mapping[str, Sequence[float]], name: str) -> Curve:
    steps = np.asarray(history.get("step", ()), dtype=float)
    returns = np.asarray(history.get("episode_return", ()), dtype=float)
    known = np.isfinite(returns)
    if not known.any():
        raise ValueError(f"{name} has no finished episode; there must be one to draw a curve")
    return steps[known], returns[known]


def _align(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Curves on one grid of steps [P], returns [runs, P]; a single curve keeps its own points."""
    if len(curves) == 1:
        return curves[0][0], curves[0][1][None]
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = np.linspace(first, max(first, last), _POINTS)
    return grid, np.stack([np.interp(grid, steps, returns) for steps, returns in curves])


def _figure(count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)  # never pyplot: that would choose a display, and keep the figure alive
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).ravel())
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _finish(figure: Any, axes: Sequence[Any], titles: Sequence[str], path: str | Path) -> Path:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="environment steps", ylabel=f"return, mean of last {SCORE_EPISODES} episodes")
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k: the labels of small pictures would meet
        axis.grid(alpha=0.3)
        axis.margins(x=0)
    path = Path(path)
    if not path.suffix:  # matplotlib would add it, and the file be another than the one returned
        path = path.with_name(f"{path.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
