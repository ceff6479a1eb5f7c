"""What does one minibatch's update cost? NativeEngine, TorchEngine, and plain torch as CleanRL writes it.

    python bench/update.py [--quick] [--groups update wide act] [--json FILE]

An update here is one epoch over as many minibatches as a preset has (fewer where layers are wide): gather, forward,
loss with metrics, backward, clipping, Adam; its time is divided by their number. Kernels and torch have the same number
of threads. "of peak": the multiply-adds of the layers' three products a second, over those of torch's product of two
1024 x 1024 matrices on one thread, times the threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _baselines import ENT_COEF, PlainUpdate
from _common import (
    Contender,
    Timing,
    alternate,
    console,
    machine,
    microseconds,
    show_facts,
    show_table,
    warn_if_busy,
    write_json,
)
from gymnasium import spaces
from kernels import Target, figure, least_ratio, times_faster

import pyppo
from pyppo import ops
from pyppo.actions import Distribution
from pyppo.engines import Engine, Schedule, make_engine
from pyppo.policy import MLPPolicy
from pyppo.rollout import Rollout

NATIVE, TORCH, PLAIN = "NativeEngine", "TorchEngine", "plain torch"
BATCHES = (64, 256, 512, 2048)
WIDE_BATCHES = (256, 2048)
WIDTHS = (128, 256, 512, 1024)
ROWS = (1, 8, 64, 1024)
STEPS = 32  # of a rollout; each is a minibatch
LEARNING_RATE = 1e-6  # the same few rows again and again: nothing may run away


class Network(NamedTuple):
    """Layers of the actor; the critic's are the same, with one output. Continuous: a diagonal Gaussian."""

    inputs: int
    hidden: tuple[int, ...]
    outputs: int
    continuous: bool

    def __str__(self) -> str:
        layers = "-".join(map(str, (self.inputs, *self.hidden, self.outputs)))
        return f"{layers} {'normal' if self.continuous else 'categorical'}"

    def products(self) -> int:
        """Multiply-adds of one row: outputs, inputs' gradients but those of the features, weights' gradients."""
        total = 0
        for outputs in (self.outputs, 1):
            sizes = [a * b for a, b in pairwise((self.inputs, *self.hidden, outputs))]
            total += 3 * sum(sizes) - sizes[0]
        return total


NETWORKS = (Network(17, (64, 64), 6, True), Network(4, (64, 64), 2, False))


# --- what is measured -----------------------------------------------------------------------------------------------


def make(network: Network, name: str, num_envs: int, num_steps: int, num_minibatches: int) -> tuple[Engine, Rollout]:
    """An engine, and a rollout that it acted in; any two of the same sizes are equal."""
    config = pyppo.Config(
        "none", num_envs=num_envs, num_steps=num_steps, num_minibatches=num_minibatches, update_epochs=1, engine=name,
        ent_coef=ENT_COEF, device="cpu", run_dir=None,
    )  # fmt: skip
    unbounded = spaces.Box(-np.inf, np.inf, (network.inputs,), np.float32)
    space = spaces.Box(-1.0, 1.0, (network.outputs,), np.float32) if network.continuous else \
        spaces.Discrete(network.outputs)  # fmt: skip
    distribution = Distribution.from_space(space)
    policy = MLPPolicy(spaces.Dict(obs=unbounded), distribution, hidden_sizes=network.hidden)
    engine = make_engine(config, policy, distribution)
    rollout = Rollout(num_steps, num_envs, unbounded, space)
    random = torch.Generator().manual_seed(0)
    rollout.obs["obs"].normal_(generator=random)
    for t in range(num_steps):
        engine.act(rollout, t, slice(0, num_envs))
    rollout.advantages.normal_(generator=random)
    rollout.returns.normal_(generator=random)
    rollout.valid[:] = True
    return engine, rollout


def updater(engine: Engine, rollout: Rollout, learning_rate: float = LEARNING_RATE) -> Contender:
    """One epoch over the rollout."""
    schedule = Schedule(learning_rate, clip_coef=0.2, ent_coef=ENT_COEF, kl_coef=0.0)
    return lambda: engine.update(rollout, schedule, 0)


