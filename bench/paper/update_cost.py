"""What does an update cost: PPO, TRPO, A2C, vanilla policy gradient? In turn, in one process, on the same rollout.

    python bench/paper/update_cost.py [--env HalfCheetah-v4] [--seconds 30] [--json FILE]

A policy is trained for some iterations; each algorithm then updates copies of it from the same rollout of 2,048 rows
over and over, and from as many of these rows as its own rollouts have. One thread each.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import a2c
import torch
import trpo
import vpg
from _command import check_writable, positive
from _common import alternate, console, machine, show_facts, show_table, warn_if_busy, write_json
from _runs import commit
from table1_settings import ENVIRONMENTS, SETTINGS
from tables import ROOT

import pyppo
from pyppo import ops
from pyppo.engines import Schedule, valid_indices
from pyppo.engines.native_engine import NativeEngine
from pyppo.engines.torch_engine import TorchEngine
from pyppo.rollout import Rollout

MakeEngine = Callable[..., Any]


class TRPOPolicyOnly(trpo.TRPOEngine):
    """TRPO's step of the policy, without the fit of the critic."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.fit_critic = lambda data, iteration: 0.0  # type: ignore[assignment]


# Title, fields, and the engine of a policy, settings, device and distribution.
CONTENDERS: dict[str, tuple[str, Mapping[str, Any], MakeEngine]] = {
    "ppo native": ("PPO, native engine", SETTINGS["X"], NativeEngine),
    "ppo torch": ("PPO, torch engine", SETTINGS["X"], TorchEngine),
    "trpo": ("TRPO", trpo.FIELDS, lambda *given: trpo.TRPOEngine(*given, trpo.Settings())),
    "trpo policy": ("TRPO, its policy alone", trpo.FIELDS, lambda *given: TRPOPolicyOnly(*given, trpo.Settings())),
    "a2c": ("A2C", a2c.FIELDS, lambda *given: a2c.A2CEngine(*given, a2c.Settings())),
    "vpg": ("vanilla PG, adaptive", vpg.FIELDS, lambda *given: vpg.VPGEngine(*given, vpg.Settings())),
}


def collect(env_id: str, iterations: int) -> tuple[pyppo.Trainer, dict[str, torch.Tensor]]:
    """A trainer whose rollout is ready to learn from, and the policy's state that collected it."""
    config = pyppo.Config(env_id=env_id, **{**SETTINGS["X"], "total_timesteps": 1_000_000})
    with pyppo.Trainer(config, quiet=True) as trainer:
        for _ in range(iterations):
            before = copy.deepcopy(trainer.policy.state_dict())
            trainer.step()
    return trainer, before


def first_steps(source: Rollout, num_steps: int, obs_space: Any, action_space: Any) -> Rollout:
    """The first steps of a rollout as a rollout of their own, advantages normalised over its valid rows."""
    part = Rollout(num_steps, source.num_envs, obs_space, action_space)
    for name in ("actions", "logp", "rewards", "terminated", "truncated", "valid", "advantages", "returns"):
        getattr(part, name).copy_(getattr(source, name)[:num_steps])
    part.values.copy_(source.values[: num_steps + 1])
    for name, x in part.obs.items():
        x.copy_(source.obs[name][: num_steps + 1])
    rows = part.advantages.view(-1)[valid_indices(part.valid)]
    part.advantages.sub_(rows.mean()).div_(rows.std() + 1e-8)
    return part


def make_update(name: str, trainer: pyppo.Trainer, before: Mapping[str, torch.Tensor], rollout: Rollout) -> Any:
    """A function of no argument: the policy as it collected, then one update of it."""
    _, fields, make = CONTENDERS[name]
    policy = copy.deepcopy(trainer.policy)
    policy.load_state_dict(before)
    config = pyppo.Config(env_id=trainer.config.env_id, total_timesteps=1_000_000, **fields)
    engine = make(policy, config, torch.device("cpu"), trainer.policy.distribution)
    start = engine.flat.data.clone()
    schedule = Schedule(config.learning_rate, config.clip_coef, config.ent_coef, config.kl_coef)

    def update() -> dict[str, float]:
        engine.flat.data.copy_(start)
        engine.flat.written()
        return engine.update(rollout, schedule, 0)

    return update


def measure(env_id: str, seconds: float, iterations: int) -> dict[str, Any]:
    """Milliseconds of each update."""
    trainer, before = collect(env_id, iterations)
    spaces = trainer.groups[0].obs_space, trainer.groups[0].action_space
    most = trainer.config.num_steps
    steps = {name: fields["num_steps"] for name, (_, fields, _) in CONTENDERS.items()}
    rollouts = {length: first_steps(trainer.rollout, length, *spaces) for length in {most, *steps.values()}}
    # All in turn, on rollouts of either length; what has the same length in both is timed once.
    cells = {(name, length) for name in CONTENDERS for length in (most, steps[name])}
    updates = {
        f"{name}, {length}": make_update(name, trainer, before, rollouts[length]) for name, length in sorted(cells)
    }
    check(updates)
    timings = alternate(updates, seconds=seconds)
    num_envs, rows = trainer.config.num_envs, []
    for name, (title, _, _) in CONTENDERS.items():
        own_rows, own = num_envs * steps[name], timings[f"{name}, {steps[name]}"].median
        rows.append({"name": name, "title": title, "same_ms": 1e3 * timings[f"{name}, {most}"].median,
                     "own_rows": own_rows, "own_ms": 1e3 * own, "own_seconds_1m": own * 1e6 / own_rows})  # fmt: skip
    samples = min(timing.samples for timing in timings.values())
    return {"env_id": env_id, "rows_same": trainer.config.batch_size, "samples": samples, "rows": rows}


def milliseconds(ms: float) -> str:
    """With the digits that mean something."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def cost_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the table of what `measure` gave."""
    columns = ["update", f"ms, same {found['rows_same']:,} rows", "rows of its own", "ms on these", "s in 1M steps"]
    lines = [
        [one["title"], milliseconds(one["same_ms"]), f"{one['own_rows']:,}", milliseconds(one["own_ms"]),
         f"{one['own_seconds_1m']:,.0f}"]
        for one in found["rows"]
    ]  # fmt: skip
    return columns, lines


def check(updates: Mapping[str, Callable[[], Mapping[str, float]]]) -> None:
    """An update that takes no step would cost nothing and mean nothing."""
    if idle := [name for name, update in updates.items() if not update()["updates"] > 0]:
        raise RuntimeError(f"these took no step: {', '.join(idle)}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v4", choices=ENVIRONMENTS, metavar="ENV")
    parser.add_argument("--seconds", type=float, default=30.0, help="of measuring altogether (default: 30)")
    parser.add_argument("--iterations", type=positive, default=20, help="of PPO before (default: 20)")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/update_cost.json", metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    ops.set_num_threads(1)
    check_writable("--json", given.json)
    facts, measured = machine(), commit()
    show_facts("machine", facts)
    warn_if_busy(facts)
    found = measure(given.env, given.seconds, given.iterations)
    show_table(given.env, *cost_rows(found))
    console.print("docs/results.md takes these through figure3.py --report")
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_json(given.json, {**found, "machine": facts, "date": date, "commit": measured})


if __name__ == "__main__":
    main()
