"""Which of EnvPool's families can be trained here? Trains a little on one environment of each kind that they have.

    python bench/families.py [FAMILY ...] [--steps 256] [--json FILE] [--docs]

Each family runs in a process of its own, since an environment may end it. `--docs` writes the table of
docs/environments.md. This says that training runs, not that it learns: bench/learning.py does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from _common import console, write_json
from tables import ROOT, fill, table

from pyppo.catalog import describe
from pyppo.envpool_envs import family_of, list_envs


def kinds(family: str) -> list[str]:
    """One environment for each class that the family consists of, in the order of registration."""
    from envpool.registration import registry

    chosen: dict[str, str] = {}
    for name, spec in registry.specs.items():
        if family_of(name) == family:
            chosen.setdefault(spec[1], name)
    return list(chosen.values())


def attempt(env_id: str, steps: int) -> dict[str, Any]:
    """Train for `steps` steps with small networks; what came of it."""
    import pyppo

    start = time.perf_counter()
    fields = {
        "num_envs": 4, "num_steps": 16, "num_minibatches": 1, "update_epochs": 1, "env_threads": 1, "num_groups": 1,
        "one_core": False, "warmup_rows": 64, "hidden_sizes": (16,), "run_dir": None,
    }  # fmt: skip
    try:
        result = pyppo.train(env_id, quiet=True, total_timesteps=steps, **fields)
    except Exception as error:  # whatever it is, the table says so
        return {"env_id": env_id, "why_not": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    return {"env_id": env_id, "why_not": "", "seconds": seconds, "steps": result.history["step"][-1]}


def attempts(family: str, steps: int) -> list[dict[str, Any]]:
    """All kinds of a family, in a process that may end."""
    done = []
    for env in describe(kinds(family)):
        if env.why_not:
            done.append({"env_id": env.name, "why_not": env.why_not, "seconds": 0.0})
    waiting = [name for name in kinds(family) if name not in {one["env_id"] for one in done}]
    while waiting:
        name = waiting.pop(0)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                done.append(process.submit(attempt, name, steps).result())
                while waiting:
                    name = waiting.pop(0)
                    done.append(process.submit(attempt, name, steps).result())
            except BrokenProcessPool:
                done.append({"env_id": name, "why_not": "it ends the process", "seconds": 0.0})
    return done


def row(family: str, tried: Sequence[dict[str, Any]]) -> list[str]:
    """A family's line of the table."""
    every = describe(name for name in list_envs() if family_of(name) == family)
    fit = [env for env in every if not env.why_not]
    good = [one["env_id"] for one in tried if not one["why_not"]]
    reasons: dict[str, list[str]] = {}
    for one in tried:
        if one["why_not"]:
            reason = re.sub(r"/\S*/site-packages/", "", one["why_not"].split("\n")[0])  # no machine's paths
            reasons.setdefault(reason, []).append(one["env_id"])
    example = next((env for env in fit if env.name in good), None)
    form = f"{example.observations} → {example.actions}" if example else ""
    result = [f"trains: {shorten(good)}"] if good else []
    result += [f"not {shorten(names)}: {reason}" for reason, names in reasons.items()]
    return [family, f"{len(fit)} of {len(every)}", form.replace("|", "\\|"), "; ".join(result).replace("|", "\\|")]


def shorten(names: Sequence[str], most: int = 4) -> str:
    """A few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more kinds" if len(names) > most else "")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--steps", type=int, default=256, help="to train for (default: 256)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the results there, with those of other families"
    )
    parser.add_argument("--docs", action="store_true", help="write the table of docs/environments.md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    known = sorted({family_of(name) for name in list_envs()})
    results = json.loads(given.json.read_text()) if given.json is not None and given.json.exists() else {}
    for family in given.families or known:
        if family not in known:
            raise SystemExit(f"no family {family!r}; it must be one of {', '.join(known)}")
        results[family] = attempts(family, given.steps)
        for one in results[family]:
            console.print(f"{family}: {one['env_id']}: {one['why_not'] or 'trains'} ({one['seconds']:.1f} s)")
    columns = ["family", "can be trained", "for example", "tried"]
    text = table(columns, [row(family, tried) for family, tried in sorted(results.items())])
    print(text)
    if given.docs:
        fill(ROOT / "docs/environments.md", "families", text)
    write_json(given.json, results)


if __name__ == "__main__":
    main()
