"""Run folders and checkpoints: safetensors and JSON, written aside and renamed; nothing is pickled.

runs/<env>-<date>-s<seed>/
  config.json                    every field of Config
  metrics.jsonl                  one line an iteration
  checkpoints/latest             name of the newest complete checkpoint
  checkpoints/step-000102400/    model.safetensors, optimizer.safetensors, state.json
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.features import space_to_dict
from pyppo.policy import BUILT_IN, ActorCriticPolicy, policy_from_recipe

FORMAT = "pyppo-checkpoint-1"
KEEP = 3
"""Checkpoints that a run folder holds; older ones are deleted."""
_STATE = ("step", "iteration", "rebuild", "time", "kl_coef", "learning_rate", "episodes", "episodes_total")
# What a run's tensors were shaped and trained by: a resumed run cannot have it otherwise.
_FIXED = (
    "env_id", "num_envs", "norm_obs", "clip_obs", "network", "hidden_sizes", "shared_trunk", "activation",
    "log_std_init", "state_dependent_std", "image_scale", "image_symbols", "recurrent", "recurrent_size",
    "action_bounds", "run_dir",
)  # fmt: skip
_HASHED = {"model.safetensors": "sha256", "optimizer.safetensors": "optimizer_sha256"}


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint folder holds, checked."""

    path: Path
    model: dict[str, Tensor]
    """The policy's `state_dict`, observation statistics included."""
    optimizer: dict[str, Tensor]
    """What training needs besides the policy: moments, step counters, reward statistics."""
    state: dict[str, Any]
    """JSON values: counters, schedules, the recipe of the policy, `sha256` of its parameters, `optimizer_sha256`."""

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.path.parent.parent


def new_run_dir(root: str | Path, config: Config) -> Path:
    """Make and return a run folder that no other run has, with `config.json` in it.

    Raises:
        OSError, ValueError: there can be no folder.
    """
    name = re.sub(r"[^\w.-]+", "_", config.env_id).strip("._")[:100] or "run"  # a file name has an end
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-s{config.seed}"
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else type(error)
        raise kind(f"run_dir is {str(root)!r}; it must be a folder that can be made and written: {error}") from error
    for attempt in range(1, 10_000):
        path = Path(root) / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir()  # refuses an existing folder, so two runs that start together cannot share one
        except FileExistsError:
            continue
        write_config(path, config)
        return path
    raise FileExistsError(f"run_dir {root} has ten thousand folders named {stem}; it must have room for one more")


