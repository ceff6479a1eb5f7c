"""What the reports of learning runs share: numbers as text, and what a table's runs were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from _common import score_text
from _run_statistics import Interval, mean_std
from _runs import Record, duration


def plus_minus(scores: Sequence[float]) -> str:
    """Mean ± standard deviation over runs; the mean of one run has none."""
    if not scores:
        return "–"
    mean, std = mean_std(scores)
    return f"{score_text(mean)} ± {score_text(std)}" if len(scores) > 1 else score_text(mean)


def interval(found: Interval, text: str = ".2f") -> str:
    """An estimate with its interval."""
    return f"{found.value:{text}} [{found.low:{text}}, {found.high:{text}}]"


def provenance(records: Iterable[Record]) -> str:
    """How many runs, when, on what, of which commit, and the CPU time of all."""
    records = list(records)
    if not records:
        return "Not run yet."
    dates = sorted({record["finished"][:10] for record in records if "finished" in record})
    commits = sorted({record["commit"] for record in records if "commit" in record})
    machines = sorted({_machine(record) for record in records if "machine" in record})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "no date"
    took = duration(sum(record.get("cpu_seconds", 0.0) for record in records))
    runs = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    what = f"commit {', '.join(commits) or 'unknown'}; {'; '.join(machines) or 'machine unknown'}"
    return f"{runs}, {when}, {what}; {took} of CPU time."


def _machine(record: Record) -> str:
    facts = record["machine"]
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['cpu_capability']} kernels, torch {facts['torch']}"
