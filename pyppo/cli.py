"""The command line: train, resume, eval, plot, envs, info, bench. `Config` is the interface of `pyppo train`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from pyppo.config import Config

if TYPE_CHECKING:
    from pyppo.checkpoint import Checkpoint
    from pyppo.trainer import Trainer

_SCORE = "mean of the last 100 training episodes"
_USAGE = """\
usage: pyppo COMMAND ...

  pyppo train ENV [--FIELD VALUE ...]      train; any field of Config is a flag (pyppo train --help)
  pyppo resume RUN [--total-timesteps N]   go on from a run's latest checkpoint
  pyppo eval RUN [--episodes N]            run episodes with a trained policy
  pyppo plot RUN [RUN ...] [--out FILE]    draw learning curves; seeds of one setting become one curve with a band
  pyppo envs [FILTER]                      list EnvPool's environments: what they give and take, or why not
  pyppo info                               versions, build, CPU path and GPU
  pyppo bench [ENV]                        training steps a second and where the time goes

  pyppo COMMAND --help                     more about one of them
  pyppo --version                          the version alone
"""


class _RefusedError(Exception):
    """Something that the user must put right; shown without a traceback."""


_EXPECTED = (ValueError, TypeError, OSError, ImportError)


@contextmanager
def _plainly(errors: tuple[type[Exception], ...] = _EXPECTED) -> Iterator[None]:
    """Turn the library's worded errors into one line. Only around reading arguments and files and making
    environments; in training and evaluation a ValueError is a bug and keeps its traceback."""
    try:
        yield
    except errors as error:
        raise _RefusedError(str(error)) from error


def _make_trainer(config: Config, quiet: bool, resume_from: Checkpoint | None = None) -> Trainer:
    """A trainer. What only the settings can break is tried first, so that whatever breaks after that is a bug."""
    from torch import nn

    from pyppo.actions import Distribution
    from pyppo.engines import make_engine, resolve_device
    from pyppo.envpool_envs import make_envs
    from pyppo.envs import EnvGroup
    from pyppo.parts import make_policy
    from pyppo.trainer import Trainer

    with _plainly():
        resolve_device(config.device, nn.Identity())
        group = EnvGroup(make_envs(config.env_id, 1, config.seed, num_threads=1, options=config.env_options))
        distribution = Distribution.from_space(group.action_space, config.action_bounds)
        make_engine(config, make_policy(config, group.obs_space, distribution), distribution)
        group.close()
    with _plainly((OSError,)):  # a run folder that cannot be written
        return Trainer(config, quiet=quiet, resume_from=resume_from)


def integer(text: str) -> int:
    """As people write one: 1000000, 1_000_000 or 1e6. argparse's messages have this name."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise ValueError(f"{text!r} is no whole number") from None
        return int(value)


