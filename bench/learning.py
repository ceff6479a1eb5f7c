"""What scores does training reach? The suite (bench/suite.py), or one environment, over several seeds.

    python bench/learning.py [--only ENV ...] [--engine auto] [--seeds 1-3] [--parallel 2] [--report]
    python bench/learning.py ENV [--seeds 1-3] [--parallel 2] [--set FIELD=VALUE ...] [--json FILE]

A seed's score is the mean return of its last 100 training episodes. "±" is the standard deviation over seeds (divided
by their number); scores of evaluation episodes are another thing and are shown apart.

The suite runs what its results file lacks, and then, or with --report and nothing run, writes its part of
docs/results.md and its picture. One environment has its preset and --set; its runs are kept if --kept names a file.
`--solved SCORE` says when the mean of a hundred episodes first reached it: after how many steps and seconds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import learning_report
from _command import add_arguments, add_seeds, check_writable, count, finish, page_of, positive
from _common import console, machine, parse_fields, score_text, show_facts, show_table, write_json
from _runs import Job, finished, read_records, run_jobs
from _training import train_run
from own_envs import OWN
from suite import SUITE, Task, config_of, engine_of

import pyppo
from pyppo.envpool_envs import env_spaces

EPISODES = 20
"""Of each evaluation in the suite."""


def train(config: Mapping[str, Any], episodes: int, solved: float | None = None) -> dict[str, Any]:
    """One run; what `train_run` gives, and when it first reached `solved`."""
    settings = pyppo.Config.from_dict(config)
    own = OWN.get(settings.env_id)
    reached: dict[str, float] = {}
    start = time.perf_counter()

    def note(row: Mapping[str, float]) -> None:
        if solved is not None and not reached and row["episodes_total"] >= 100 and row["episode_return"] >= solved:
            reached.update(steps=row["step"], seconds=time.perf_counter() - start)

    def evaluate(policy: Any) -> pyppo.Evaluation:
        envs = None if own is None else own(min(episodes, 16))
        return pyppo.evaluate(policy, settings.env_id, episodes=episodes, envs=envs)

    envs = None if own is None else own(settings.num_envs)
    result = train_run(settings, envs, callbacks=[note], evaluate=evaluate if episodes else None)
    return {**result, "solved_steps": reached.get("steps"), "solved_seconds": reached.get("seconds")}


# --- the suite ------------------------------------------------------------------------------------------------------


def jobs_of(tasks: Sequence[Task], engine: Any, seeds: Sequence[int] | None, steps: int | None) -> list[Job]:
    """Seed by seed, so that whatever is done is the suite at fewer seeds."""
    jobs = []
    most = max((task.seeds for task in tasks), default=0)
    for seed in seeds or range(1, most + 1):
        for task in tasks:
            which = engine_of(task, engine)
            if which is not None and (seeds or seed <= task.seeds):
                config = config_of(task, which, seed, steps)
                arguments = {"config": config.to_dict(), "episodes": EPISODES}
                key = f"{task.env_id}/{which}/s{seed}"
                jobs.append(Job(key, train, arguments, float(config.total_timesteps), upgraded))
    return jobs


def upgraded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A run's arguments with the fields that `Config` did not have yet: their defaults are what there was before."""
    defaults = pyppo.Config(env_id=arguments["config"]["env_id"]).to_dict()
    return {**arguments, "config": {**defaults, **arguments["config"]}}


def seeds_in(path: Path) -> list[int]:
    """The seeds of a results file's runs."""
    configs = [record["arguments"].get("config") for record in read_records(path, quiet=True)]
    found = [config.get("seed") for config in configs if isinstance(config, dict)]
    return sorted({seed for seed in found if isinstance(seed, int)})


def run_suite(given: argparse.Namespace) -> None:
    names = [task.env_id for task in SUITE]
    if unknown := [name for name in given.only or [] if name not in names]:
        raise SystemExit(f"--only has {unknown[0]!r}; it must be of {', '.join(names)}")
    if (
        given.set
        or given.json
        or given.kept
        or given.evaluate
        or given.solved is not None
        or given.at_least is not None
    ):
        raise SystemExit("--set, --json, --kept, --evaluate, --solved and --at-least are of one environment; name it")
    tasks = [task for task in SUITE if not given.only or task.env_id in given.only]
    page = page_of(given, ["suite"], full=given.steps is None)
    jobs = jobs_of(tasks, given.engine, given.seeds, given.steps)
    failures = [] if given.report else run_jobs(jobs, given.results, parallel=given.parallel)
    # Of all environments, engines and seeds, whatever was run now.
    every = [
        job
        for engine in learning_report.ENGINES
        for job in jobs_of(SUITE, engine, seeds_in(given.results), given.steps)
    ]
    learning_report.write(finished(every, given.results), page)
    finish(failures)


# --- one environment ------------------------------------------------------------------------------------------------


