"""What epochs.py and clipping.py share: PPO with other epochs and clip ranges, in one file of results.

Both need what the standard setting did, so a run that one has made the other has too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import _experiments
from _command import STEPS, add_arguments, add_choice, add_length, add_seeds, finish, page_of
from _page import Page
from _runs import Job, Record, finished, run_jobs
from table1_settings import SETTINGS, upgraded

ENVIRONMENTS = ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4")
SEEDS = range(1, 6)
STANDARD_CLIP, STANDARD_EPOCHS = 0.2, 10
# Setting X of table 1, but the value loss is not clipped: its range is the policy's, and would change with it.
SHARED: dict[str, Any] = {**SETTINGS["X"], "clip_vloss": False}

Variant = tuple[int, float | None]
"""Epochs, and the clip range; None: not clipped."""


def clip_name(clip: float | None) -> str:
    return "none" if clip is None else f"{clip:g}"


def fields_of(variant: Variant, steps: int) -> dict[str, Any]:
    """The Config's fields, but environment and seed."""
    epochs, clip = variant
    surrogate = {"objective": "unclipped"} if clip is None else {"objective": "clip", "clip_coef": clip}
    return {**SHARED, **surrogate, "update_epochs": epochs, "total_timesteps": steps}


def job_of(variant: Variant, env_id: str, seed: int, steps: int) -> Job:
    """One run."""
    epochs, clip = variant
    key = f"epochs {epochs}, clip {clip_name(clip)}/{env_id}/s{seed}"
    arguments = {"env_id": env_id, "seed": seed, "fields": fields_of(variant, steps)}
    weight = steps * (0.5 + 0.5 * epochs / STANDARD_EPOCHS)
    return Job(key, _experiments.run_measured, arguments, weight, upgraded)


class Runs:
    """The finished runs of some variants.

    Args:
        variants, environments: in the order of the report. path: of the results.
    """

    def __init__(
        self, variants: Iterable[Variant], environments: Sequence[str], seeds: Iterable[int], steps: int, path: Path
    ) -> None:
        self.variants, self.environments = list(variants), environments
        cells = [(v, e, job_of(v, e, s, steps)) for s in seeds for e in environments for v in self.variants]
        self.jobs = [job for _, _, job in cells]  # seed by seed: whatever is done is a whole table of fewer seeds
        self._path, self._cells = path, cells
        self._found: dict[tuple[Variant, str], list[Record]] = {}

    def read(self) -> None:
        """Take what the file has."""
        done = finished(self.jobs, self._path)
        self._found = {}
        for variant, env_id, job in self._cells:
            if job.key in done:
                self._found.setdefault((variant, env_id), []).append(done[job.key])

    def records(self) -> list[Record]:
        """All of them."""
        return [record for records in self._found.values() for record in records]

    def scores_text(self, variant: Variant, env_id: str) -> str:
        """The scores of a variant in an environment, over seeds."""
        return _experiments.scores_text(self._found.get((variant, env_id), []))

    def get(self, variant: Variant, env_id: str, name: str) -> list[Any]:
        """One of the results' entries of each seed; those that have none are left out."""
        results = [record["result"] for record in self._found.get((variant, env_id), [])]
        return [x[name] for x in results if x[name] is not None]


def small(values: Sequence[float]) -> str:
    """A mean of small positive numbers, with its range."""
    if not values:
        return "–"
    mean = sum(values) / len(values)
    return f"{mean:.2g}" if len(values) == 1 else f"{mean:.2g} ({min(values):.2g} to {max(values):.2g})"


def parse(doc: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of either."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_choice(parser, "--only", ENVIRONMENTS, "ENV")
    add_seeds(parser, SEEDS, f"1-{SEEDS[-1]}")
    add_length(parser)
    add_arguments(parser, "clipping.jsonl")
    return parser.parse_args(arguments)


def run(
    given: argparse.Namespace, variants: Sequence[Variant], section: str, write_report: Callable[[Runs, Page], None]
) -> None:
    """Run what is missing, unless a report is all that is wanted, and report what there is.

    The page is of the whole plan, and of what goes beyond it, whatever `--only` and `--seeds` say.

    Args:
        section: of docs/results.md. write_report: fills it.
    """
    page = page_of(given, [section], full=given.steps == STEPS)
    wanted = Runs(variants, given.only, given.seeds, given.steps, given.results).jobs
    failures = [] if given.report else run_jobs(wanted, given.results, parallel=given.parallel)
    runs = Runs(variants, ENVIRONMENTS, sorted({*given.seeds, *SEEDS}), given.steps, given.results)
    runs.read()
    write_report(runs, page)
    finish(failures)
