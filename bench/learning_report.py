"""The suite's table and picture, from its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from _common import console, score_text
from _page import Page
from _report import count_text, interval, panels, plus_minus, provenance, settings_text, too_few
from _run_statistics import difference_interval, iqm_interval, mean_std, permutation_p, sign_flip_p
from _runs import Record
from suite import SUITE, Task, config_of, engine_of
from tables import table

from pyppo import Config
from pyppo.plot import draw

ENGINES = ("native", "torch")


def runs_of(done: Mapping[str, Record], task: Task, engine: str) -> list[Record]:
    """The task's runs on an engine, by seed."""
    runs = [record for key, record in done.items() if key.startswith(f"{task.env_id}/{engine}/")]
    return sorted(runs, key=seed_of)


def seed_of(run: Record) -> int:
    """The run's seed."""
    return run["arguments"]["config"]["seed"]


def scores_of(runs: Sequence[Record], which: str) -> list[float]:
    """Training or evaluation scores, where there are any."""
    name = "score" if which == "training" else "evaluation"
    return [record["result"][name] for record in runs if record["result"][name] is not None]


def verdict(task: Task, runs: Sequence[Record]) -> str:
    """Whether the gate is met, and by how many runs alone; one that diverged, or has no score, meets none."""
    if task.gate is None:
        return "–"
    sound = [record for record in runs if record["result"]["diverged"] is None]
    scores = scores_of(sound, task.of)
    reached = sum(score >= task.gate for score in scores)
    met = reached == len(runs) if task.every else len(scores) == len(runs) and mean_std(scores)[0] >= task.gate
    count = f"{reached} of {len(runs)} runs alone"
    suites_own = runs[0]["arguments"]["config"]["engine"] == engine_of(task, "auto")
    missing = f", {task.seeds - len(runs)} to come" if suites_own and len(runs) < task.seeds else ""
    return f"{'met' if met else 'missed'}{' so far' if missing else ''} ({count}{missing})"


def gate_text(task: Task) -> str:
    """What is asked."""
    if task.gate is None:
        return "to be set"
    return f"{'every' if task.every else 'mean'} {task.of} ≥ {task.gate:g}"


def row(task: Task, engine: str, runs: Sequence[Record]) -> list[str]:
    """A line of the table."""
    training, evaluation = scores_of(runs, "training"), scores_of(runs, "evaluation")
    gated = training if task.of == "training" else evaluation
    middle = interval(iqm_interval([gated]), [gated], text=score_text) if gated else "–"
    clock, seconds = (float(np.median([record[name] for record in runs])) for name in ("seconds", "cpu_seconds"))
    speed = float(np.median([record["result"]["sps"] for record in runs]))
    kernels = ", ".join(sorted({record["machine"]["cpu_capability"] for record in runs}))
    steps = runs[0]["arguments"]["config"]["total_timesteps"]
    scores = [plus_minus(training), plus_minus(evaluation), middle]
    return [task.env_id, engine, f"{steps:,}", count_text(runs), *scores, task.reference, gate_text(task),
            verdict(task, runs), kernels, f"{clock:.0f}", f"{seconds:.0f}", f"{speed:,.0f}"]  # fmt: skip


COLUMNS = (
    "environment", "engine", "steps", "runs", "training", "evaluation", "the gate's, interquartile mean [95 %]",
    "reference", "gate", "reached", "kernels", "seconds a run", "CPU seconds", "steps/s in training",
)  # fmt: skip


