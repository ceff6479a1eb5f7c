"""Why is a score of the suite what it is? Runs that change one thing, beside those that change nothing.

    python bench/causes.py [NAME ...] [--seeds 1-3] [--parallel 2]
    python bench/causes.py --report

One call runs what the suite's results file lacks and can be broken off at any time; what changes nothing, the suite has
run already. Then, or with --report and nothing run, its tables in docs/results.md are written.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import learning
from _command import add_arguments, add_seeds, finish, page_of
from _common import console
from _report import by_seed, plus_minus, provenance, seeds_title
from _runs import Job, Record, finished, run_jobs
from learning_report import seed_of
from suite import SUITE
from tables import table


@dataclasses.dataclass(frozen=True)
class Question:
    """What is changed in one of the suite's environments, by title; no change is the preset."""

    env_id: str
    variants: Mapping[str, Mapping[str, Any]]
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Changed in all of them."""
    seeds: int = 5

    @property
    def planned(self) -> range:
        """Its seeds."""
        return range(1, self.seeds + 1)


# fmt: off
QUESTIONS: dict[str, Question] = {
    "swimmer": Question("Swimmer-v4", seeds=10, variants={
        "γ 0.99, as the others": {"gamma": 0.99}, "γ 0.999: the preset": {}, "γ 0.9999": {"gamma": 0.9999},
    }),
    "inverted-double-pendulum": Question("InvertedDoublePendulum-v4", {
        "as the others": {"norm_adv": "minibatch", "learning_rate": 3e-4},
        "advantages normalised by batch": {"norm_adv": "batch", "learning_rate": 3e-4},
        "learning rate 1e-4": {"norm_adv": "minibatch", "learning_rate": 1e-4},
        "by batch, learning rate 1e-4": {"norm_adv": "batch"},
        "advantages as they are": {"norm_adv": "none", "learning_rate": 3e-4},
        "as they are, learning rate 1e-4: the preset": {},
    }),
    "halfcheetah": Question("HalfCheetah-v4", base={"log_std_init": 0.0}, seeds=3, variants={
        "nothing else": {},
        "1 environment x 2,048 steps": {"num_envs": 1, "num_steps": 2048},
        "no warm-up of the statistics": {"warmup_rows": 0},
        "20,480 rows of warm-up": {"warmup_rows": 20_480},
        "value loss not clipped": {"clip_vloss": False},
        "gradients not clipped": {"max_grad_norm": None},
        "rewards not scaled": {"norm_reward": False},
        "advantages normalised by batch": {"norm_adv": "batch"},
        "constant learning rate": {"anneal_lr": False},
    }),
    "pendulum": Question("Pendulum-v1", {"learning rate 1e-3": {"learning_rate": 1e-3}, "5e-4: the preset": {}}),
    "catch": Question("Catch", {"learning rate 1e-3": {"learning_rate": 1e-3}, "2.5e-3: the suite's": {}}),
}
# fmt: on


def jobs_of(question: Question, title: str, seeds: Sequence[int]) -> list[Job]:
    """A variant's runs as the suite's jobs: the same run is not made twice."""
    task = next(task for task in SUITE if task.env_id == question.env_id)
    changed = dataclasses.replace(task, fields={**task.fields, **question.base, **question.variants[title]})
    return learning.jobs_of([changed], "auto", seeds, None)


def row(title: str, runs: Sequence[Record], seeds: Sequence[int]) -> list[str]:
    """A line of a question's table; `seeds` are those of its column of single scores."""
    results = [record["result"] for record in runs]

    def mean(name: str) -> str:
        return plus_minus([one[name] for one in results if one[name] is not None])

    each = by_seed(seeds, {seed_of(record): record["result"]["score"] for record in runs})
    return [title, mean("score"), mean("best"), mean("evaluation"), each]


def report(question: Question, path: Path, seeds: Sequence[int]) -> str:
    """What was run for a question, as Markdown."""
    found = {title: list(finished(jobs_of(question, title, seeds), path).values()) for title in question.variants}
    records = [record for runs in found.values() for record in runs]
    shown = sorted({seed_of(record) for record in records})
    columns = [question.env_id, "training", "highest on the way", "evaluation", seeds_title("training", shown)]
    return f"{provenance(records)}\n\n{table(columns, [row(title, runs, shown) for title, runs in found.items()])}"


def section(name: str) -> str:
    """Of docs/results.md."""
    return f"cause-{name}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(QUESTIONS)} (default: all)")
    add_seeds(parser, None, "each question's")
    add_arguments(parser, "suite.jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    if unknown := [name for name in given.names if name not in QUESTIONS]:
        raise SystemExit(f"{unknown[0]!r} is no question; it must be of {', '.join(QUESTIONS)}")
    page = page_of(given, map(section, QUESTIONS), full=True)
    failures = []
    for name in [] if given.report else given.names or QUESTIONS:
        question = QUESTIONS[name]
        for title in question.variants:
            console.print(f"{name}: {title}")
            jobs = jobs_of(question, title, given.seeds or question.planned)
            failures += run_jobs(jobs, given.results, parallel=given.parallel)
    for name, question in QUESTIONS.items():
        seeds = sorted({*question.planned, *(given.seeds or [])})  # of the whole plan, and of what goes beyond it
        page.section(section(name), report(question, given.results, seeds))
    finish(failures)


if __name__ == "__main__":
    main()
