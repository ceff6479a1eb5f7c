"""Do environments take longer in the states that a policy visits than under random actions?

    python bench/states.py [ENV ...] [--steps N] [--rounds N] [--json FILE]

A ratio to EnvPool with random actions (`bench/train.py`) takes every step for equally dear; a simulator's contacts are
not. Here each sequence of actions is recorded once and then replayed from the same start, in a new pool each time, in
turn: uniformly random ones, and those of a policy trained for a while. What counts is the processor time of the pool's
threads for a step of one environment, which does not depend on who waits for whom.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from _common import console, machine, show_facts, show_table, write_json

import pyppo
from pyppo.envpool_envs import env_spaces, make_envs

SEED = 7
Act = Callable[[np.ndarray], np.ndarray]


def record(env_id: str, num_envs: int, steps: int, act: Act) -> list[np.ndarray]:
    """Actions `[num_envs, ...]` of some steps from the start."""
    with closing(make_envs(env_id, num_envs, seed=SEED, num_threads=1)) as envs:
        obs, _ = envs.reset()
        actions = []
        for _ in range(steps):
            actions.append(np.array(act(obs)))
            obs = envs.step(actions[-1])[0]
    return actions


def replay(env_id: str, actions: list[np.ndarray]) -> float:
    """Processor time of the pool's threads, microseconds a step of one environment."""
    with closing(make_envs(env_id, len(actions[0]), seed=SEED, num_threads=1)) as envs:
        envs.reset()
        before = time.process_time() - time.thread_time()  # of all threads but this one
        for action in actions:
            envs.step(action)
        spent = time.process_time() - time.thread_time() - before
    return 1e6 * spent / (len(actions) * len(actions[0]))


def sequences(env_id: str, num_envs: int, steps: int, trained: int) -> dict[str, list[np.ndarray]]:
    """The actions to replay, by what chose them."""
    _, space = env_spaces(env_id, {})
    space.seed(SEED)
    result = pyppo.train(env_id, total_timesteps=trained, run_dir=None, quiet=True, seed=1)
    choices: dict[str, Act] = {
        "random": lambda obs: np.stack([space.sample() for _ in range(num_envs)]),
        "policy": lambda obs: result.policy.act(obs, deterministic=False),
    }
    return {name: record(env_id, num_envs, steps, act) for name, act in choices.items()}


def measure(env_id: str, steps: int, rounds: int, trained: int) -> dict[str, Any]:
    """Both in turn; medians, and the median of the rounds' ratios."""
    actions = sequences(env_id, 8, steps, trained)
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, sequence in actions.items():
            found[name].append(replay(env_id, sequence))
    ratio = statistics.median(p / r for p, r in zip(found["policy"], found["random"], strict=True))
    medians = {f"{name}_us": statistics.median(times) for name, times in found.items()}
    return {"env_id": env_id, **medians, "ratio": ratio, "trained": trained, "steps": steps, "rounds": found}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("envs", nargs="*", metavar="ENV", default=["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"])
    parser.add_argument("--steps", type=int, default=900, help="of each environment, from its start (default: 900)")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--trained", type=int, default=40_000, help="steps that the policy trained (default: 40,000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    facts = machine()
    show_facts("machine", facts)
    found = [measure(env_id, given.steps, given.rounds, given.trained) for env_id in given.envs]
    rows = [[x["env_id"], f"{x['random_us']:.1f}", f"{x['policy_us']:.1f}", f"{x['ratio']:.2f}"] for x in found]
    title = "processor time of a step of one environment, us"
    show_table(title, ["environment", "random actions", "a policy's", "ratio"], rows)
    console.print(f"policies trained for {given.trained:,} steps; medians of {given.rounds} rounds")
    write_json(given.json, {"environments": found, "machine": facts})


if __name__ == "__main__":
    main()
