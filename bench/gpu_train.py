"""How fast is training with the policy on a GPU: captured graphs against eager torch, and against the environments.

    python bench/gpu_train.py NAME ... [--device cuda] [--seconds S] [--json FILE] [--set FIELD=VALUE ...]

HalfCheetah-v4 and CartPole-v1: 1,024 environments x 128 steps, 32 minibatches, 10 and 4 epochs; each with the engines
cuda_graph and torch: the time of an update, the rows a second of the whole loop, and those of the environments alone
with random actions. Pong-v5: CleanRL's settings, beside a plain eager loop with the same (bench/_plain_atari.py). Where
EnvPool is not installed, stand-ins of the same shapes take its place, and only the updates are compared.

bench/gpu.py runs each NAME in a process of its own. With `--device cpu` the engine torch, the plain loop and the
environments run without a GPU, which says nothing about one; graphs need one, so the exit status is 1. What could not
be measured is in the results with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyppo

ENGINES = ("cuda_graph", "torch")
LARGE: dict[str, Any] = {"num_envs": 1024, "num_steps": 128, "num_minibatches": 32, "run_dir": None}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    name: [{"env_id": name, **LARGE, "update_epochs": epochs} for epochs in (10, 4)]
    for name in ("HalfCheetah-v4", "CartPole-v1")
}
SETTINGS["Pong-v5"] = [{"env_id": "Pong-v5", "run_dir": None}]  # the preset: CleanRL's ppo_atari_envpool.py
TARGETS = {"update_ratio": 5.0, "share_of_environments": 0.8, "against_plain_loop": 3.0}


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it could not be: one part's failure takes no other's figures along."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".split("\n")[0]}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


HAS_ENVPOOL = importlib.util.find_spec("envpool") is not None
NO_ENVPOOL = "EnvPool is not installed: the environments are stand-ins of the same shapes"


def own_environments(config: pyppo.Config) -> Any:
    """None: EnvPool's, which the trainer makes."""
    if HAS_ENVPOOL:
        return None
    from _stand_ins import StandIns

    return StandIns(config.env_id, config.num_envs)


def train_with(engine: str, settings: dict[str, Any], device: str, seconds: float) -> dict[str, Any]:
    """Rows a second of the whole loop, and the median seconds of its phases, of iterations after two that warm up."""
    config = pyppo.Config.for_env(**{**settings, "engine": engine, "device": device, "total_timesteps": 10**12})
    trainer = pyppo.Trainer(config, own_environments(config), quiet=True)
    try:
        for _ in range(2):
            trainer.step()
        rows = []
        trainer.clock.start()
        start = time.perf_counter()
        while len(rows) < 3 or time.perf_counter() - start < seconds:
            rows.append(trainer.step())
        synchronize(device)
        elapsed = time.perf_counter() - start
        phases = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name.startswith("time_")}
        return {
            "rows_per_second": len(rows) * config.batch_size / elapsed,
            "minibatch_us": 1e6 * phases["time_update"] / statistics.median(row["updates"] for row in rows),
            **phases, "iterations": len(rows), "engine": type(trainer.engine).__name__,
            "stepping": str(trainer.stepping.way) if trainer.stepping else "",
        }  # fmt: skip
    finally:
        trainer.close()


def environments_alone(settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Rows a second with random actions, in the fastest way that bench/train.py knows."""
    if not HAS_ENVPOOL:
        raise RuntimeError(NO_ENVPOOL)
    import train

    config = pyppo.Config.for_env(**settings)
    speeds = {way: pool.rows_per_second(seconds / 2) for way, pool in train.pools(config).items()}
    best = max(speeds, key=lambda way: speeds[way])
    return {"rows_per_second": speeds[best], "way": best}


def plain_loop(settings: dict[str, Any], device: str, seconds: float) -> dict[str, Any]:
    """Rows a second of the eager Atari loop, after one iteration that warms up."""
    from _plain_atari import PlainAtari

    config = pyppo.Config.for_env(**settings)
    envs, num_actions = own_environments(config), 6
    if envs is None:
        import envpool

        made = {"num_envs": config.num_envs, "seed": 1, **config.env_options}
        envs = envpool.make(config.env_id, env_type="gymnasium", **made)
        num_actions = int(envs.action_space.n)
    loop, count = PlainAtari(config, envs, num_actions, device), 0
    loop()
    synchronize(device)
    start = time.perf_counter()
    while count < 2 or time.perf_counter() - start < seconds:
        loop()
        synchronize(device)
        count += 1
    return {"rows_per_second": count * config.batch_size / (time.perf_counter() - start), "iterations": count}


def ratio(over: dict[str, Any], under: dict[str, Any], key: str) -> float | None:
    """Of one figure of two measurements; None where either failed."""
    return over[key] / under[key] if key in over and under.get(key) else None


def measure(settings: dict[str, Any], device: str, seconds: float) -> dict[str, Any]:
    """All of one setting, with the ratios that have targets."""
    result: dict[str, Any] = {"settings": settings, "environments": "EnvPool" if HAS_ENVPOOL else NO_ENVPOOL}
    for engine in ENGINES:
        result[engine] = attempt(lambda engine=engine: train_with(engine, settings, device, seconds))
    result["alone"] = attempt(lambda: environments_alone(settings, seconds))
    ours = result["cuda_graph"]
    result["update_ratio"] = ratio(result["torch"], ours, "time_update")
    result["share_of_environments"] = ratio(ours, result["alone"], "rows_per_second")
    if settings["env_id"] == "Pong-v5":
        result["plain"] = attempt(lambda: plain_loop(settings, device, seconds))
        result["against_plain_loop"] = ratio(ours, result["plain"], "rows_per_second") if HAS_ENVPOOL else None
    return result


def show(result: dict[str, Any]) -> None:
    settings = result["settings"]
    print(f"\n{settings['env_id']}, {settings.get('update_epochs', 'preset')} epochs; {result['environments']}")
    for part in (*ENGINES, "alone", "plain"):
        if part not in result:
            continue
        found = result[part]
        if "error" in found:
            print(f"  {part:12} not measured: {found['error']}")
            continue
        update = f", update {1e3 * found['time_update']:.2f} ms" if "time_update" in found else ""
        print(f"  {part:12} {found['rows_per_second']:12,.0f} rows/s{update}")
    for name, target in TARGETS.items():
        if name in result:
            found = result[name]
            print(f"  {name:24} {'not measured' if found is None else f'{found:.2f}'} (target {target:g})")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=SETTINGS, metavar="NAME", help=f"which of {', '.join(SETTINGS)}")
    parser.add_argument("--device", default="cuda", help="where the policy is (default: cuda)")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each part is measured (default: 8)")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of Config for all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("bench/gpu_train.py needs a CUDA device: torch.cuda.is_available() is False here. Nothing was run.")
        return 2
    if given.device == "cpu":
        print("on the CPU: this shows that the code runs, and says nothing about a GPU")
    changes, results = {}, []
    if given.set:
        from _common import parse_fields  # needs more packages than a machine for measuring may have

        changes = parse_fields(given.set)
    for name in given.names:
        for settings in SETTINGS[name]:
            results.append(measure({**settings, **changes}, given.device, given.seconds))
            show(results[-1])
            if given.json:  # after each, so that what was measured outlives what comes after
                given.json.write_text(json.dumps({"device": given.device, "settings": results}, indent=2) + "\n")
    return 1 if any("error" in result[engine] for result in results for engine in ENGINES) else 0


if __name__ == "__main__":
    sys.exit(main())
