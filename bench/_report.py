"""What the reports of learning runs share: numbers as text, curves, and what a table's runs were."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from _common import score_text
from _run_statistics import Interval, Strata, mean_std
from _runs import Record, duration

from pyppo.plot import Curve


def plus_minus(scores: Sequence[float]) -> str:
    """Mean ± standard deviation over runs, with as many digits; the mean of one run has none."""
    if not scores:
        return "–"
    mean, std = mean_std(scores)
    if len(scores) == 1:
        return score_text(mean)
    digits = 1 if max(abs(mean), std) >= 10 else 3  # as `score_text` has them
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


LEAST_RUNS = 3
"""Of fewer in an environment, resampling shows next to no spread: of one, none at all."""


def interval(found: Interval, *groups: Strata, text: Callable[[float], str] = "{:.2f}".format) -> str:
    """An estimate with its interval, where `groups`, what it is of, have enough runs to speak of one."""
    if too_few(*groups):
        return text(found.value)
    return f"{text(found.value)} [{text(found.low)}, {text(found.high)}]"


def too_few(*groups: Strata) -> bool:
    """Whether an environment has so few runs that resampling them says nothing."""
    return min(len(runs) for strata in groups for runs in strata) < LEAST_RUNS


def seeds_title(what: str, seeds: Sequence[int]) -> str:
    """Of a column of single scores."""
    return f"{what}, seeds {', '.join(map(str, seeds))}" if seeds else what


def by_seed(seeds: Sequence[int], scores: Mapping[int, float | None]) -> str:
    """Single scores in the order of `seeds`; a dash where there is no run, or none of its episodes ended."""
    found = [scores.get(seed) for seed in seeds]
    if all(score is None for score in found):
        return "–"
    return ", ".join("–" if score is None else score_text(score) for score in found)


def count_text(records: Sequence[Record]) -> str:
    """How many runs there are, how many of them diverged, and how many of those before an episode had ended."""
    results = [record["result"] for record in records]
    diverged = sum(one["diverged"] is not None for one in results)
    without = sum(one["score"] is None for one in results)
    parts = [str(len(results)), *([f"{diverged} diverged"] if diverged else [])]
    return ", ".join([*parts, *([f"{without} without a score"] if without else [])])


def higher_or_lower(probability: Interval, *groups: Strata) -> str:
    """What the interval of a probability of improvement says, of these runs."""
    if too_few(*groups):
        return "too few runs"
    low, high = round(probability.low, 2), round(probability.high, 2)  # as they are shown
    return "higher" if low > 0.5 else "lower" if high < 0.5 else "not told apart"


def settings_text(settings: Mapping[str, Any]) -> str:
    """Names and values."""
    texts = {
        name: ", ".join(f"{part:g}" for part in x).join("()") if isinstance(x, (tuple, list)) else str(x)
        for name, x in settings.items()
    }
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def curve_of(record: Record) -> Curve | None:
    """Steps and returns of a run; one that diverged stays where it was then, to the end. None if no episode ended."""
    steps, returns = record["result"]["curve"]
    if not steps:
        return None
    arguments = record["arguments"]
    settings = arguments["fields"] if "fields" in arguments else arguments["config"]
    end = max(steps[-1], settings["total_timesteps"])
    return np.array([*steps, end]), np.array([*returns, returns[-1]])


def panels(lines: Iterable[tuple[str, str, Sequence[Record]]]) -> dict[str, dict[str, list[Curve]]]:
    """What `pyppo.plot.draw` takes: a panel an environment, in it a line a name, with the number of its runs.

    Args:
        lines: environment, name, runs; those without a curve are left out.
    """
    found: dict[str, dict[str, list[Curve]]] = {}
    for env_id, name, runs in lines:
        if curves := [curve for curve in map(curve_of, runs) if curve is not None]:
            found.setdefault(env_id, {})[f"{name} ({len(curves)})"] = curves
    return found


def elapsed(records: Iterable[Record]) -> float:
    """Seconds in which at least one of the runs was going on."""
    spans = []
    for record in records:
        if "finished" in record:
            end = datetime.datetime.fromisoformat(record["finished"]).timestamp()
            spans.append((end - record["seconds"], end))
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def provenance(records: Iterable[Record]) -> str:
    """How many runs, when, on what, of which commit, the CPU time of all, and how long that was."""
    records = list(records)
    if not records:
        return "Not run yet."
    dates = sorted({record["finished"][:10] for record in records if "finished" in record})
    in_order = sorted(records, key=lambda record: record.get("finished", ""))
    commits = dict.fromkeys(record["commit"] for record in in_order if "commit" in record)
    machines = sorted({_machine(record) for record in records if "machine" in record})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "no date"
    took = duration(sum(record.get("cpu_seconds", 0.0) for record in records))
    runs = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    what = f"commit {', '.join(commits) or 'unknown'}; {'; '.join(machines) or 'machine unknown'}"
    return f"{runs}, {when}, {what}; {took} of CPU time within {duration(elapsed(records))}."


def _machine(record: Record) -> str:
    facts = record["machine"]
    cores = f"{facts['cores']} core{'s' if facts['cores'] > 1 else ''}"
    beside = f", {record['parallel']} runs at a time" if "parallel" in record else ""
    return f"{facts['cpu']}, {cores}{beside}, {facts['cpu_capability']} kernels, torch {facts['torch']}"
