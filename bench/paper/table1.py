"""Table 1 of Schulman et al. 2017 (arXiv 1707.06347): seven MuJoCo environments, eleven surrogates, 1M steps each.

    python bench/paper/table1.py [--settings X Y] [--seeds 3] [--clip-seeds 10] [--steps 1000000] [--parallel 2]
    python bench/paper/table1.py --report

One call runs what is missing, says how long that takes, and can be broken off at any time. Runs come seed by seed, so
that whatever is done is a whole table of fewer seeds. Three seeds cannot rank the clip ranges, so those have more.
Then, or with --report and nothing run, the tables and pictures of docs/results.md are written from the results file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import numpy as np
import table1_report
from _runs import Job, run_jobs
from _training import train_run
from table1_settings import CLIPS, ENVIRONMENTS, SETTINGS, VARIANTS
from tables import ROOT

import pyppo
from pyppo.envpool_envs import env_spaces
from pyppo.warmup import random_actions

RANDOM_EPISODES = 100
RANDOM_WEIGHT = 20_000.0  # in environment steps


def fields_of(setting: str, variant: str, steps: int) -> dict[str, Any]:
    """The Config's fields, but environment and seed."""
    return {**SETTINGS[setting], **VARIANTS[variant], "total_timesteps": steps}


def train(env_id: str, seed: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """One run."""
    return train_run(pyppo.Config(env_id=env_id, seed=seed, **fields))


class RandomPolicy:
    """Actions drawn uniformly from an environment's action space."""

    def __init__(self, env_id: str) -> None:
        self._space, self._random = env_spaces(env_id)[1], np.random.default_rng(0)

    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        return random_actions(self._space, len(obs), self._random)


def random_policy(env_id: str, episodes: int) -> dict[str, Any]:
    """What chance gets."""
    found = pyppo.evaluate(RandomPolicy(env_id), env_id, episodes=episodes)
    return {"score": found.mean, "std": found.std}


def job_of(setting: str, variant: str, env_id: str, seed: int, steps: int) -> Job:
    """One run."""
    arguments = {"env_id": env_id, "seed": seed, "fields": fields_of(setting, variant, steps)}
    return Job(f"{setting}/{variant}/{env_id}/s{seed}", train, arguments, float(steps))


def jobs_of(settings: Sequence[str], seeds: int, clip_seeds: int, steps: int) -> list[Job]:
    """All runs: the random policy, then setting by setting, seed by seed, every variant in every environment."""
    jobs = [
        Job(f"random/{env_id}", random_policy, {"env_id": env_id, "episodes": RANDOM_EPISODES}, RANDOM_WEIGHT)
        for env_id in ENVIRONMENTS
    ]
    for setting in settings:
        for seed in range(1, max(seeds, clip_seeds) + 1):
            for variant in VARIANTS:
                if seed > (clip_seeds if variant in CLIPS else seeds):
                    continue
                jobs += [job_of(setting, variant, env_id, seed, steps) for env_id in ENVIRONMENTS]
    return jobs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="default: X Y")
    parser.add_argument("--seeds", type=int, default=3, help="of every variant (default: 3)")
    parser.add_argument("--clip-seeds", type=int, default=10, help="of the clip variants (default: 10)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of each run (default: 1000000)")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/table1.jsonl", metavar="FILE")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="FOLDER", help="of results.md and images/")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    jobs = jobs_of(given.settings, given.seeds, given.clip_seeds, given.steps)
    failures = [] if given.report else run_jobs(jobs, given.results, parallel=given.parallel)
    for setting in given.settings:
        table1_report.write(table1_report.read(jobs, given.results, setting), given.docs)
    if failures:
        raise SystemExit(f"{len(failures)} of the runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
