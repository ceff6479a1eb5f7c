"""Table 1's tables and pictures, from its results file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _common import console, score_text
from _page import Page
from _report import higher_or_lower, interval, panels, plus_minus, provenance, settings_text
from _run_statistics import iqm_interval, mean_interval, probability_of_improvement
from _runs import Job, Record, finished
from table1_settings import CLIPS, ENVIRONMENTS, PAPER, SETTING_TITLES, SETTINGS, VARIANTS
from tables import table

from pyppo.plot import draw

DRAWN = ("no clipping", "clip 0.2", "adaptive KL 0.01", "fixed KL 1")  # eleven lines would hide each other
Scores = dict[str, dict[str, list[float]]]  # by variant and environment


@dataclass(frozen=True)
class Table:
    """What there is of one setting."""

    setting: str
    asked: int
    """How many runs were asked for."""
    random: dict[str, float]
    """The random policy's score by environment."""
    records: dict[str, dict[str, list[Record]]]
    """By variant and environment; empty lists where nothing was run."""

    @property
    def all_records(self) -> list[Record]:
        return [record for by_env in self.records.values() for runs in by_env.values() for record in runs]

    def scores(self) -> Scores:
        """Each run's score; a run in which no episode ended has the random policy's."""
        return {
            variant: {env_id: [self._score(env_id, record) for record in runs] for env_id, runs in by_env.items()}
            for variant, by_env in self.records.items()
        }

    def _score(self, env_id: str, record: Record) -> float:
        score = record["result"]["score"]
        return self.random.get(env_id, math.nan) if score is None else score


def read(jobs: Sequence[Job], path: Path, setting: str) -> Table:
    """The finished ones of the jobs that are the setting's."""
    done = finished(jobs, path)
    ours = [job for job in jobs if job.key.startswith(f"{setting}/")]
    records: dict[str, dict[str, list[Record]]] = {v: {e: [] for e in ENVIRONMENTS} for v in VARIANTS}
    for job in ours:
        if job.key in done:
            _, variant, env_id, _ = job.key.split("/")
            records[variant][env_id].append(done[job.key])
    random = {e: done[f"random/{e}"]["result"]["score"] for e in ENVIRONMENTS if f"random/{e}" in done}
    return Table(setting, len(ours), random, records)


def whole(scores: Scores) -> Scores:
    """The variants that were run in all environments: others set no scale."""
    return {variant: by_env for variant, by_env in scores.items() if strata(by_env) is not None}


def best_of(scores: Scores) -> dict[str, tuple[float, str]]:
    """The highest mean over a whole variant's seeds, and whose it is, for each environment."""
    found = whole(scores)
    best = {}
    for env_id in ENVIRONMENTS if found else ():
        means = {variant: float(np.mean(by_env[env_id])) for variant, by_env in found.items()}
        top = max(means.values())
        whose = [variant for variant, mean in means.items() if mean == top]
        best[env_id] = top, whose[0] if len(whose) == 1 else f"{len(whose)} of them"
    return best


def best_run_of(scores: Scores) -> dict[str, float]:
    """The highest score of a single run, likewise."""
    found = whole(scores).values()
    return {e: max(x for by_env in found for x in by_env[e]) for e in ENVIRONMENTS} if found else {}


def scaled(scores: Scores, random: dict[str, float], best: dict[str, float]) -> Scores:
    """The random policy is 0, the best result 1, environment by environment; of the variants that are whole."""
    return {
        variant: {e: [(x - random[e]) / (best[e] - random[e]) for x in runs] for e, runs in by_env.items()}
        for variant, by_env in whole(scores).items()
    }


def strata(by_env: dict[str, list[float]]) -> list[list[float]] | None:
    """A variant's runs by environment, if it has been run in all."""
    runs = [by_env[env_id] for env_id in ENVIRONMENTS]
    return runs if all(runs) else None


# --- tables ---------------------------------------------------------------------------------------------------------


def aggregate_table(found: Table) -> str:
    """The paper's table beside ours."""
    scores = found.scores()
    best = {env_id: top for env_id, (top, _) in best_of(scores).items()}
    ours = scaled(scores, found.random, best)
    by_run = scaled(scores, found.random, best_run_of(scores))
    alike = shared_seeds(found)
    lines = []
    for variant, by_env in found.records.items():
        runs = [record for records in by_env.values() for record in records]
        cells = ["–", "–", "–", "–"]
        if variant in ours:
            of_runs, alone = list(ours[variant].values()), list(by_run[variant].values())
            cells = [interval(estimate, of_runs) for estimate in (mean_interval(of_runs), iqm_interval(of_runs))]
            pairs = [zip(ours[variant][env_id], by_env[env_id], strict=True) for env_id in ENVIRONMENTS]
            same = [[score for score, record in one if _seed(record) in alike] for one in pairs]
            cells.append(f"{mean_interval(same).value:.2f}" if alike else "–")
            cells.append(f"{mean_interval(alone).value:.2f}")
        diverged = sum(record["result"]["diverged"] is not None for record in runs)
        lines.append([variant, f"{PAPER[variant]:.2f}", *cells, str(len(runs)), str(diverged)])
    columns = ["surrogate", "paper", "mean [95 %]", "interquartile mean [95 %]",
               f"mean, seeds {', '.join(map(str, sorted(alike))) or 'that all have'}", "mean, best run = 1", "runs",
               "diverged"]  # fmt: skip
    return table(columns, lines)


