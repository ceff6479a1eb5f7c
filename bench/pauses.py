"""What does a pause between an answer and the next actions cost the environments, besides the pause?

    python bench/pauses.py [ENV] [--num-envs N] [--threads N] [--rounds N]

EnvPool's threads sleep when they have had nothing to do for a while, and waking them takes time. Its compiled calls
alone, with actions made beforehand, the caller idling between `recv` and `send`; all pauses in turn, medians of the
rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import envpool
import numpy as np
from _common import machine, show_facts, show_table

PAUSES = (0, 8, 15, 25, 40, 60, 100)
"""Microseconds."""
STEPS = 256


def step_us(pool: envpool.EnvPool, messages: list[list[np.ndarray]], pause: float) -> float:
    """Microseconds of a step of all environments, the pause left out."""
    start = time.perf_counter()
    for i in range(STEPS):
        pool._recv()
        until = time.perf_counter() + 1e-6 * pause
        while pause and time.perf_counter() < until:
            pass
        pool._send(messages[i % len(messages)])
    return 1e6 * (time.perf_counter() - start) / STEPS - pause


def measure(env_id: str, num_envs: int, threads: int, rounds: int) -> dict[int, list[float]]:
    """Each pause's times, a round each."""
    pool = envpool.make(env_id, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=1)
    ids, dtype = np.arange(num_envs, dtype=np.int32), pool._spec._action_spec[2][0]
    actions = (np.stack([pool.action_space.sample() for _ in ids]).astype(dtype) for _ in range(64))
    messages = [[ids, ids, batch] for batch in actions]
    pool._reset(ids)
    found: dict[int, list[float]] = {pause: [] for pause in PAUSES}
    for _ in range(rounds):
        for pause, times in found.items():
            times.append(step_us(pool, messages, pause))
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", nargs="?", metavar="ENV", default="HalfCheetah-v4")
    parser.add_argument("--num-envs", type=int, default=8, help="default: 8")
    parser.add_argument("--threads", type=int, default=2, help="EnvPool's (default: 2)")
    parser.add_argument("--rounds", type=int, default=30, help="default: 30")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    show_facts("machine", machine())
    found = measure(given.env, given.num_envs, given.threads, given.rounds)
    rows = []
    for pause, times in found.items():
        ratio = statistics.median(x / y for x, y in zip(times, found[0], strict=True))
        rows.append([str(pause), f"{statistics.median(times):.0f}", f"{ratio:.2f}"])
    title = f"{given.env}, {given.num_envs} environments, {given.threads} threads: us a step, the pause left out"
    show_table(title, ["pause, us", "a step", "of no pause's"], rows)


if __name__ == "__main__":
    main()
