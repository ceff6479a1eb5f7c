"""Do scores depend on this implementation? A PPO that shares no line with the library (plain_ppo.py), beside it.

    python bench/paper/plain.py [--only ENV ...] [--seeds 1-5] [--parallel 2]
    python bench/paper/plain.py --report

The library's runs are those of Table 1, setting X, clip 0.2. One call runs what is missing and can be broken off at any
time. Then, or with --report and nothing run, the table of docs/results.md is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import plain_ppo
import table1
from _command import STEPS, add_arguments, add_choice, add_file, add_length, add_seeds, finish, page_of
from _common import score_text
from _experiments import scores_text
from _report import by_seed, interval, provenance, seeds_title
from _run_statistics import difference_interval
from _runs import Job, Record, finished, run_jobs
from _training import thinned
from tables import table

ENVIRONMENTS = ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4")
SEEDS, MOST_SEEDS = range(1, 6), range(1, 11)  # of the plain program, of the library
OURS = ("X", "clip 0.2")
VARIANTS: dict[str, dict[str, Any]] = {"each step": {}, "each rollout": {"warmup_steps": 256}}
"""What the statistics of observations follow; the library's, each rollout, begin with as many rows."""


def train(env_id: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One run of the plain program; the result's entries are those of `_training.train_run` that it has."""
    curve_steps, returns, seconds = plain_ppo.train(env_id, seed, plain_ppo.Settings(**settings))
    score = returns[-1] if returns else None
    return {"score": score, "seconds": round(seconds, 3), "diverged": None, "curve": thinned(curve_steps, returns)}


def job_of(variant: str, env_id: str, seed: int, steps: int) -> Job:
    """One run."""
    settings = plain_ppo.Settings(total_timesteps=steps, **VARIANTS[variant])
    arguments = {"env_id": env_id, "seed": seed, "settings": dataclasses.asdict(settings)}
    return Job(f"plain, {variant}/{env_id}/s{seed}", train, arguments, float(steps))


def row(env_id: str, variant: str, plain: Sequence[Record], ours: Sequence[Record], seeds: Sequence[int]) -> list[str]:
    """A line of the table; `seeds` are those of its column of single scores."""
    both = [[x["result"]["score"] for x in runs if x["result"]["score"] is not None] for runs in (plain, ours)]
    difference = "–"
    if all(both):
        difference = interval(difference_interval(both[1], both[0]), [both[1]], [both[0]], text=score_text)
    each = by_seed(seeds, {x["arguments"]["seed"]: x["result"]["score"] for x in plain})
    seconds = [f"{np.median([x['cpu_seconds'] for x in runs]):.0f}" if runs else "–" for runs in (plain, ours)]
    return [env_id, variant, scores_text(plain), scores_text(ours), difference, each, *seconds]


def report(given: argparse.Namespace) -> str:
    """What there is, as Markdown."""
    seeds = sorted({*given.seeds, *MOST_SEEDS})
    cells = [(env_id, variant) for env_id in ENVIRONMENTS for variant in VARIANTS]
    plain = {
        (env_id, variant): list(
            finished([job_of(variant, env_id, seed, given.steps) for seed in seeds], given.results, quiet=True).values()
        )
        for env_id, variant in cells
    }
    records = [record for runs in plain.values() for record in runs]
    if not records:
        return provenance(records)
    shown = sorted({record["arguments"]["seed"] for record in records})
    lines = []
    for env_id, variant in cells:
        jobs = [table1.job_of(*OURS, env_id, seed, given.steps) for seed in seeds]
        ours = list(finished(jobs, given.table1, quiet=True).values())
        lines.append(row(env_id, variant, plain[env_id, variant], ours, shown))
    columns = ["environment", "statistics follow", "plain torch (seeds)", "the library (seeds)",
               "library - plain [95 %]", seeds_title("plain torch", shown), "its CPU seconds a run",
               "the library's"]  # fmt: skip
    return f"{provenance(records)}\n\n{table(columns, lines)}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_choice(parser, "--only", ENVIRONMENTS, "ENV")
    add_seeds(parser, SEEDS, f"1-{SEEDS[-1]}")
    add_file(parser, "--table1", "table1.jsonl", "where the library's runs are")
    add_length(parser)
    add_arguments(parser, "plain.jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    page = page_of(given, ["plain"], full=given.steps == STEPS)
    jobs = [  # seed by seed, so that whatever is done is the table of fewer
        job_of(variant, env_id, seed, given.steps)
        for seed in given.seeds
        for env_id in given.only
        for variant in VARIANTS
    ]
    failures = [] if given.report else run_jobs(jobs, given.results, parallel=given.parallel)
    page.section("plain", report(given))
    finish(failures)


if __name__ == "__main__":
    main()
