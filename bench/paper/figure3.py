"""Figure 3 of Schulman et al. 2017 (arXiv 1707.06347): PPO and what it replaced, on seven MuJoCo environments.

    python bench/paper/figure3.py [--algorithms ppo trpo a2c vpg] [--only ENV ...] [--seeds 1-5] [--parallel 2]
    python bench/paper/figure3.py --report

PPO's runs are those of Table 1 (table1.py: clip 0.2, setting X), and in its file; TRPO, A2C and the vanilla policy
gradient are the programs beside this one. One call runs what is missing and can be broken off at any time. Then, or
with --report and nothing run, the table and picture of docs/results.md are written from both results files and from
that of update_cost.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _experiments
import a2c
import table1
import trpo
import vpg
from _command import STEPS, add_arguments, add_choice, add_file, add_length, add_seeds, finish, page_of
from _page import Page
from _report import panels, provenance, settings_text
from _runs import Failure, Job, Record, finished, run_jobs
from table1_settings import ENVIRONMENTS, SETTINGS, upgraded
from tables import table
from update_cost import cost_rows, milliseconds

from pyppo.plot import draw

SEEDS = range(1, 6)
SECTIONS = ("figure3", "figure3-cost", "figure3-settings")  # of docs/results.md


class Algorithm(NamedTuple):
    """What is trained: the fields of `pyppo.Config`, settings of its own, and where they are from."""

    title: str
    fields: Mapping[str, Any]
    settings: Mapping[str, Any]
    source: str


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(
        "PPO",
        SETTINGS["X"],
        {},
        "The 2017 paper's table 3 with CleanRL's normalisation and limits: setting X of table 1, clip 0.2.",
    ),
    "a2c": Algorithm(
        "A2C",
        a2c.FIELDS,
        dataclasses.asdict(a2c.Settings()),
        "RL Baselines3 Zoo, hyperparams/a2c.yml, what it tuned for PyBullet's locomotion tasks, with 8 environments "
        "for its 4, without state-dependent noise, and with PPO's initial weights and deviation (its own: e^-2); "
        "RMSprop of Mnih et al. 2016.",
    ),
    "trpo": Algorithm(
        "TRPO",
        trpo.FIELDS,
        dataclasses.asdict(trpo.Settings()),
        "OpenAI Baselines, trpo_mpi/defaults.py, mujoco(), with PPO's networks; the KL bound of Schulman et al. 2015.",
    ),
    "vpg": Algorithm(
        "vanilla PG, adaptive",
        vpg.FIELDS,
        dataclasses.asdict(vpg.Settings()),
        "The 2017 paper's rollouts; step size and critic of the implementation that its note on figure 3 names, "
        "homework 4 of Berkeley's CS 294 (2017).",
    ),
}
# The paper's figure 3 after 1M steps, read off its vector curves; the environments were of version 1.
PAPER: dict[str, dict[str, float]] = {
    "HalfCheetah-v4": {"ppo": 1830, "a2c": 1003, "trpo": 7, "vpg": 631},
    "Hopper-v4": {"ppo": 2203, "a2c": 628, "trpo": 2064, "vpg": 2324},
    "InvertedDoublePendulum-v4": {"ppo": 7910, "a2c": 6681, "trpo": 184, "vpg": 219},
    "InvertedPendulum-v4": {"ppo": 963, "a2c": 1000, "trpo": 911, "vpg": 974},
    "Reacher-v4": {"ppo": -7, "a2c": -25, "trpo": -116, "vpg": -11},
    "Swimmer-v4": {"ppo": 107, "a2c": 27, "trpo": 121, "vpg": 63},
    "Walker2d-v4": {"ppo": 2909, "a2c": 734, "trpo": 1066, "vpg": 1215},
}


def job_of(algorithm: str, env_id: str, seed: int, steps: int) -> Job:
    """One run; PPO's is one of Table 1."""
    if algorithm == "ppo":
        return table1.job_of("X", "clip 0.2", env_id, seed, steps)
    one = ALGORITHMS[algorithm]
    arguments = {"algorithm": algorithm, "env_id": env_id, "seed": seed}
    arguments |= {"fields": {**one.fields, "total_timesteps": steps}, "settings": one.settings}
    return Job(f"{algorithm}/{env_id}/s{seed}", _experiments.run_algorithm, arguments, float(steps), upgraded)


Cell = tuple[str, str]
"""An algorithm in an environment."""


def cells_of(
    algorithms: Sequence[str], environments: Sequence[str], seeds: Iterable[int], steps: int
) -> list[tuple[Cell, Job]]:
    """Seed by seed, so that whatever is done is a whole table of fewer seeds."""
    return [
        ((name, env_id), job_of(name, env_id, seed, steps))
        for seed in seeds
        for env_id in environments
        for name in algorithms
    ]


# --- the report -----------------------------------------------------------------------------------------------------

Runs = Mapping[Cell, list[Record]]
"""The finished runs, seed by seed."""


def by_cell(cells: Sequence[tuple[Cell, Job]], results: Sequence[Path]) -> Runs:
    """The runs that are there, in one file or another."""
    done = {key: record for path in results for key, record in finished([job for _, job in cells], path).items()}
    found: dict[Cell, list[Record]] = {}
    for cell, job in cells:
        if job.key in done:
            found.setdefault(cell, []).append(done[job.key])
    return found


