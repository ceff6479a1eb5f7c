"""What scores does training reach? One environment over several seeds, each in a process of its own.

    python bench/learning.py ENV [--seeds 1 2 3] [--parallel 2] [--set FIELD=VALUE ...] [--json FILE]

A seed's score is the mean return of its last 100 training episodes. "±" is the standard deviation over seeds (divided
by their number); scores of evaluation episodes are another thing and are shown apart. `--solved SCORE` says when the
mean of a hundred episodes first reached it: after how many steps, and seconds from the call of `train`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from _common import console, machine, parse_fields, score_text, show_facts, show_table, write_json

import pyppo
from pyppo.checkpoint import parameter_sha256


def run(env_id: str, fields: Mapping[str, Any], seed: int, episodes: int, solved: float | None) -> dict[str, Any]:
    """Train with one seed; its score and what identifies the result."""
    reached: dict[str, float] = {}
    start = time.perf_counter()

    def note(row: Mapping[str, float]) -> None:
        if solved is not None and not reached and row["episodes_total"] >= 100 and row["episode_return"] >= solved:
            reached.update(steps=row["step"], seconds=time.perf_counter() - start)

    result = pyppo.train(env_id, quiet=True, callbacks=[note], **{**fields, "seed": seed})
    history = result.history
    evaluation = pyppo.evaluate(result.policy, env_id, episodes=episodes) if episodes else None
    return {
        "seed": seed,
        "score": history["episode_return"][-1],
        "best": max((x for x in history["episode_return"] if not math.isnan(x)), default=math.nan),
        "evaluation": evaluation.mean if evaluation else None,
        "evaluation_std": evaluation.std if evaluation else None,
        "steps": int(history["step"][-1]),
        "seconds": history["time"][-1],
        "solved_steps": reached.get("steps"),
        "solved_seconds": reached.get("seconds"),
        "sha256": parameter_sha256(result.policy),
        "run_dir": str(result.run_dir) if result.run_dir else None,
    }


def run_all(
    env_id: str, fields: Mapping[str, Any], seeds: Sequence[int], parallel: int, episodes: int, solved: float | None
) -> list[Any]:
    """Each seed in a new process, some at a time; each kernel pool gets its share of the cores."""
    os.environ["PYPPO_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // parallel))
    spawn = multiprocessing.get_context("spawn")  # EnvPool hangs after a fork
    done = []
    with ProcessPoolExecutor(parallel, mp_context=spawn, max_tasks_per_child=1) as processes:
        waiting = [processes.submit(run, env_id, fields, seed, episodes, solved) for seed in seeds]
        for future in as_completed(waiting):
            done.append(future.result())
            console.print(f"seed {done[-1]['seed']}: {score_text(done[-1]['score'])} after {done[-1]['seconds']:.0f} s")
    return sorted(done, key=lambda one: one["seed"])


def summarize(runs: Sequence[Mapping[str, Any]], at_least: float | None) -> dict[str, Any]:
    """Over the seeds."""
    scores = [one["score"] for one in runs]
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
        rows.append([str(one["seed"]), score_text(one["score"]), evaluation, *sizes])
    show_table(env_id, ["seed", "score", "evaluation", "steps", "seconds", "solved after", "parameters"], rows)
    mean, std, least, most = (score_text(summary[key]) for key in ("mean", "std", "least", "most"))
    line = f"{env_id}: {mean} ± {std} over {len(runs)} seeds (least {least}, most {most})"
    if at_least is not None:
        line += f"; {summary['reached']} of {len(runs)} at {at_least:g} or above"
    if solved := summary.get("solved"):
        line += f"; solved in {solved['median_seconds']:.2f} s (median; {solved['least_seconds']:.2f} to "
        line += f"{solved['most_seconds']:.2f}), {solved['runs']} of {len(runs)}"
    console.print(line)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", metavar="ENV", help="an environment of EnvPool")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--parallel", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of Config")
    parser.add_argument("--evaluate", type=int, default=0, metavar="EPISODES", help="also evaluate each policy")
    parser.add_argument("--at-least", type=float, metavar="SCORE", help="count the seeds that reach it")
    parser.add_argument("--solved", type=float, metavar="SCORE", help="say when it was first reached")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    fields = parse_fields(given.set)
    config = pyppo.Config.for_env(given.env, **fields)
    facts = machine()
    show_facts("machine", facts)
    runs = run_all(given.env, fields, given.seeds, given.parallel, given.evaluate, given.solved)
    summary = summarize(runs, given.at_least)
    show(given.env, runs, summary, given.at_least)
    report = {"env_id": given.env, "summary": summary, "runs": runs, "config": config.to_dict(), "machine": facts}
    write_json(given.json, report)


if __name__ == "__main__":
    main()
