"""Do scores depend on this implementation? A PPO that shares no line with the library (plain_ppo.py), beside it.

    python bench/paper/plain.py [--only ENV ...] [--seeds 5] [--parallel 2]
    python bench/paper/plain.py --report

The library's runs are those of Table 1, setting X, clip 0.2. One call runs what is missing and can be broken off at any
time. Then, or with --report and nothing run, the table of docs/results.md is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import numpy as np
import plain_ppo
import table1
from _command import STEPS, add_arguments, add_length, docs_of, finish, positive
from _common import score_text
from _experiments import scores_text
from _report import interval, provenance
from _run_statistics import difference_interval
from _runs import Job, Record, finished, run_jobs
from _training import thinned
from tables import ROOT, fill, table

ENVIRONMENTS = ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4")
SEEDS, MOST_SEEDS = 5, 10
OURS = ("X", "clip 0.2")


def train(env_id: str, seed: int, steps: int) -> dict[str, Any]:
    """One run of the plain program; the result's entries are those of `_training.train_run` that it has."""
    curve_steps, returns, seconds = plain_ppo.train(env_id, seed, plain_ppo.Settings(total_timesteps=steps))
    score = returns[-1] if returns else None
    return {"score": score, "seconds": round(seconds, 3), "diverged": None, "curve": thinned(curve_steps, returns)}


def jobs_of(environments: Sequence[str], seeds: int, steps: int) -> list[Job]:
    """Seed by seed."""
    return [
        Job(f"plain/{env_id}/s{seed}", train, {"env_id": env_id, "seed": seed, "steps": steps}, float(steps))
        for seed in range(1, seeds + 1)
        for env_id in environments
    ]


def row(env_id: str, plain: Sequence[Record], ours: Sequence[Record]) -> list[str]:
    """A line of the table."""
    both = [[x["result"]["score"] for x in runs if x["result"]["score"] is not None] for runs in (plain, ours)]
    difference = "–"
    if all(both):
        difference = interval(difference_interval(both[1], both[0]), [both[1]], [both[0]], text=score_text)
    each = ", ".join(map(score_text, both[0])) or "–"
    seconds = [f"{np.median([x['cpu_seconds'] for x in runs]):.0f}" if runs else "–" for runs in (plain, ours)]
    return [env_id, scores_text(plain), scores_text(ours), difference, each, *seconds]


def report(given: argparse.Namespace) -> str:
    """What there is, as Markdown."""
    most = max(given.seeds, MOST_SEEDS)
    found = finished(jobs_of(ENVIRONMENTS, most, given.steps), given.results)
    lines, records = [], []
    for env_id in ENVIRONMENTS:
        plain = [record for record in found.values() if record["arguments"]["env_id"] == env_id]
        jobs = [table1.job_of(*OURS, env_id, seed, given.steps) for seed in range(1, most + 1)]
        ours = list(finished(jobs, given.table1, quiet=True).values())
        lines.append(row(env_id, plain, ours))
        records += plain
    columns = ["environment", "plain torch (seeds)", "the library (seeds)", "library - plain [95 %]",
               "plain torch, seeds 1, 2, …", "its CPU seconds a run", "the library's"]  # fmt: skip
    return f"{provenance(records)}\n\n{table(columns, lines)}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS), metavar="ENV")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help=f"1 to this many (default: {SEEDS})")
    parser.add_argument("--table1", type=Path, default=ROOT / "bench/results/table1.jsonl", metavar="FILE")
    add_length(parser)
    add_arguments(parser, "plain.jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    docs = docs_of(given, ["plain"], full=given.steps == STEPS)
    jobs = jobs_of(given.only, given.seeds, given.steps)
    failures = [] if given.report else run_jobs(jobs, given.results, parallel=given.parallel)
    if docs is not None:
        fill(docs / "results.md", "plain", report(given))
    finish(failures)


if __name__ == "__main__":
    main()
