"""Gymnasium's own vector environments: made from names or functions, and read where they give no plain arrays."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState

from pyppo.spaces import Entry, flatten_space

__all__ = ["blame", "final_rows", "finish_interrupted", "make_vector_env", "refuse_shared"]

_OWED_SECONDS = 10.0  # how long the answer to an interrupted call is waited for


def make_vector_env(envs: Sequence[str | Callable[[], gymnasium.Env]]) -> SyncVectorEnv:
    """One environment for each name or function, side by side in this process, in next-step autoreset.

    Raises:
        TypeError: an element is neither. ValueError: there is none, a name is unknown, or their spaces differ.
    """
    if not envs:
        raise ValueError("envs is empty; it must name or make at least one environment")
    for i, env in enumerate(envs):
        if isinstance(env, gymnasium.Env):
            raise TypeError(f"envs[{i}] is a made {type(env).__name__}; it must be a function that makes one")
        if not isinstance(env, str) and not callable(env):
            raise TypeError(f"envs[{i}] is a {type(env).__name__}; it must be a gymnasium.make name or a function")
    try:
        return SyncVectorEnv([_maker(env, i) for i, env in enumerate(envs)])
    except gymnasium.error.Error as error:
        raise ValueError(f"envs has a name that Gymnasium cannot make: {error}") from error
    except RuntimeError as error:  # how it says that spaces differ
        raise ValueError(f"envs cannot be stepped side by side: {error}") from error


def _maker(env: str | Callable[[], Any], index: int) -> Callable[[], gymnasium.Env]:
    """What makes the environment of `envs[index]`, and sees that it is one."""
    if isinstance(env, str):
        return partial(gymnasium.make, env)

    def made() -> gymnasium.Env:
        one: Any = env()
        if not all(hasattr(one, name) for name in ("reset", "step", "observation_space", "action_space")):
            raise TypeError(f"envs[{index}] made a {type(one).__name__}; it must make a gymnasium.Env")
        return one

    return made


def refuse_shared(env: VectorEnv) -> None:
    """See that the rows of a `SyncVectorEnv` are environments of their own: one stepped by two rows belongs to neither.

    Raises:
        ValueError: two are the same object.
    """
    if not isinstance(env, SyncVectorEnv):
        return
    seen: dict[int, int] = {}
    for row, one in enumerate(env.envs):
        inner = getattr(one, "unwrapped", one)
        if (first := seen.setdefault(id(inner), row)) != row:
            raise ValueError(
                f"environments {first} and {row} are the same {type(inner).__name__}; each must be one of its own: a "
                "function that makes environments must make a new one in every call"
            )


def final_rows(final: Any, entries: Mapping[str, Entry], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The entries of `infos["final_obs"]` at `rows`, each `[len(rows), ...]`.

    Gymnasium gives an object array with one observation a done row; array environments give one batch, which may be a
    dict or tuple of arrays.
    """
    return {name: np.stack([_pick(final, entry.path, row) for row in rows]) for name, entry in entries.items()}


def _pick(final: Any, path: tuple[Any, ...], row: int) -> np.ndarray:
    taken = False
    for key in path:
        if not taken and isinstance(final, (np.ndarray, list)):  # observations of rows, not yet entries
            final, taken = final[row], True
        final = final[key]
    return np.asarray(final if taken else final[row])


def finish_interrupted(env: VectorEnv) -> None:
    """Take what an `AsyncVectorEnv` still owes after an interrupt (Ctrl-C): until then it refuses any other call."""
    if not isinstance(env, AsyncVectorEnv):
        return
    owed = {AsyncState.WAITING_STEP: env.step_wait, AsyncState.WAITING_RESET: env.reset_wait}.get(env._state)
    if owed is None:
        return
    try:
        owed(timeout=_OWED_SECONDS)
    except multiprocessing.TimeoutError:  # the interrupt came between two processes' answers; these are the rest
        for pipe in env.parent_pipes:
            while pipe.poll(0):
                pipe.recv()


def blame(env: VectorEnv) -> str | None:
    """Which environment's observation does not fit its space, after an exception in a `SyncVectorEnv`, if any."""
    if not isinstance(env, SyncVectorEnv):
        return None
    for row, obs in enumerate(getattr(env, "_env_obs", ())):
        if obs is None:  # not reset yet
            continue
        for name, entry in flatten_space(env.single_observation_space).items():
            try:
                x = obs
                for key in entry.path:
                    x = x[key]
            except (KeyError, IndexError, TypeError):
                return f"environment {row} gave an observation without {name!r}; it must be as its observation space"
            x, shape, dtype = np.asarray(x), tuple(entry.space.shape or ()), np.dtype(entry.space.dtype)
            if x.shape != shape or not np.can_cast(x.dtype, dtype, "same_kind"):
                return f"environment {row} gave observation {name!r} as {x.dtype} {x.shape}; it must be {dtype} {shape}"
    return None