def score_table(runs: Runs) -> str:
    """Ours, mean ± deviation over seeds, beside the paper's."""
    lines = []
    for env_id in ENVIRONMENTS:
        line = [env_id]
        for name in ALGORITHMS:
            line += [_experiments.scores_text(runs.get((name, env_id), [])), f"{PAPER[env_id][name]:g}"]
        lines.append(line)
    columns = [cell for one in ALGORITHMS.values() for cell in (f"{one.title} (seeds)", "paper's")]
    return table(["environment", *columns], lines)


def time_table(runs: Runs) -> str | None:
    """What the updates of whole runs took, for all but PPO, which Table 1 does not time; means over all runs."""
    lines = []
    for name in _experiments.ENGINES:
        one = ALGORITHMS[name]
        results = [record["result"] for (found, _), records in runs.items() if found == name for record in records]
        results = [result for result in results if result["updates"]]  # not one that diverged in its first
        if not results:
            continue
        update = sum(x["phases"]["update"] for x in results)
        rows = one.fields["num_envs"] * one.fields["num_steps"]
        per_update = 1e3 * update / sum(x["updates"] for x in results)
        share = update / sum(sum(x["phases"].values()) for x in results)
        per_million = statistics.fmean(1e6 * x["phases"]["update"] / x["steps"] for x in results)
        speed = statistics.fmean(x["sps"] for x in results)
        shares = [f"{share:.0%}", f"{per_million:.0f}", f"{speed:,.0f}"]
        lines.append([one.title, f"{rows:,}", milliseconds(per_update), *shares])
    columns = ["algorithm", "rows an update", "ms an update", "share of the run", "s of updates, 1M steps", "steps/s"]
    return table(columns, lines) if lines else None


def settings_table() -> str:
    """Every setting that an algorithm states, and where they are from; first what all state alike."""
    programs = list(ALGORITHMS.values())
    first = {name: x for name, x in programs[0].fields.items() if name not in ("run_dir", "device", "engine")}
    alike = {name: x for name, x in first.items() if all(one.fields.get(name, ...) == x for one in programs)}
    lines = [["all", settings_text(alike), "", "The same."]]
    for one in programs:
        own = {name: x for name, x in one.fields.items() if name not in {*alike, "run_dir", "device", "engine"}}
        lines.append([one.title, settings_text(own), settings_text(one.settings), one.source])
    return table(["algorithm", "of `pyppo.Config`", "its own", "from"], lines)


def cost_table(path: Path) -> str:
    """What update_cost.py measured."""
    if not path.exists():
        return "Not measured yet."
    try:
        found = json.loads(path.read_text())
        facts = found["machine"]
        where = f"{facts['cpu']}, {facts['cpu_capability']} kernels, torch {facts['torch']}, one thread each"
        when = f"{found['date']}, commit {found['commit']}, load {facts['load']} before"
        said = f"{where}; {when}; {found['env_id']}, medians of {found['samples']} or more in turn."
        return f"{said}\n\n{table(*cost_rows(found))}"
    except (ValueError, KeyError) as error:
        raise SystemExit(f"--cost is {path}; it must be a file of update_cost.py: {error!r}") from error


def write_report(runs: Runs, page: Page, cost: Path) -> None:
    """The sections of docs/results.md, and the picture."""
    records = [record for of_key in runs.values() for record in of_key]
    text, costs = provenance(records), cost_table(cost)
    if records:
        text += f"\n\n{score_table(runs)}"
    if (times := time_table(runs)) is not None:
        costs += f"\n\nOf figure 3's runs:\n\n{times}"
    lines = [(e, one.title, runs.get((name, e), [])) for e in ENVIRONMENTS for name, one in ALGORITHMS.items()]
    if drawn := panels(lines):
        caption = "Returns of four algorithms, mean and range over seeds"
        text += page.picture("figure3.png", caption, lambda path: draw(drawn, path, size=(4.4, 3.0)))
    page.section("figure3", text)
    page.section("figure3-cost", costs)
    page.section("figure3-settings", settings_table())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_choice(parser, "--algorithms", ALGORITHMS, "NAME")
    add_choice(parser, "--only", ENVIRONMENTS, "ENV")
    add_seeds(parser, SEEDS, f"1-{SEEDS[-1]}")
    add_length(parser)
    add_arguments(parser, "figure3.jsonl")
    add_file(parser, "--table1", "table1.jsonl", "where PPO's runs are")
    add_file(parser, "--cost", "update_cost.json", "what update_cost.py measured")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    page = page_of(given, SECTIONS, full=given.steps == STEPS)
    failures: list[Failure] = []
    if not given.report:
        cells = cells_of(given.algorithms, given.only, given.seeds, given.steps)
        for path, ppo in ((given.table1, True), (given.results, False)):
            jobs = [job for (name, _), job in cells if (name == "ppo") == ppo]
            failures += run_jobs(jobs, path, parallel=given.parallel)
    everything = cells_of(list(ALGORITHMS), ENVIRONMENTS, sorted({*given.seeds, *SEEDS}), given.steps)
    write_report(by_cell(everything, [given.table1, given.results]), page, given.cost)
    finish(failures)


if __name__ == "__main__":
    main()