def summarize(runs: Sequence[Mapping[str, Any]], at_least: float | None) -> dict[str, Any]:
    """Over the seeds."""
    scores = [math.nan if one["score"] is None else one["score"] for one in runs]
    summary = {"mean": statistics.fmean(scores), "std": statistics.pstdev(scores)}
    summary |= {"least": min(scores), "most": max(scores)}
    if at_least is not None:
        summary["reached"] = sum(score >= at_least for score in scores)
    if seconds := [one["solved_seconds"] for one in runs if one["solved_seconds"] is not None]:
        summary["solved"] = {"runs": len(seconds), "median_seconds": statistics.median(seconds)}
        summary["solved"] |= {"least_seconds": min(seconds), "most_seconds": max(seconds)}
    return summary


def show(env_id: str, runs: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], at_least: float | None) -> None:
    """A row a seed, then the line that is quoted."""
    rows = []
    for one in runs:
        evaluation = "" if one["evaluation"] is None else score_text(one["evaluation"])
        evaluation += "" if one["evaluation"] is None else f" ± {score_text(one['evaluation_std'])}"
        solved = "" if one["solved_steps"] is None else f"{one['solved_steps']:,.0f} ({one['solved_seconds']:.2f} s)"
        sizes = [f"{one['steps']:,}", f"{one['seconds']:.0f}", solved, one["sha256"][:12]]
        score = "–" if one["score"] is None else score_text(one["score"])
        rows.append([str(one["seed"]), score, evaluation, *sizes])
    show_table(
        env_id,
        ["seed", "score", "evaluation", "steps", "seconds of training", "solved after (with set-up)", "parameters"],
        rows,
    )
    mean, std, least, most = (score_text(summary[key]) for key in ("mean", "std", "least", "most"))
    line = f"{env_id}: {mean} ± {std} over {len(runs)} seeds (least {least}, most {most})"
    if at_least is not None:
        line += f"; {summary['reached']} of {len(runs)} at {at_least:g} or above"
    if solved := summary.get("solved"):
        line += f"; solved in {solved['median_seconds']:.2f} s (median; {solved['least_seconds']:.2f} to "
        line += f"{solved['most_seconds']:.2f}), {solved['runs']} of {len(runs)}"
    console.print(line)


def run_one(given: argparse.Namespace) -> None:
    if given.only or given.report or given.docs or given.results != given.standard["results"]:
        raise SystemExit("--only, --report, --results and --docs are of the suite; leave the environment out")
    fields = {"engine": given.engine, **parse_fields(given.set)}
    if "seed" in fields:
        raise SystemExit(f"--set has seed={fields['seed']!r}; seeds are what --seeds takes")
    check_writable("--kept", given.kept)
    check_writable("--json", given.json)
    if given.steps is not None:
        fields["total_timesteps"] = given.steps
    try:
        config = pyppo.Config.for_env(given.env, **fields)
        if given.env not in OWN:
            env_spaces(given.env, config.env_options)
    except (ValueError, TypeError) as error:
        raise SystemExit(str(error)) from error
    facts = machine()
    show_facts("machine", facts)
    jobs = []
    for seed in given.seeds or (1, 2, 3):
        arguments = {"config": config.replace(seed=seed).to_dict(), "episodes": given.evaluate, "solved": given.solved}
        jobs.append(Job(f"{given.env}/s{seed}", train, arguments, float(config.total_timesteps), upgraded))
    with tempfile.TemporaryDirectory() as folder:
        results = given.kept or Path(folder) / "runs.jsonl"
        failures = run_jobs(jobs, results, parallel=given.parallel)
        done = finished(jobs, results)
    runs = [{"seed": record["arguments"]["config"]["seed"], **record["result"]} for record in done.values()]
    for one in runs:
        del one["curve"]
    if runs:
        summary = summarize(runs, given.at_least)
        show(given.env, runs, summary, given.at_least)
        report = {"env_id": given.env, "summary": summary, "runs": runs, "config": config.to_dict(), "machine": facts}
        write_json(given.json, report)
    if failures:
        raise SystemExit(f"{len(failures)} of {len(jobs)} runs failed")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", metavar="ENV", nargs="?", help="an environment of EnvPool; without it, the suite")
    add_seeds(parser, None, "1-3; of the suite, 1 up to each environment's number")
    parser.add_argument("--engine", choices=("auto", "native", "torch"), default="auto", help="default: auto")
    parser.add_argument("--steps", type=positive, help="in place of the environments' own total_timesteps")
    add_arguments(parser, "suite.jsonl")
    parser.add_argument("--only", nargs="+", metavar="ENV", help="only these environments of the suite")
    one = parser.add_argument_group("one environment")
    one.add_argument("--kept", type=Path, metavar="FILE", help="where its runs are kept; by default nowhere")
    one.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of Config")
    one.add_argument("--evaluate", type=count, default=0, metavar="EPISODES", help="also evaluate each policy")
    one.add_argument("--at-least", type=float, metavar="SCORE", help="count the seeds that reach it")
    one.add_argument("--solved", type=float, metavar="SCORE", help="say when it was first reached")
    one.add_argument("--json", type=Path, metavar="FILE", help="write the scores")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    if given.env is None:
        run_suite(given)
    else:
        run_one(given)


if __name__ == "__main__":
    main()
