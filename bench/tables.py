"""Writes the tables of README.md and docs/ from the JSON files that the other benchmarks wrote.

    python bench/tables.py [--kernels FILE] [--update FILE] [--train FILE] [--learning FILE ...]

A table goes between <!-- NAME --> and <!-- /NAME -->; what stood there goes. Figures come from the files alone.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import score_text

ROOT = Path(__file__).resolve().parents[1]
TITLES = {"gae": "`gae`", "loss": "PPO loss with gradients", "sample": "`sample`", "adam": "`adam` with clipping"}
UPDATE_TITLES = {"update": "A minibatch's update", "wide": "The same of wide layers", "act": "Acting"}
HEADLINES = {"2048 x 1", "128 x 8", "1024 x 4096", "categorical 256 x 4", "categorical 32768 x 4", "normal 64 x 6"}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["--"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(facts: Mapping[str, Any]) -> str:
    """One line that names it."""
    kernels = f"{facts['cpu_capability']} kernels on {facts['kernel_threads']} threads"
    versions = f"torch {facts['torch']} on {facts['torch_threads']}, NumPy {facts['numpy']}, Python {facts['python']}"
    return f"{facts['cpu']}, {facts['cores']} cores, {kernels}; {versions}."


def short(us: float) -> str:
    """Microseconds."""
    return f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def times(ratio: float) -> str:
    """How often."""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def kernel_tables(results: Mapping[str, Any]) -> str:
    """All groups, each contender in a column."""
    costs = ", ".join(f"{name} {value:g}" for name, value in results["fixed_costs"].items())
    parts = [f"{machine(results['machine'])} Fixed costs: {costs}."]
    for group, title in TITLES.items():
        if rows := results.get(group):
            names = list(dict.fromkeys(name for row in rows for name in row["us"]))
            lines = [
                [row["case"], *(short(row["us"][name]) if name in row["us"] else "" for name in names), *ratios(row)]
                for row in rows
            ]
            parts.append(f"{title}, µs:\n\n" + table([group, *names, "× best rival", "of limit"], lines))
    return "\n\n".join(parts)


def ratios(row: Mapping[str, Any]) -> list[str]:
    """Against the best rival and the limit, for each of ours."""
    faster = " / ".join(times(x) for x in row["times_best_rival"].values())
    return [faster, " / ".join(f"{x:.2f}" for x in row["of_limit"].values())]


def headline_table(results: Mapping[str, Any]) -> str:
    """A few rows for the README: our best time against the best rival's."""
    lines = []
    for group, title in TITLES.items():
        for row in results.get(group, []):
            if row["case"] in HEADLINES and row["best_rival"]:
                ours = min(row["times_best_rival"], key=lambda name: row["us"][name])
                lines.append([title, row["case"], f"{short(row['us'][ours])} (`{ours}`)",
                              f"{short(row['us'][row['best_rival']])} ({row['best_rival']})",
                              times(row["times_best_rival"][ours]), f"{row['of_limit'][ours]:.2f}"])  # fmt: skip
    columns = ["kernel", "size", "µs", "best rival's", "× faster", "of the copy limit"]
    return f"{machine(results['machine'])}\n\n{table(columns, lines)}"


def update_tables(results: Mapping[str, Any]) -> str:
    """Minibatches of small networks, of wide ones, and acting; each contender in a column."""
    parts = [f"{machine(results['machine'])} Peak: {results['peak_gmacs']:g} GMAC/s on one thread."]
    for group, title in UPDATE_TITLES.items():
        if rows := results.get(group):
            names, ours = list(rows[0]["us"]), next(iter(rows[0]["us"]))
            lines = []
            for row in rows:
                size = [row["case"], str(row.get("batch", row.get("rows"))), str(row["threads"])]
                rate = [f"{row['gmacs'][ours]:.1f}", f"{row['of_peak'][ours]:.2f}"] if "gmacs" in row else []
                lines.append([*size, *(short(row["us"][n]) for n in names), times(row["times_rival"][ours]), *rate])
            rates = ["GMAC/s", "of peak"] if "gmacs" in rows[0] else []
            parts.append(f"{title}, µs:\n\n" + table(["layers", "rows", "threads", *names, "×", *rates], lines))
    return "\n\n".join(parts)


