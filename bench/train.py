"""How fast is training, where does its time go, and how far is it from stepping the environments alone?

    python bench/train.py [NAME ...] [--rounds N] [--set FIELD=VALUE ...] [--json FILE]

Each round runs training iterations, then the same environments with random actions made beforehand, EnvPool's compiled
calls only: on one core; free on all cores with one thread and with one a core; in two groups, one stepping while the
other is served. The round's fastest counts. Measured too, but not counted, since it is this library's own way of
calling it: two groups at once, each on a core of its own. Reset rows, in which an environment ignores its action, count
on both sides as rows; "steps" are the others. "env" is the wait for the environments and the writing down of their
answers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import envpool
import numpy as np
import torch
from _common import console, machine, parse_fields, show_facts, show_table, warn_if_busy, write_json

import pyppo

PHASES = ("act", "env", "gae", "update", "other")
SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole-4x128": {"env_id": "CartPole-v1"},
    "CartPole-64x128": {"env_id": "CartPole-v1", "num_envs": 64, "num_steps": 128, "num_minibatches": 32,
                        "update_epochs": 4},
    "HalfCheetah-8x256": {"env_id": "HalfCheetah-v4", "num_envs": 8, "num_steps": 256, "num_minibatches": 32,
                          "update_epochs": 10},
    "HalfCheetah-64x256": {"env_id": "HalfCheetah-v4", "num_envs": 64, "num_steps": 256, "num_minibatches": 32,
                           "update_epochs": 10},
}  # fmt: skip
"""The presets, and 64 environments in minibatches of 256 (CartPole) and of 512."""


# --- the environments alone -----------------------------------------------------------------------------------------


@contextmanager
def _cores(cores: set[int]) -> Iterator[None]:
    """Run this thread, and those that are started in it, on some cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class RandomActions:
    """Pools stepped in turn with random actions that were drawn beforehand: EnvPool at its fastest.

    Args:
        config: its environment, number of environments and options.
        groups: pools that the environments are split into.
        threads: EnvPool's, a pool.
        cores: where pools and caller may run.
    """

    def __init__(self, config: pyppo.Config, groups: int, threads: int, cores: set[int]) -> None:
        self._cores, size = cores, config.num_envs // groups
        self._one_core = len(cores) == 1 < len(os.sched_getaffinity(0))
        self._rows = self._ACTIONS * groups * size
        self._ids = np.arange(size, dtype=np.int32)
        self._pools: list[tuple[Any, list[list[np.ndarray]]]] = []
        with _cores(cores):
            for group in range(groups):
                options = {"num_envs": size, "num_threads": threads, "seed": 1 + group * size, **config.env_options}
                pool = envpool.make(config.env_id, env_type="gymnasium", **options)
                pool._reset(self._ids)
                self._pools.append((pool, self._messages(pool)))

    _ACTIONS = 64

    def _messages(self, pool: Any) -> list[list[np.ndarray]]:
        dtype, space = pool._spec._action_spec[2][0], pool.action_space
        actions = (np.stack([space.sample() for _ in self._ids]).astype(dtype) for _ in range(self._ACTIONS))
        return [[self._ids, self._ids, batch] for batch in actions]

    def rows_per_second(self, seconds: float) -> float:
        """Rows a second over about that time. Between calls each pool has an answer ready, or in the making."""
        calls = [(pool._send, pool._recv, messages) for pool, messages in self._pools]
        rows = 0
        with _cores(self._cores):
            start = time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds:
                for i in range(self._ACTIONS):
                    for send, receive, messages in calls:
                        receive()
                        send(messages[i])
                        if self._one_core:
                            os.sched_yield()  # as training does; without it small batches are slower
                rows += self._rows
        return rows / elapsed