def write_config(run: Path, config: Config) -> None:
    """Write `config.json`, whole or not at all."""
    write_aside(run / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(run: Path) -> Config:
    """The run's Config.

    Raises:
        ValueError: there is no readable `config.json`.
    """
    path = run / "config.json"
    try:
        return Config.from_dict(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{run} is not a usable run folder: {path.name}: {error}") from error


def save_checkpoint(
    run: Path, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Write a checkpoint for `state["step"]`, make it the latest and delete all but the newest `KEEP`.

    The folder is filled under another name, flushed to disk, then renamed: a crash at any moment leaves the earlier
    checkpoints and no half one.
    """
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    final = folder / f"step-{state['step']:012d}"
    aside = folder / f".writing-{final.name}-{os.getpid()}"
    for leftover in folder.glob(".writing-*"):
        pid = leftover.name.rpartition("-")[2]
        if not (pid.isdigit() and _is_alive(int(pid))):
            shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir()
    save_file(_plain(model), aside / "model.safetensors")
    save_file(_plain(optimizer), aside / "optimizer.safetensors")
    hashes = {"sha256": tensors_sha256(model), "optimizer_sha256": tensors_sha256(optimizer)}
    full = {"format": FORMAT, **state, **hashes}
    (aside / "state.json").write_text(json.dumps(full, indent=2, allow_nan=False) + "\n")
    for file in aside.iterdir():
        _flush(file)
    if final.exists():  # the same step saved again: out of the way first, a rename does not replace a filled folder
        final.rename(folder / f".replaced-{final.name}-{os.getpid()}")
    aside.rename(final)
    _flush(folder)
    write_aside(folder / "latest", final.name + "\n")
    for old in [*folder.glob(".replaced-*"), *_complete(folder)[:-KEEP]]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check the checkpoint at `path`: a checkpoint folder, or a run folder (its latest one).

    Raises:
        FileNotFoundError: there is nothing at `path`. TypeError: it is no path.
        ValueError: it is no pyppo checkpoint, or a damaged one; the message says what is wrong and what else there is.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is {path!r}; it must be the path of a run folder or a checkpoint in one")
    folder = find_checkpoint(Path(path))
    try:
        state = read_state(folder)
        model, optimizer = (_load_hashed(folder / name, state[key]) for name, key in _HASHED.items())
    except (OSError, ValueError, SafetensorError) as error:
        others = [p.name for p in _complete(folder.parent) if p != folder]
        hint = f"; other checkpoints of this run: {', '.join(others)}" if others else ""
        raise ValueError(f"{folder} is not a usable checkpoint: {error}{hint}") from error
    return Checkpoint(folder, model, optimizer, state)


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint folder; what every checkpoint has is looked at.

    Raises:
        OSError, ValueError: there is none, or it is not one of pyppo's, or a damaged one.
    """
    state = json.loads((folder / "state.json").read_text())
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state.json has format {found!r}; it must be {FORMAT!r}")
    if missing := [name for name in ("step", "policy", *_HASHED.values()) if name not in state]:
        raise ValueError(f"state.json lacks {', '.join(missing)}")
    if type(state["step"]) is not int:
        raise ValueError(f"state.json has step {state['step']!r}; it must be an integer")
    if not isinstance(state["policy"], dict) or not isinstance(state["policy"].get("class"), str):
        raise ValueError(f"state.json has policy {state['policy']!r}; it must be an object that names its class")
    return state


def _load_hashed(path: Path, sha256: str) -> dict[str, Tensor]:
    tensors = load_file(path)
    if tensors_sha256(tensors) != sha256:
        raise ValueError(f"{path.name} does not have the SHA-256 that state.json states")
    return tensors


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` is, or the latest one of the run folder that it is."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; it must be a run folder or a checkpoint in one")
    if (path / "state.json").is_file():
        return path
    folder = path if (path / "latest").is_file() else path / "checkpoints"
    found = _complete(folder)
    if not found:
        what = "a run folder without a checkpoint" if (path / "config.json").is_file() else "no run folder of pyppo's"
        inside = next((run for run in sorted(path.iterdir()) if _complete(run / "checkpoints")), None)
        like = f", as {inside} does" if inside else ""
        raise ValueError(f"{path} is {what}; it must hold checkpoints/step-*/state.json{like}")
    latest = folder / "latest"
    named = folder / latest.read_text(errors="replace").strip() if latest.is_file() else found[-1]
    return named if named in found else found[-1]


def load(path: str | Path, policy: nn.Module | None = None, *, device: str = "cpu") -> Any:
    """The policy of a run folder (its latest checkpoint) or a checkpoint folder, ready to `act`.

    Args:
        path: the folder.
        policy: the module to fill, for a policy of your own class; the built-in one is made from the checkpoint.
        device: where the policy goes.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `load_checkpoint`; or the policy is of another class and was not
            given, what was given is no module, or torch cannot use the device.
    """
    checkpoint = load_checkpoint(path)
    restored = restore_policy(checkpoint, policy)
    try:
        return restored.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}; torch cannot use it here: {error}") from error


def check_resume(checkpoint: Checkpoint, config: Config, *, own_envs: bool) -> None:
    """Check, before anything is built, that training can go on from `checkpoint` with `config`.

    Args:
        own_envs: whether environments of the user's own are given.

    Raises:
        ValueError: the checkpoint lacks something, `config` is of another policy or environment, the run's environments
            are missing, or training is over.
    """
    run, state = checkpoint.run, checkpoint.state
    missing = [f"state.json lacks {name}" for name in _STATE if name not in state]
    numbers = [name for name in _STATE if name in state and name != "episodes"]
    missing += [
        f"state.json has {name} {state[name]!r}" for name in numbers if not isinstance(state[name], (int, float))
    ]
    if "rollout.steps" not in checkpoint.optimizer:
        missing.append("optimizer.safetensors lacks rollout.steps")
    if missing:
        raise ValueError(f"{checkpoint.path} is not a usable checkpoint: {', '.join(missing)}")
    if state.get("own_envs") and not own_envs:
        raise ValueError(f"envs is None; it must be given, since {run} was trained in environments of your own")
    before = read_config(run)
    for name in _FIXED:
        was, wanted = getattr(before, name), getattr(config, name)
        if was != wanted:
            raise ValueError(f"{name} is {wanted!r}; it must be {was!r}, as in the run {run} that is resumed")
    if state["step"] >= config.total_timesteps:
        raise ValueError(
            f"{run} is complete at step {state['step']:,}; total_timesteps is {config.total_timesteps:,} and must be "
            "higher to go on"
        )


def described_spaces(obs_space: spaces.Dict, distribution: Distribution) -> dict[str, Any]:
    """What a checkpoint keeps of its environments, JSON values: observations by name, and actions."""
    actions = distribution.to_dict()
    return {
        "obs_space": {name: space_to_dict(space) for name, space in obs_space.items()},
        "actions": {name: actions[name] for name in ("kind", "shape", "nvec", "start")},
    }


def check_spaces(checkpoint: Checkpoint, obs_space: spaces.Dict, distribution: Distribution) -> None:
    """Check that environments give and take what the run's did. A checkpoint that does not say so fits any.

    Raises:
        ValueError: they do not; names the observation, what it is and what it must be.
    """
    state, now = checkpoint.state, described_spaces(obs_space, distribution)
    if "obs_space" not in state:
        return
    like = f"as in the run {checkpoint.run} that is resumed"
    was, given = state["obs_space"], now["obs_space"]
    if was.keys() != given.keys():
        raise ValueError(f"the environments give observations {sorted(given)}; they must be {sorted(was)}, {like}")
    for name, space in given.items():
        if _as_stored(space) != _as_stored(was[name]):
            raise ValueError(f"the environments give observation {name!r} as {space}; it must be {was[name]}, {like}")
    if now["actions"] != state["actions"]:
        raise ValueError(f"the environments take actions {now['actions']}; they must be {state['actions']}, {like}")


def _as_stored(space: Mapping[str, Any]) -> dict[str, Any]:
    """A described space as the policy sees it: all floats are float32."""
    return {**space, "dtype": "float" if str(space.get("dtype")).startswith("float") else space.get("dtype")}


def restore_policy(checkpoint: Checkpoint, policy: nn.Module | None = None) -> nn.Module:
    """The checkpoint's policy: `policy` filled with its state, or the built-in one made anew."""
    recipe = checkpoint.state["policy"]
    if policy is None:
        policy = policy_from_recipe(recipe)
        if policy is None:
            raise ValueError(f"{checkpoint.path} holds a {recipe['class']}; pass policy=, an instance of it, to fill")
    if not isinstance(policy, nn.Module):
        what = f"the class {policy.__name__}" if isinstance(policy, type) else f"a {type(policy).__name__}"
        raise TypeError(f"policy is {what}; it must be a torch.nn.Module, an object of such a class")
    try:
        policy.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        raise ValueError(f"policy does not fit {checkpoint.path}: {error}") from error
    return policy


def policy_recipe(policy: nn.Module) -> dict[str, Any]:
    """What `restore_policy` needs to know about a policy besides its tensors."""
    kind = type(policy)
    if kind in BUILT_IN.values():
        assert isinstance(policy, ActorCriticPolicy)
        return {"class": kind.__name__, **policy.to_dict()}
    return {"class": f"{kind.__module__}.{kind.__qualname__}"}


def discard_after(run: Path, step: int) -> None:
    """Delete the checkpoints of a run that are newer than `step`: a run resumed from there will make its own."""
    for path in _complete(run / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def parameter_sha256(policy: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's `state_dict`."""
    return tensors_sha256(policy.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of named tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def write_aside(path: Path, text: str) -> None:
    """Write a text file under another name, flush it to disk, then rename it."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.write_text(text)
    _flush(aside)
    aside.replace(path)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory: safetensors refuses views of one buffer, which engines bind."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _complete(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, oldest first. A folder gets its name only when it is complete."""
    named = (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name))
    return sorted(p for p in named if (p / "state.json").is_file())


def _is_alive(pid: int) -> bool:
    """Whether another process than this one has the number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