def plain_update(
    network: Network, engine: Engine, rollout: Rollout, minibatches: int, learning_rate: float = LEARNING_RATE
) -> PlainUpdate:
    """Plain torch on the same rows, with the same weights."""
    columns = (rollout.actions, rollout.logp, rollout.advantages, rollout.returns, rollout.values[:-1])
    data = [x.flatten(0, 1).clone() for x in (rollout.obs["obs"][:-1], *columns)]
    plain = PlainUpdate(
        network.inputs, network.hidden, network.outputs, continuous=network.continuous, data=data,
        minibatches=minibatches, learning_rate=learning_rate,
    )  # fmt: skip
    plain.actor.load_state_dict(engine.policy.actor.state_dict())
    plain.critic.load_state_dict(engine.policy.critic.state_dict())
    return plain


def check_equal(network: Network) -> None:
    """Before timing: one step of each leads to the same parameters."""
    rate, reached = 1e-3, {}
    for name in ("native", "torch"):
        engine, rollout = make(network, name, 64, 2, 1)
        plain = plain_update(network, engine, rollout, 1, rate)
        updater(engine, rollout, rate)()
        reached[name] = [*engine.policy.actor.parameters(), *engine.policy.critic.parameters()]
    plain()
    reached[PLAIN] = [*plain.actor.parameters(), *plain.critic.parameters()]
    for name, parameters in reached.items():
        for x, y in zip(parameters, reached["native"], strict=True):
            if not torch.allclose(x, y, rtol=0, atol=0.02 * rate):
                raise AssertionError(f"{network}: NativeEngine and {name} differ")


def set_threads(threads: int) -> None:
    ops.set_num_threads(threads)
    torch.set_num_threads(threads)


def peak(seconds: float) -> float:
    """Multiply-adds a second, in 1e9, of torch's product of two dense matrices on one thread."""
    size, before = 1024, torch.get_num_threads()
    torch.set_num_threads(1)
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    timing = alternate({"product": lambda: torch.mm(a, b, out=out)}, seconds=seconds)["product"]
    torch.set_num_threads(before)
    return size**3 / timing.minimum / 1e9


# --- rows of the tables ---------------------------------------------------------------------------------------------


def update_row(
    network: Network, batch: int, threads: int, *, steps: int, plain: bool, peak: float, seconds: float
) -> dict[str, Any]:
    """The contenders at one size."""
    set_threads(threads)
    contenders: dict[str, Contender] = {}
    for name, key in ((NATIVE, "native"), (TORCH, "torch")):
        engine, rollout = make(network, key, batch, steps, steps)
        contenders[name] = updater(engine, rollout)
    if plain:
        contenders[PLAIN] = plain_update(network, engine, rollout, steps)
    times = {
        name: Timing(t.median / steps, t.minimum / steps, t.samples)
        for name, t in alternate(contenders, seconds=seconds).items()
    }
    rate = {name: batch * network.products() / t.median / 1e9 for name, t in times.items()}
    rival = PLAIN if plain else TORCH
    return {
        "case": str(network),
        "batch": batch,
        "threads": threads,
        **figures(times, targets_of(network, batch, threads)),
        "times_rival": {name: least_ratio(times[rival], t) for name, t in times.items() if name != rival},
        "gmacs": rate,
        "of_peak": {name: value / (peak * threads) for name, value in rate.items()},
    }


def targets_of(network: Network, batch: int, threads: int) -> list[Target]:
    if network == NETWORKS[0]:
        return [times_faster(NATIVE, PLAIN, 15)] if (batch, threads) == (64, 1) else []
    return [times_faster(NATIVE, TORCH, 0.8)] if max(network.hidden) >= 256 else []


def act_row(network: Network, rows: int, threads: int, seconds: float) -> dict[str, Any]:
    """One step's actions, log-probs and values of so many environments."""
    set_threads(threads)
    contenders: dict[str, Contender] = {}
    for name, key in ((NATIVE, "native"), (TORCH, "torch")):
        engine, rollout = make(network, key, rows, 2, 1)
        contenders[name] = lambda engine=engine, rollout=rollout: engine.act(rollout, 1, slice(0, rows))
    times = alternate(contenders, seconds=seconds)
    ratio = {NATIVE: least_ratio(times[TORCH], times[NATIVE])}
    return {"case": str(network), "rows": rows, "threads": threads, **figures(times, []), "times_rival": ratio}