def engine_table(done: Mapping[str, Record]) -> str | None:
    """Training scores of both engines side by side, where both have run; None: nowhere.

    The same seed begins the same run on both, and rounding drives them apart: runs of one seed share its luck, so those
    are compared in pairs. Torch's runs of seeds that native has not are independent of native's.
    """
    lines = []
    for task in SUITE:
        native, torch = (_by_seed(runs_of(done, task, engine)) for engine in ENGINES)
        if not (native and torch):
            continue
        ours, theirs = list(native.values()), [score for seed, score in torch.items() if seed not in native]
        texts = [f"{plus_minus(scores)} ({len(scores)})" if scores else "–" for scores in (ours, theirs)]
        difference, p = "–", "–"
        if theirs:
            difference = interval(difference_interval(ours, theirs), [ours], [theirs], text=score_text)
            p = "too few runs" if too_few([ours], [theirs]) else f"{permutation_p(ours, theirs):.2f}"
        pairs = [score - torch[seed] for seed, score in native.items() if seed in torch]
        paired = [f"{plus_minus(pairs)} ({len(pairs)})", _paired_p(pairs)] if pairs else ["–", "–"]
        lines.append([task.env_id, *texts, difference, p, *paired])
    if not lines:
        return None
    columns = ["native (runs)", "torch, other seeds (runs)", "native - torch [95 %]", "p"]
    return table(["environment", *columns, "same seeds, native - torch (pairs)", "p of the pairs"], lines)


def _paired_p(differences: Sequence[float]) -> str:
    """Of at least six: of fewer even signs that are all alike are no surprise."""
    return f"{sign_flip_p(differences):.2f}" if len(differences) >= 6 else "too few pairs"


def _by_seed(runs: Sequence[Record]) -> dict[int, float]:
    """Training scores, of runs that have one."""
    return {seed_of(run): run["result"]["score"] for run in runs if run["result"]["score"] is not None}


def settings_table() -> str:
    """What each environment's settings differ in from the defaults of `Config`."""
    lines = []
    for task in SUITE:
        config = config_of(task, "native" if task.native else "torch", 1).to_dict()
        plain = Config(env_id=task.env_id, engine=config["engine"], run_dir=None).to_dict()
        changed = {name: x for name, x in config.items() if x != plain[name]}
        lines.append([task.env_id, settings_text(changed)])
    return table(["environment", "settings"], lines)


def report(done: Mapping[str, Record]) -> str:
    """The table, where runs end in two modes, the engines beside each other, and each seed's score."""
    if not done:
        return "Not run yet."
    lines, seeds, modes = [], [], []
    for engine in ENGINES:
        for task in SUITE:
            if runs := runs_of(done, task, engine):
                lines.append(row(task, engine, runs))
                scores = scores_of(runs, "training")
                numbers = ", ".join(str(seed_of(run)) for run in runs)
                seeds.append([task.env_id, engine, numbers, ", ".join(map(score_text, scores))])
                if task.modes is not None:
                    above = sum(score >= task.modes for score in scores)
                    counts = f"{above} of {len(scores)} runs end above {task.modes:g}, {len(scores) - above} below"
                    modes.append(f"{task.env_id} ({engine}): {counts}.")
    missing = [task.env_id for task in SUITE if not any(runs_of(done, task, engine) for engine in ENGINES)]
    parts = [provenance(done.values()), table(COLUMNS, lines), *modes]
    if missing:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    if (engines := engine_table(done)) is not None:
        parts.append(
            "The engines beside each other, training scores. The same seed begins the same run on both, so those are "
            "compared in pairs, and torch's runs of other seeds with all of the native engine's. p: how often runs of "
            "one engine, divided at random into groups of these sizes, or pairs with random signs, differ as much "
            "(permutation tests)."
            f"\n\n{engines}"
        )
    parts.append("Training scores by seed:\n\n" + table(["environment", "engine", "seeds", "scores"], seeds))
    parts.append("Settings, where they are not the defaults of `Config`:\n\n" + settings_table())
    return "\n\n".join(parts)


def write(done: Mapping[str, Record], page: Page) -> None:
    """The suite's part of results.md, and its picture."""
    text = report(done)
    if drawn := panels((task.env_id, engine, runs_of(done, task, engine)) for task in SUITE for engine in ENGINES):
        caption = "Mean and range over seeds of each environment's return"
        text += page.picture("suite.png", caption, lambda path: draw(drawn, path, size=(4.4, 3.0)))
    page.section("suite", text)
    for task in SUITE:
        for engine in ENGINES:
            if runs := runs_of(done, task, engine):
                scores = plus_minus(scores_of(runs, task.of))
                console.print(f"{task.env_id} ({engine}): {task.of} {scores}; {gate_text(task)}: {verdict(task, runs)}")
