"""How much faster is training than other people's loops, on the same environment, settings and cores?

    python bench/rivals.py [NAME ...] [--rounds N] [--sb3 FOLDER] [--rival "NAME=COMMAND"] [--json FILE]

Each round measures pyppo, then each rival, in turn. Stable-Baselines3 comes from PyPI, in a virtual environment of its
own (made in FOLDER the first time); with torch on one thread and on two, on EnvPool and, for classic control, on
gymnasium's own environments: the round's best counts. Any other loop is a command, whose last line of output must be
JSON with "steps_per_second". {env_id}, {num_envs}, {num_steps}, {minibatch_size} and every other field of `Config`,
{seconds} and {config} (all fields, as JSON) are put into it:

    --rival "mine=python loop.py --env {env_id} --num-envs {num_envs} --num-steps {num_steps}"
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import console, machine, parse_fields, show_facts, show_table, warn_if_busy, write_json
from train import SETTINGS, Training

import pyppo

SB3 = "stable-baselines3==2.9.2"
CLASSIC_CONTROL = ("Acrobot", "CartPole", "MountainCar", "Pendulum")
DEFAULT = ("CartPole-64x128", "HalfCheetah-8x256", "HalfCheetah-64x256")


def sb3_python(folder: Path) -> Path:
    """The interpreter of the environment in `folder`, which is made unless it is there."""
    python = folder / "bin" / "python"
    if not python.exists():
        console.print(f"installing {SB3} in {folder}")
        venv.create(folder, with_pip=True)
        packages = [SB3, f"torch=={torch.__version__.partition('+')[0]}", "envpool>=1.2,<2"]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    return python


def sb3_commands(python: Path, config: pyppo.Config, seconds: float) -> list[list[str]]:
    """The ways to run it; which is fastest depends on the sizes."""
    kinds = (
        ["envpool", "dummy"] if config.env_id.startswith(CLASSIC_CONTROL) and not config.env_options else ["envpool"]
    )
    loop = [str(python), str(Path(__file__).parent / "sb3_loop.py"), json.dumps(config.to_dict())]
    threads = range(1, min(2, len(os.sched_getaffinity(0))) + 1)
    return [[*loop, "--envs", kind, "--threads", str(n), "--seconds", str(seconds)] for kind in kinds for n in threads]


def filled(command: str, config: pyppo.Config, seconds: float) -> list[str]:
    """The words of a rival's command with this run's settings in them."""
    fields = config.to_dict()
    values = {**fields, "minibatch_size": config.minibatch_size, "seconds": seconds, "config": json.dumps(fields)}
    return [word.format(**values) for word in shlex.split(command)]


def speed_of(command: Sequence[str]) -> float:
    """Steps a second, as the command's last line says."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    try:
        if done.returncode:
            raise ValueError(f"exit status {done.returncode}")
        return float(json.loads(lines[-1])["steps_per_second"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise SystemExit(f"{shlex.join(command[:2])} … gave no steps_per_second ({error}):\n{tail}") from error


def measure(
    name: str, config: pyppo.Config, rivals: Mapping[str, Sequence[Sequence[str]]], rounds: int, seconds: float
) -> dict[str, Any]:
    """Steps a second of every contender, round by round; a rival of several commands counts with its best."""
    training, found = Training(config, warmup=2), []
    for _ in range(rounds):
        row = {"pyppo": training.measure(seconds)["steps_per_second"]}
        for rival, commands in rivals.items():
            row[rival] = max(speed_of(command) for command in commands)
        found.append(row)
    training.trainer.close()
    median = {contender: statistics.median(row[contender] for row in found) for contender in found[0]}
    ratio = {rival: statistics.median(row["pyppo"] / row[rival] for row in found) for rival in rivals}
    return {"name": name, "steps_per_second": median, "ratio": ratio, "rounds": found, "config": config.to_dict()}


def show(results: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for result in results:
        for rival, ratio in result["ratio"].items():
            speeds = [result["steps_per_second"][contender] for contender in ("pyppo", rival)]
            least = min(row["pyppo"] / row[rival] for row in result["rounds"])
            rows.append([result["name"], rival, *(f"{speed:,.0f}" for speed in speeds), f"{ratio:.1f}", f"{least:.1f}"])
    show_table("training, steps/s", ["setting", "<rival", "pyppo", "rival's", "times", "at least"], rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(SETTINGS)}, or an environment "
                        f"with its preset (default: {', '.join(DEFAULT)})")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--seconds", type=float, default=4.0, help="training time of a contender's round (default: 4)")
    folder = Path(tempfile.gettempdir()) / "pyppo-bench-sb3"
    parser.add_argument("--sb3", type=Path, default=folder, metavar="FOLDER", help="virtual environment of "
                        "Stable-Baselines3, made if missing (default: %(default)s)")  # fmt: skip
    parser.add_argument("--no-sb3", action="store_true", help="only the rivals given")
    parser.add_argument("--rival", action="append", default=[], metavar="NAME=COMMAND", help="another loop")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of Config for all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    given = parser.parse_args(arguments)
    if any("=" not in rival for rival in given.rival):
        parser.error("--rival must be NAME=COMMAND")
    if given.no_sb3 and not given.rival:
        parser.error("there is no rival: --no-sb3 needs --rival")
    return given


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    facts = machine()
    show_facts("machine", facts)
    warn_if_busy(facts)
    python = None if given.no_sb3 else sb3_python(given.sb3)
    others = dict(rival.split("=", 1) for rival in given.rival)
    results = []
    for name in given.names or DEFAULT:
        config = pyppo.Config.for_env(**{**SETTINGS.get(name, {"env_id": name}), **parse_fields(given.set)})
        rivals = {} if python is None else {SB3: sb3_commands(python, config, given.seconds)}
        rivals |= {rival: [filled(command, config, given.seconds)] for rival, command in others.items()}
        results.append(measure(name, config, rivals, given.rounds, given.seconds))
    show(results)
    write_json(given.json, {"machine": facts, "settings": results})


if __name__ == "__main__":
    sys.exit(main())