_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _integer_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[int] | None:
    """Integer flags are read by `integer`."""
    if info.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda texts: integer(texts[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 if training failed; 2 for what the user must put right; 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        print(_installed_version("pyppo"))
        return 0
    command = _COMMANDS.get(given[0])
    if command is None:
        return _fail(f"no command {given[0]!r}; it must be one of {', '.join(_COMMANDS)}", 2)
    try:
        return command(given[1:])
    except _RefusedError as error:
        return _fail(str(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `pyppo envs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str, status: int) -> int:
    print(f"pyppo: {message}", file=sys.stderr)
    return status


# --- train, resume --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Options:
    """Of the command itself."""

    quiet: bool = False
    """Say nothing but what needs attention."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder (extra: pyppo[tensorboard])."""
    env_option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE: an option of the environment, JSON or else text; may be repeated."""


@dataclasses.dataclass(frozen=True)
class _Settings:
    config: tyro.conf.OmitArgPrefixes[Config]
    options: tyro.conf.OmitArgPrefixes[_Options]


def _train(arguments: list[str]) -> int:
    named = bool(arguments) and not arguments[0].startswith("-")
    if not named and not {"-h", "--help"} & set(arguments):
        raise _RefusedError("ENV is missing; it must come first, as in `pyppo train CartPole-v1`")
    env_id, flags = (arguments[0], arguments[1:]) if named else ("CartPole-v1", arguments)
    with _plainly():
        config, options = _parse_settings(Config.for_env(env_id), flags)
        if not any(re.match(r"--num[-_]minibatches(=|$)", flag) for flag in flags):
            config = config.fit_minibatches()
    if config.env_id != env_id:
        raise _RefusedError(
            f"--env-id is {config.env_id!r}; the environment must be the first argument, {env_id!r} here"
        )
    return _run(_make_trainer(config, options.quiet), options)


def _parse_settings(preset: Config, flags: list[str]) -> tuple[Config, _Options]:
    """`preset` with `flags` in place of its values. Prints help, or what is wrong, and exits where that is due."""
    description = f"Train on {preset.env_id}; the defaults are its preset's. Numbers may be written 1_000_000 or 1e6."
    default = _Settings(preset, _Options())
    with _registry:
        both = tyro.cli(_Settings, prog="pyppo train ENV", description=description, args=flags, default=default)
    env_options = dict(_name_and_value(text) for text in both.options.env_option)
    return both.config.replace(env_options={**preset.env_options, **env_options}), both.options


def _name_and_value(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"--env-option is {text!r}; it must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _resume(arguments: list[str]) -> int:
    parser = _parser("resume", "Go on from a run's latest checkpoint, in the same run folder.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a checkpoint folder in one")
    parser.add_argument("--total-timesteps", type=integer, help="train until this many steps instead")
    parser.add_argument("--quiet", action="store_true", help="say nothing but what needs attention")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files into the run folder")
    given = parser.parse_args(arguments)
    changes = {} if given.total_timesteps is None else {"total_timesteps": given.total_timesteps}
    from pyppo.checkpoint import load_checkpoint, read_config
    from pyppo.policy import BUILT_IN

    with _plainly():
        checkpoint = load_checkpoint(given.run)
        config = read_config(checkpoint.run).replace(**changes)
    own_envs = ", envs=the_environments" if checkpoint.state.get("own_envs") else ""
    if (kind := checkpoint.state["policy"]["class"]) not in BUILT_IN:
        raise _RefusedError(
            f"{given.run} holds a {kind}, a module of your own; go on from Python: "
            f"pyppo.Trainer.resume({str(given.run)!r}, policy=an_instance{own_envs})"
        )
    if own_envs:
        raise _RefusedError(
            f"{given.run} was trained in environments of your own; go on from Python: "
            f"pyppo.Trainer.resume({str(given.run)!r}{own_envs})"
        )
    if (step := checkpoint.state["step"]) >= config.total_timesteps:
        raise _RefusedError(f"{given.run} is complete at step {step:,}; --total-timesteps must be higher to go on")
    return _run(_make_trainer(config, given.quiet, checkpoint), _Options(given.quiet, given.tensorboard))


def _run(trainer: Trainer, options: _Options) -> int:
    """Train, then say what came of it."""
    from pyppo.report import TensorBoard

    with trainer:
        board = None
        if options.tensorboard:
            if trainer.run_dir is None:
                raise _RefusedError("--tensorboard is on and run_dir is None; there must be a run folder to write into")
            with _plainly():
                board = TensorBoard(trainer.run_dir / "tensorboard")
            trainer.callbacks.append(board)
        with _told_to_end():
            result = trainer.train()
        if board is not None:
            board.close()
    if not options.quiet and result.history:
        score, seconds = result.history["episode_return"][-1], result.history["time"][-1]
        where = f"; run folder {result.run_dir}" if result.run_dir else ""
        said = "no episode finished yet" if math.isnan(score) else f"return {score:.1f} ({_SCORE})"
        print(f"{said} after {seconds:.0f} s{where}")
    return 130 if result.interrupted else 0


@contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM and SIGHUP, with which schedulers and closed terminals end a program, as `SystemExit`: training saves.

    Not where they are ignored, as under `nohup`, nor where they cannot be caught, which is outside of the main thread.
    """

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
        before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    except SystemExit as error:
        for note in getattr(error, "__notes__", ()):
            print(f"pyppo: {note}", file=sys.stderr)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the other commands ---------------------------------------------------------------------------------------------


def _eval(arguments: list[str]) -> int:
    parser = _parser("eval", "Run whole episodes with a trained policy in environments of their own.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a checkpoint folder in one")
    parser.add_argument("--env", help="another environment than the one trained on")
    parser.add_argument("--episodes", type=integer, default=10, help="how many (default: 10)")
    parser.add_argument("--num-envs", type=integer, help="environments side by side")
    parser.add_argument("--seed", type=integer, default=0, help="of the environments and the noise (default: 0)")
    parser.add_argument("--stochastic", action="store_true", help="sample actions instead of taking the mode")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    for name in ("episodes", "num_envs"):
        if (count := getattr(given, name)) is not None and count < 1:
            raise _RefusedError(f"--{name.replace('_', '-')} is {count}; it must be at least 1")
    from pyppo.evaluation import evaluate, load_policy, make_group

    with _plainly():
        policy = load_policy(given.run)
        group = make_group(policy, given.env, given.num_envs or min(given.episodes, 16), given.seed)
    try:
        result = evaluate(
            policy, envs=group, episodes=given.episodes, deterministic=not given.stochastic, seed=given.seed
        )
    finally:
        group.close()
    if given.json:
        figures = {"mean": result.mean, "std": result.std}
        print(json.dumps({**figures, "returns": result.returns.tolist(), "lengths": result.lengths.tolist()}))
    else:
        print(f"return {result.mean:.2f} ± {result.std:.2f} over {given.episodes} episodes", end=" ")
        print(f"(lowest {result.returns.min():.2f}, highest {result.returns.max():.2f})")
    return 0


def _plot(arguments: list[str]) -> int:
    parser = _parser("plot", "Draw learning curves. Runs that differ only in the seed become one curve with a band.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("curve.png"), help="picture to write (default: curve.png)")
    given = parser.parse_args(arguments)
    with _plainly():
        from pyppo.plot import plot_runs

        print(plot_runs(given.runs, given.out))
    return 0


def _envs(arguments: list[str]) -> int:
    parser = _parser(
        "envs", "List EnvPool's environments: what they give and take, or why they cannot be trained here."
    )
    parser.add_argument(
        "filter", nargs="?", default="", metavar="FILTER", help="part of a name or family, or a pattern with * and ?"
    )
    parser.add_argument("--families", action="store_true", help="count them by family instead")
    given = parser.parse_args(arguments)
    with _plainly():
        from pyppo.catalog import describe, find

        found = describe(find(given.filter))
    if not found:
        raise _RefusedError(f"no environment fits {given.filter!r}; `pyppo envs` lists them all")
    rows: list[tuple[str, ...]]
    if given.families:
        families: dict[str, list[bool]] = {}
        for env in found:
            families.setdefault(env.family, []).append(env.why_not == "")
        rows = [(family, f"{sum(can)} of {len(can)} can be trained") for family, can in sorted(families.items())]
    else:
        rows = [
            (
                env.name,
                env.family,
                f"not here: {env.why_not}" if env.why_not else f"{env.observations} -> {env.actions}",
            )
            for env in found
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _info(arguments: list[str]) -> int:
    parser = _parser("info", "Versions, how the extension was built, the CPU path in use, and what the GPU side finds.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    with _plainly():
        facts = _facts()
    if given.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    return 0


def _facts() -> dict[str, Any]:
    import torch

    import pyppo
    from pyppo import ops

    facts: dict[str, Any] = {"pyppo": pyppo.__version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "gymnasium", "envpool", "safetensors", "matplotlib", "tensorboard"):
        facts[name] = _installed_version(name)
    facts["machine"] = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores usable"
    facts["CPU path"] = f"{ops.cpu_capability()}, {ops.get_num_threads()} threads"
    facts |= {f"build: {name}": _plain_fact(name, value) for name, value in ops.build_info().items()}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts["torch CUDA"] = torch.version.cuda or "not in this torch"
    facts["GPUs"] = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none that torch can use"
    return facts


def _plain_fact(name: str, value: Any) -> Any:
    """CUDA packs a version into an integer, 13020 for 13.2; nothing at all is a dash."""
    if name in ("cuda_runtime_version", "cuda_driver_version") and isinstance(value, int):
        return f"{value // 1000}.{value % 1000 // 10}" if value else "-"
    return "-" if value == "" else value


def _installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _bench(arguments: list[str]) -> int:
    parser = _parser("bench", "Measure training with an environment's preset: steps a second, and the time's shares.")
    parser.add_argument(
        "env", nargs="?", default="CartPole-v1", metavar="ENV", help="environment (default: CartPole-v1)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure (default: 10)")
    parser.add_argument("--num-envs", type=integer, help="environments side by side, instead of the preset's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    if not given.seconds > 0:
        raise _RefusedError(f"--seconds is {given.seconds}; it must be above 0")
    with _plainly():
        changes = {} if given.num_envs is None else {"num_envs": given.num_envs}
        # Far from its end, so that the schedules stand still.
        config = Config.for_env(given.env, run_dir=None, total_timesteps=10**12, **changes)
    with _make_trainer(config, quiet=True) as trainer:
        figures = _throughput(trainer, given.seconds)
    if given.json:
        print(json.dumps(figures))
    else:
        print(f"{config.env_id}, {config.num_envs} x {config.num_steps}: {figures['sps']:,.0f} steps/s,", end=" ")
        print(f"{figures['minibatch_us']:,.0f} us a minibatch of {config.minibatch_size}")
        print("  ".join(f"{name} {share:.0%}" for name, share in figures["shares"].items()))
    return 0


def _throughput(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """Iterate for `seconds` after two iterations of warm-up; speed, and each phase's share of the time."""
    for _ in range(2):
        trainer.step()
    rows: list[tuple[dict[str, float], float]] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or not rows:
        rows.append((trainer.step(), trainer.history["step"][-2]))
    phases = [name for name in rows[0][0] if name.startswith("time_")]
    spent = {name.removeprefix("time_"): sum(row[name] for row, _ in rows) for name in phases}
    total = sum(spent.values())
    return {
        "env_id": trainer.config.env_id,
        "num_envs": trainer.config.num_envs,
        "sps": sum(row["step"] - before for row, before in rows) / total,
        "minibatch_us": 1e6 * spent["update"] / sum(row["updates"] for row, _ in rows),
        "shares": {name: value / total for name, value in spent.items()},
    }


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"pyppo {command}", description=description)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "resume": _resume,
    "eval": _eval,
    "plot": _plot,
    "envs": _envs,
    "info": _info,
    "bench": _bench,
}


if __name__ == "__main__":
    sys.exit(main())