def figures(times: Mapping[str, Timing], targets: Sequence[Target]) -> dict[str, Any]:
    """Times as JSON values, and whether they are what they must be."""
    return {
        "us": {name: 1e6 * t.median for name, t in times.items()},
        "us_min": {name: 1e6 * t.minimum for name, t in times.items()},
        "samples": {name: t.samples for name, t in times.items()},
        "targets": [
            {"name": target.name, "target": target.text, "was": was, "pass": passed}
            for target in targets
            for passed, was in [target.check(dict(times))]
        ],
    }


def wide(width: int) -> Network:
    return Network(17, (width, width), 6, True)


def groups(quick: bool, peak: float, seconds: float) -> dict[str, list[Callable[[], dict[str, Any]]]]:
    """The tables' rows, to be measured when their turn comes."""
    threads = (1,) if quick else (1, 2)
    common = {"peak": peak, "seconds": seconds}
    return {
        "update": [
            lambda n=n, b=b, k=k: update_row(n, b, k, steps=STEPS, plain=True, **common)
            for n, b, k in product(NETWORKS[: 1 if quick else None], BATCHES[: 1 if quick else None], threads)
        ],
        "wide": [
            lambda w=w, b=b, k=k: update_row(wide(w), b, k, steps=max(2, 1024 // b), plain=False, **common)
            for w, b, k in product(WIDTHS[: 1 if quick else None], WIDE_BATCHES[: 1 if quick else None], threads)
        ],
        "act": [
            lambda n=n, k=k: act_row(NETWORKS[0], n, k, seconds)
            for n, k in product(ROWS[: 2 if quick else None], threads)
            if k == 1 or n > ROWS[0]
        ],
    }


# --- results --------------------------------------------------------------------------------------------------------

TITLES = {
    "update": "a minibatch's update, actor and critic: microseconds",
    "wide": "wide layers: microseconds a minibatch",
    "act": "acting for so many environments: microseconds a call",
}


def show_group(group: str, results: list[dict[str, Any]]) -> None:
    """One table: a row a contender."""
    rows = []
    for result in results:
        size = [result["case"], str(result.get("batch", result.get("rows"))), str(result["threads"])]
        for i, name in enumerate(result["us"]):
            times = [microseconds(result[key][name] / 1e6) for key in ("us", "us_min")]
            rates = [figure(result[key].get(name)) for key in ("gmacs", "of_peak") if key in result]
            marks = [
                f"{'pass' if t['pass'] else 'FAIL'}  {t['target']}: {t['was']}"
                for t in result["targets"]
                if t["name"] == name
            ]
            ratio = figure(result["times_rival"].get(name))
            rows.append([*(size if i == 0 else [""] * 3), name, *times, ratio, *rates, "\n".join(marks)])
        rows.append([])
    rival = f"x {PLAIN}" if group == "update" else f"x {TORCH}"
    rates = [] if group == "act" else ["GMAC/s", "of peak"]
    columns = ["layers", "rows", "threads", "<who", "us", "least", rival, *rates, "<targets"]
    show_table(TITLES[group], columns, rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small sizes, for a look")
    parser.add_argument("--groups", nargs="+", choices=list(TITLES), default=list(TITLES), help="which tables")
    parser.add_argument("--seconds", type=float, help="measuring time of a row (default: 4; with --quick 0.5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    seconds = given.seconds or (0.5 if given.quick else 4.0)
    torch.manual_seed(0)
    facts = machine()
    show_facts("machine", facts)
    warn_if_busy(facts)
    limit = peak(seconds)
    console.print(f"[bold]peak[/bold]  {limit:.1f} GMAC/s on one thread")
    for network in NETWORKS:
        check_equal(network)
    results: dict[str, list[dict[str, Any]]] = {}
    for group, rows in groups(given.quick, limit, seconds).items():
        if group in given.groups:
            results[group] = [row() for row in rows]
            show_group(group, results[group])
    write_json(given.json, {"machine": facts, "peak_gmacs": round(limit, 2), **results})


if __name__ == "__main__":
    main()
