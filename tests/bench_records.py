"""Made-up results files, for the tests of what bench/ reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MACHINE = {"cpu": "a CPU", "cores": 2, "cpu_capability": "avx2", "torch": "2.13"}
FACTS = {
    "seconds": 60.0,
    "cpu_seconds": 50.0,
    "finished": "2026-11-23T01:00:00+00:00",
    "commit": "abc",
    "machine": MACHINE,
}


def write_records(
    path: Path, jobs: Iterable[Any], result: Callable[[Any], Mapping[str, Any] | None], **facts: Any
) -> None:
    """A results file in which `result(job)` is each job's; None leaves it out.

    Args:
        **facts: of all records, in place of `FACTS`.
    """
    found = [(job, result(job)) for job in jobs]
    records = [
        {"key": job.key, "arguments": job.arguments, "result": one, **FACTS, **facts}
        for job, one in found
        if one is not None
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def in_place_of_run_jobs(result: Callable[[Any], Mapping[str, Any]]) -> tuple[list[str], Callable[..., list[Any]]]:
    """The keys that were asked for, and what stands in for `run_jobs`: all succeed at once, and the file has them."""
    asked: list[str] = []

    def run_jobs(jobs: Iterable[Any], path: Path, parallel: int) -> list[Any]:
        jobs = list(jobs)
        asked.extend(job.key for job in jobs)
        before = path.read_text() if path.exists() else ""
        write_records(path, jobs, result)
        path.write_text(before + path.read_text())
        return []

    return asked, run_jobs
