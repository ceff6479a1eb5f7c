"""Table 1 of Schulman et al. 2017 (arXiv 1707.06347): seven MuJoCo environments, eleven surrogates, 1M steps each.

    python bench/paper/table1.py [--settings X Y] [--only ENV ...] [--seeds 1-3] [--clip-seeds 1-10] [--parallel 2]
    python bench/paper/table1.py --report

One call runs what is missing, says how long that takes, and can be broken off at any time. Runs come seed by seed, so
that whatever is done is a whole table of fewer seeds. Three seeds cannot rank the clip ranges, so those have more.
Then, or with --report and nothing run, the tables and pictures of docs/results.md are written from the results file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import table1_report
from _command import STEPS, add_arguments, add_choice, add_length, add_seeds, finish, page_of
from _runs import Job, run_jobs
from _training import train_run
from table1_settings import CLIPS, ENVIRONMENTS, SETTINGS, VARIANTS, upgraded

import pyppo
from pyppo.envpool_envs import env_spaces
from pyppo.warmup import random_actions

SEEDS, CLIP_SEEDS = range(1, 4), range(1, 11)  # of the other variants, of the clip variants
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
    return Job(f"{setting}/{variant}/{env_id}/s{seed}", train, arguments, float(steps), upgraded)


def jobs_of(
    settings: Sequence[str], environments: Sequence[str], seeds: Iterable[int], clip_seeds: Iterable[int], steps: int
) -> list[Job]:
    """All runs: the random policy, then setting by setting, seed by seed, every variant in every environment."""
    seeds, clip_seeds = set(seeds), set(clip_seeds)
    jobs = [
        Job(f"random/{env_id}", random_policy, {"env_id": env_id, "episodes": RANDOM_EPISODES}, RANDOM_WEIGHT)
        for env_id in environments
    ]
    for setting in settings:
        for seed in sorted(seeds | clip_seeds):
            for variant in VARIANTS:
                if seed in (clip_seeds if variant in CLIPS else seeds):
                    jobs += [job_of(setting, variant, env_id, seed, steps) for env_id in environments]
    return jobs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_choice(parser, "--settings", SETTINGS, "SETTING")
    add_choice(parser, "--only", ENVIRONMENTS, "ENV")
    add_seeds(parser, None, f"1-{SEEDS[-1]}, and 1-{CLIP_SEEDS[-1]} for the clip variants")
    add_seeds(parser, None, f"--seeds, or 1-{CLIP_SEEDS[-1]}; of the clip variants", "--clip-seeds")
    add_length(parser)
    add_arguments(parser, "table1.jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    page = page_of(given, [f"table1-{setting}" for setting in given.settings], full=given.steps == STEPS)
    seeds, clip_seeds = given.seeds or SEEDS, given.clip_seeds or given.seeds or CLIP_SEEDS
    jobs = jobs_of(given.settings, given.only, seeds, clip_seeds, given.steps)
    failures = [] if given.report else run_jobs(jobs, given.results, parallel=given.parallel)
    # The page is of the whole plan, and of what goes beyond it, whatever was run now.
    whole = {*seeds, *SEEDS}, {*clip_seeds, *CLIP_SEEDS}
    everything = jobs_of(given.settings, ENVIRONMENTS, *whole, given.steps)
    for setting in given.settings:
        table1_report.write(table1_report.read(everything, given.results, setting), page)
    finish(failures)


if __name__ == "__main__":
    main()