def train_table(results: Mapping[str, Any]) -> str:
    """Speeds and shares."""
    phases = ("act", "env", "gae", "update", "other")
    lines = []
    for one in results["settings"]:
        config, median = one["config"], one["median"]
        minibatch = config["num_envs"] * config["num_steps"] // config["num_minibatches"]
        size = f"{config['num_envs']} × {config['num_steps']} / {minibatch} × {config['update_epochs']}"
        rates = [f"{median[key]:,.0f}" for key in ("steps_per_second", "rows_per_second", "alone")]
        at_once = f"{median['at once']:,.0f}" if "at once" in median else ""
        shares = (f"{median[phase]:.1%}" for phase in phases)
        lines.append([config["env_id"], size, *rates, f"{median['ratio']:.3f}", at_once, *shares])
    columns = [
        "environment", "N × T / minibatch × epochs", "steps/s", "rows/s", "EnvPool alone", "ratio", "at once", *phases
    ]  # fmt: skip
    return f"{machine(results['machine'])}\n\n{table(columns, lines)}"


def learning_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """A row an environment, its seeds one by one."""
    lines = []
    for report in reports:
        scores = ", ".join(score_text(run["score"]) for run in report["runs"])
        summary, steps = report["summary"], report["config"]["total_timesteps"]
        evaluations = [run["evaluation"] for run in report["runs"] if run["evaluation"] is not None]
        mean, std = score_text(summary["mean"]), score_text(summary["std"])
        evaluated = ", ".join(map(score_text, evaluations))
        lines.append([report["env_id"], f"{steps:,}", scores, f"{mean} ± {std}", evaluated])
    return table(["environment", "steps", "seeds 1, 2, …", "mean ± std", "evaluation"], lines)


def has_marks(path: Path, name: str) -> bool:
    """Whether a page has the marks of that name, once."""
    return len(_section(name).findall(path.read_text())) == 1


def fill(path: Path, name: str, text: str) -> None:
    """Put `text` between the marks of that name; several programs may do so at once, and none leaves half a page."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        page, count = _section(name).subn(lambda _: f"<!-- {name} -->\n{text}\n<!-- /{name} -->", path.read_text())
        if count != 1:
            raise ValueError(f"{path} has the marks <!-- {name} --> {count} times; it must have them once")
        beside = path.with_name(path.name + ".new")
        beside.write_text(page)
        beside.replace(path)
    finally:
        os.close(folder)


def _section(name: str) -> re.Pattern[str]:
    return re.compile(f"<!-- {re.escape(name)} -->.*?<!-- /{re.escape(name)} -->", re.DOTALL)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="of bench/kernels.py --json")
    parser.add_argument("--update", type=Path, metavar="FILE", help="of bench/update.py --json")
    parser.add_argument("--train", type=Path, metavar="FILE", help="of bench/train.py --json")
    parser.add_argument(
        "--learning", type=Path, nargs="+", default=[], metavar="FILE", help="of bench/learning.py --json"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    given = parse(arguments)
    if given.kernels:
        results = json.loads(given.kernels.read_text())
        fill(root / "docs/benchmarks.md", "kernels", kernel_tables(results))
        fill(root / "README.md", "kernels", headline_table(results))
    if given.update:
        fill(root / "docs/benchmarks.md", "update", update_tables(json.loads(given.update.read_text())))
    if given.train:
        results = json.loads(given.train.read_text())
        fill(root / "docs/benchmarks.md", "train", train_table(results))
        fill(root / "README.md", "train", train_table(results))
    if given.learning:
        reports = [json.loads(path.read_text()) for path in given.learning]
        fill(root / "docs/learning.md", "learning", learning_table(reports))


if __name__ == "__main__":
    main()