def shared_seeds(found: Table) -> set[int]:
    """The seeds that all variants have in all environments, of those that were run in all: seeds are lucky or not."""
    of_whole = [by_env for by_env in found.records.values() if all(by_env.values())]
    cells = [{_seed(record) for record in runs} for by_env in of_whole for runs in by_env.values()]
    return set.intersection(*cells) if cells else set()


def _seed(record: Record) -> int:
    return int(record["arguments"]["seed"])


def score_table(found: Table) -> str:
    """Each variant in each environment: mean ± standard deviation over seeds, and how many."""
    lines = [
        [variant, *(f"{plus_minus(runs)} ({len(runs)})" if runs else "–" for runs in by_env.values())]
        for variant, by_env in found.scores().items()
    ]
    return table(["surrogate", *(env_id.removesuffix("-v4") for env_id in ENVIRONMENTS)], lines)


def scale_table(found: Table) -> str:
    """What 0 and 1 are."""
    scores = found.scores()
    best, run = best_of(scores), best_run_of(scores)
    lines = [
        [env_id, score_text(found.random[env_id]), score_text(top), variant, score_text(run[env_id])]
        for env_id, (top, variant) in best.items()
    ]
    return table(["environment", "random policy = 0", "best mean = 1", "of", "best run"], lines)


def comparison_table(found: Table) -> str | None:
    """The probability that a run of one scores higher than one of another, for pairs that were run whole, if any."""
    scores = found.scores()  # a scale would not change who is higher
    pairs = [("clip 0.2", "clip 0.1"), ("clip 0.2", "clip 0.3"), ("clip 0.1", "clip 0.3")]
    pairs += [("clip 0.2", v) for v in VARIANTS if v not in CLIPS]
    lines = []
    for name, other in pairs:
        ours, theirs = strata(scores[name]), strata(scores[other])
        if ours is not None and theirs is not None:
            p = probability_of_improvement(ours, theirs)
            lines.append([name, other, interval(p, ours, theirs), higher_or_lower(p, ours, theirs)])
    return table(["a run of", "scores higher than one of", "probability [95 %]", ""], lines) if lines else None


def no_scale(found: Table) -> str | None:
    """Why scores cannot be scaled; None if they can."""
    if missing := [env_id for env_id in ENVIRONMENTS if env_id not in found.random]:
        return f"the random policy has not been run in {', '.join(missing)}"
    best = {env_id: top for env_id, (top, _) in best_of(found.scores()).items()}
    if not best:
        return "no variant has been run in all environments"
    low = [env_id for env_id, top in best.items() if not top > found.random[env_id]]
    return f"nothing is better than the random policy in {', '.join(low)}" if low else None


def report(found: Table) -> str:
    """All of one setting, as Markdown."""
    records = found.all_records
    title = f"Setting {found.setting}: {SETTING_TITLES[found.setting]}."
    if not records:
        return f"{title} Not run yet."
    steps = records[0]["arguments"]["fields"]["total_timesteps"]
    held = f"{len(records)} of {found.asked} runs of {steps:,} steps. {provenance(records)}"
    parts = [f"{title} {held}"]
    if (why := no_scale(found)) is None:
        parts += [aggregate_table(found), scale_table(found)]
    else:
        parts.append(f"No scale yet: {why}.")
    parts.append(score_table(found))
    if (compared := comparison_table(found)) is not None:
        parts.append(compared)
    parts.append(settings_table(found.setting))
    return "\n\n".join(parts)


def settings_table(setting: str) -> str:
    """What all runs have, and what each surrogate has in its place; the rest is `Config`'s defaults."""
    alike = {name: x for name, x in SETTINGS[setting].items() if name != "run_dir"}
    lines = [["all", settings_text(alike)], *([name, settings_text(fields)] for name, fields in VARIANTS.items())]
    return table(["surrogate", "of `pyppo.Config`"], lines)


def write(found: Table, page: Page) -> None:
    """The setting's part of results.md, and its picture, if there is anything."""
    text = report(found)
    if drawn := panels((e, variant, found.records[variant][e]) for e in ENVIRONMENTS for variant in DRAWN):
        caption = "Returns of four of the surrogates, mean and range over seeds"
        text += page.picture(f"table1-{found.setting}.png", caption, lambda path: draw(drawn, path, size=(4.4, 3.0)))
    page.section(f"table1-{found.setting}", text)
    console.print(f"setting {found.setting}: {len(found.all_records)} of {found.asked} runs")