class RandomActionsAtOnce:
    """Two pools, each with the thread that serves it on a core of its own.

    Args:
        config: as for `RandomActions`.
        cores: at least two.
    """

    def __init__(self, config: pyppo.Config, cores: set[int]) -> None:
        half = config.replace(num_envs=config.num_envs // 2)
        self._halves = [RandomActions(half, 1, 1, {core}) for core in sorted(cores)[:2]]

    def rows_per_second(self, seconds: float) -> float:
        """Rows a second of both over about that time."""
        with ThreadPoolExecutor(len(self._halves)) as threads:
            return sum(threads.map(lambda half: half.rows_per_second(seconds), self._halves))


def pools(config: pyppo.Config) -> dict[str, RandomActions]:
    """The ways to run the environments; which is fastest depends on how cheap they are."""
    cores = os.sched_getaffinity(0)
    threads = min(len(cores), config.num_envs)
    made = {"one core": RandomActions(config, 1, 1, {min(cores)}), "1 thread": RandomActions(config, 1, 1, cores)}
    if threads > 1:
        made[f"{threads} threads"] = RandomActions(config, 1, threads, cores)
        if config.num_envs % 2 == 0:
            made["2 groups, 1 thread each"] = RandomActions(config, 2, 1, cores)
            made[f"2 groups, {threads} threads each"] = RandomActions(config, 2, threads, cores)
    return made


# --- training -------------------------------------------------------------------------------------------------------


class Training:
    """A trainer far from its end, so that the schedules stand still."""

    def __init__(self, config: pyppo.Config, warmup: int) -> None:
        self.trainer = pyppo.Trainer(config.replace(run_dir=None, total_timesteps=10**12), quiet=True)
        for _ in range(warmup):
            self.trainer.step()

    def measure(self, seconds: float) -> dict[str, float]:
        """Iterations for about that time: rates, the share of each phase, microseconds of a minibatch."""
        trainer, spent, iterations, updates = self.trainer, dict.fromkeys(PHASES, 0.0), 0, 0.0
        steps = trainer.steps
        trainer.clock.start()  # or its next lap would count what was measured in between
        start = time.perf_counter()
        while not iterations or time.perf_counter() - start < seconds:
            row = trainer.step()
            iterations, updates = iterations + 1, updates + row["updates"]
            for phase in PHASES:
                spent[phase] += row[f"time_{phase}"]
        elapsed = time.perf_counter() - start
        return {
            "steps_per_second": (trainer.steps - steps) / elapsed,
            "rows_per_second": iterations * trainer.config.batch_size / elapsed,
            "minibatch_us": 1e6 * spent["update"] / updates,
            **{phase: spent[phase] / elapsed for phase in PHASES},
        }


def measure(name: str, config: pyppo.Config, rounds: int, seconds: float, warmup: int) -> dict[str, Any]:
    """Training and the environments alone, in turn; medians over the rounds."""
    training, alone = Training(config, warmup), pools(config)
    cores = os.sched_getaffinity(0)
    at_once = RandomActionsAtOnce(config, cores) if len(cores) > 1 and config.num_envs % 2 == 0 else None
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        row = training.measure(seconds)
        speeds = {f"alone, {way}": pool.rows_per_second(seconds / 2) for way, pool in alone.items()}
        best = max(speeds.values())
        found.append({**row, **speeds, "alone": best, "ratio": row["rows_per_second"] / best})
        if at_once is not None:
            found[-1]["at once"] = at_once.rows_per_second(seconds / 2)
    training.trainer.close()
    stepping = training.trainer.stepping
    return {
        "name": name,
        "stepping": str(stepping.way) if stepping else "",
        "median": _over(found, statistics.median),
        "least": _over(found, min),
        "most": _over(found, max),
        "rounds": rounds,
        "config": config.to_dict(),
    }


def _over(rows: Sequence[Mapping[str, float]], reduce: Callable[[list[float]], float]) -> dict[str, float]:
    return {key: reduce([row[key] for row in rows]) for key in rows[0]}


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """Speeds, then shares."""
    speeds, shares = [], []
    for result in results:
        median, config = result["median"], result["config"]
        minibatch = config["num_envs"] * config["num_steps"] // config["num_minibatches"]
        size = f"{config['num_envs']} x {config['num_steps']} / {minibatch} x {config['update_epochs']}"
        rates = [f"{median[key]:,.0f}" for key in ("steps_per_second", "rows_per_second", "alone")]
        spread = f"{result['least']['rows_per_second']:,.0f}-{result['most']['rows_per_second']:,.0f}"
        at_once = f"{median['at once']:,.0f}" if "at once" in median else ""
        speeds.append([config["env_id"], size, *rates[:2], spread, rates[2], f"{median['ratio']:.3f}", at_once])
        each = [f"{median[phase]:.1%}" for phase in PHASES]
        shares.append([config["env_id"], size, *each, f"{median['minibatch_us']:,.0f}", result["stepping"]])
    first = ["environment", "N x T / minibatch x epochs"]
    columns = [*first, "steps/s", "rows/s", "range", "EnvPool alone", "ratio", "at once"]
    show_table("training, and EnvPool's best with random actions (rows/s)", columns, speeds)
    show_table("shares of training's time", [*first, *PHASES, "us a minibatch", "<environments in"], shares)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(SETTINGS)}, or an environment "
                        "with its preset (default: the four)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="training time of a round (default: 3)")
    parser.add_argument("--warmup", type=int, default=2, help="iterations before the first round (default: 2)")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of Config for all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    given = parser.parse_args(arguments)
    if given.quick:
        given.rounds, given.seconds = 1, 0.2
    return given


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    changes = parse_fields(given.set)
    torch.set_num_threads(1)
    facts = machine()
    show_facts("machine", facts)
    warn_if_busy(facts)
    results = []
    for name in given.names or SETTINGS:
        config = pyppo.Config.for_env(**{**SETTINGS.get(name, {"env_id": name}), **changes})
        results.append(measure(name, config, given.rounds, given.seconds, given.warmup))
        console.print(f"{name}: {results[-1]['median']['steps_per_second']:,.0f} steps/s")
    show(results)
    write_json(given.json, {"machine": facts, "settings": results})


if __name__ == "__main__":
    main()
