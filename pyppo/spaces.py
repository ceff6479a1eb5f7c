"""Spaces: observations as one flat dict of arrays, the choices and bounds of actions, and checks against both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

__all__ = [
    "MAX_CHOICES", "ActionCheck", "Entry", "ObservationCheck", "choices", "dict_space", "flatten_space", "float_bounds",
]  # fmt: skip

MAX_CHOICES = 2**16
"""Most choices that an action may have in all: each takes an output of the network and a number a row."""

# --- observations ---------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One array of an observation."""

    path: tuple[Any, ...]
    """The keys that lead to it in the environment's own observation; empty for a plain array."""
    space: spaces.Space


def flatten_space(space: spaces.Space) -> dict[str, Entry]:
    """The arrays that an observation consists of, by name.

    A plain space is the one entry "obs"; nested Dicts and Tuples are flattened, keys joined by "/", a Tuple's members
    called "0", "1", ...

    Raises:
        TypeError: an entry is no array of fixed shape.
        ValueError: two entries get the same name, or there is none.
    """
    entries: dict[str, Entry] = {}
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        _add(entries, ("obs",), Entry((), space))
        return entries
    _walk(entries, (), space)
    if not entries:
        raise ValueError(f"observation space {space} is empty; it must have at least one entry")
    return entries


def dict_space(space: spaces.Space) -> spaces.Dict:
    """An observation space as one flat `Dict` of Box, Discrete, MultiDiscrete and MultiBinary (`flatten_space`)."""
    return spaces.Dict({name: entry.space for name, entry in flatten_space(space).items()})


def _walk(entries: dict[str, Entry], path: tuple[Any, ...], space: spaces.Space) -> None:
    if isinstance(space, spaces.Dict):
        for key, member in space.spaces.items():
            _walk(entries, (*path, key), member)
    elif isinstance(space, spaces.Tuple):
        for i, member in enumerate(space.spaces):
            _walk(entries, (*path, i), member)
    else:
        _add(entries, path, Entry(path, space))


def _add(entries: dict[str, Entry], names: tuple[Any, ...], entry: Entry) -> None:
    name = "/".join(map(str, names))
    array = isinstance(entry.space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary))
    if not array or np.dtype(entry.space.dtype).kind not in "fiub":
        raise TypeError(
            f"observation space {name!r} is {entry.space}; it must be a Box, Discrete, MultiDiscrete or MultiBinary, "
            "or a Dict or Tuple of them"
        )
    if name in entries:
        raise ValueError(f"observation space has two entries {name!r}; names, keys joined by '/', must be unique")
    entries[name] = entry


class ObservationCheck:
    """Holds the observations of N environments to their spaces, and to what they were at the first reset.

    Args:
        entries: as `flatten_space` gives them. num_envs: N.
        first_env: index of the first environment, for messages.
    """

    def __init__(self, entries: Mapping[str, Entry], num_envs: int, first_env: int = 0) -> None:
        self.first_env = first_env
        self._spaces = {name: entry.space for name, entry in entries.items()}
        self._shapes = {name: (num_envs, *(space.shape or ())) for name, space in self._spaces.items()}
        self._dtypes: dict[str, np.dtype] = {}
        self.limits = {name: limits for name, space in self._spaces.items() if (limits := _limits(space)) is not None}

    def first(self, obs: Mapping[str, Any]) -> None:
        """After a reset: shapes and kinds of numbers as the spaces have them; notes the dtypes.

        Raises:
            TypeError: not an array, or floats where the space has integers. ValueError: another shape, or a value
                outside of a Discrete or MultiDiscrete space.
        """
        for name, shape in self._shapes.items():
            x, space = obs[name], self._spaces[name]
            was = getattr(x, "shape", None)
            if was != shape:
                raise ValueError(f"observation {name!r} has shape {was}; it must be {shape}")
            kinds = "fiub" if np.dtype(space.dtype).kind == "f" else "iub"
            if not isinstance(x, np.ndarray) or x.dtype.kind not in kinds:
                raise TypeError(
                    f"observation {name!r} is a {type(x).__name__} of {getattr(x, 'dtype', None)}; it must be a NumPy "
                    f"array of {space.dtype} for {space}"
                )
            self._dtypes[name] = x.dtype
        self._check_limits(obs)

    def __call__(self, obs: Mapping[str, Any], step: int) -> None:
        """After a step: the same shapes and dtypes as after the reset.

        Raises:
            ValueError: an entry changed, or a value is outside of a Discrete or MultiDiscrete space.
        """
        for name, shape in self._shapes.items():
            x, dtype = obs[name], self._dtypes[name]
            if getattr(x, "shape", None) != shape or x.dtype != dtype:
                now = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
                raise ValueError(
                    f"observation {name!r} changed at step {step}: it was {dtype} {shape} and is {now}; its shape and "
                    "dtype must stay the same"
                )
        self._check_limits(obs)

    def _check_limits(self, obs: Mapping[str, np.ndarray]) -> None:
        for name in self.limits:
            self.check_limits(name, obs[name])

    def check_limits(self, name: str, x: np.ndarray) -> None:
        """Raise a `ValueError` if a value of a Discrete or MultiDiscrete entry `[n, ...]` is out of its space."""
        low, high = self.limits[name]
        outside = (x < low) | (x > high)
        if outside.any():
            row = int(np.flatnonzero(outside.reshape(len(x), -1).any(axis=1))[0])
            raise ValueError(
                f"environment {self.first_env + row} gave observation {name!r} as {x[row]}; it must lie in "
                f"{self._spaces[name]}"
            )


def _limits(space: spaces.Space) -> tuple[np.ndarray, np.ndarray] | None:
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        start = np.asarray(space.start)
        return start, start + (space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
    return None


# --- actions --------------------------------------------------------------------------------------------------------

_ACTIONS = "Discrete, MultiDiscrete, MultiBinary, a Box of integers, or a Box of floats of at least one dimension"


def choices(space: spaces.Space) -> tuple[np.ndarray, np.ndarray] | None:
    """The lowest value of each component and how many it can take, int64 of the space's shape.

    None for MultiBinary, whose components are bits, and for a Box of floats.

    Raises:
        TypeError: the action space is not supported. ValueError: it has more than `MAX_CHOICES` choices.
    """
    if isinstance(space, spaces.Discrete):
        low, count = np.asarray(space.start), np.asarray(space.n)
    elif isinstance(space, spaces.MultiDiscrete):
        low, count = np.broadcast_to(space.start, space.nvec.shape), space.nvec
    elif isinstance(space, spaces.Box) and np.dtype(space.dtype).kind in "iu":
        low, count = space.low, space.high.astype(np.float64) - space.low.astype(np.float64) + 1
    elif isinstance(space, spaces.MultiBinary) and np.prod(space.shape) >= 1:
        return None
    elif isinstance(space, spaces.Box) and np.dtype(space.dtype).kind == "f" and np.prod(space.shape) >= 1:
        if space.shape:
            return None
        raise TypeError(f"action space {space} is not supported; it must be {_ACTIONS}")
    else:
        raise TypeError(f"action space {space} is not supported; it must be {_ACTIONS}")
    total = float(np.sum(count, dtype=np.float64))
    if not 1 <= total <= MAX_CHOICES:
        raise ValueError(f"action space {space} has {total:,.0f} choices in all; it must have 1 to {MAX_CHOICES:,}")
    return low.astype(np.int64), count.astype(np.int64)


# EnvPool gives its unbounded floats C++'s numeric_limits::min(), the smallest positive number, for a lower limit.
_SMALLEST = (float(np.finfo(np.float32).tiny), float(np.finfo(np.float64).tiny))


def float_bounds(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of a Box of floats in float64, infinite where the limit is only the type's own."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    largest = np.finfo(np.float32).max
    no_high = high >= largest
    no_low = (low <= -largest) | (no_high & np.isin(low, _SMALLEST))
    return np.where(no_low, -np.inf, low), np.where(no_high, np.inf, high)


class ActionCheck:
    """Refuses actions that an environment would take silently: EnvPool checks neither shape, range nor NaN."""

    def __init__(self, space: spaces.Space, num_envs: int) -> None:
        self.low, self.high, self.kinds = _action_limits(space)
        self.space = space
        self.shape = (num_envs, *(space.shape or ()))
        # One bound for all components needs no elementwise comparison.
        self.uniform = bool(np.all(self.low == self.low.flat[0]) and np.all(self.high == self.high.flat[0]))
        self.lowest, self.highest = self.low.flat[0].item(), self.high.flat[0].item()

    def __call__(self, actions: np.ndarray) -> None:
        """Raise a `TypeError` or `ValueError` that says what is wrong with the actions, if anything is."""
        if not isinstance(actions, np.ndarray):
            raise TypeError(f"actions is a {type(actions).__name__}; it must be a NumPy array of shape {self.shape}")
        if actions.shape != self.shape:
            raise ValueError(f"actions has shape {actions.shape}; it must be {self.shape}")
        kind = actions.dtype.kind
        if kind not in self.kinds:
            wanted = "floating point" if self.kinds == "f" else "an integer type"
            raise TypeError(f"actions has dtype {actions.dtype}; it must be {wanted} for {self.space}")
        if not self._inside(actions):
            self._refuse(actions)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest value of each component of an action, float64 `[D]`."""
        return self.low.astype(np.float64).ravel(), self.high.astype(np.float64).ravel()

    def _inside(self, actions: np.ndarray) -> bool:
        if self.uniform:  # argmin finds NaN, which fails; and it takes a fifth of the time of a reduction
            lowest, highest = actions.item(actions.argmin()), actions.item(actions.argmax())
            return lowest >= self.lowest and highest <= self.highest
        return bool(((actions >= self.low) & (actions <= self.high)).all())

    def _refuse(self, actions: np.ndarray) -> None:
        inside = (actions >= self.low) & (actions <= self.high)
        row = int(np.flatnonzero(~inside.reshape(len(actions), -1).all(axis=1))[0])
        raise ValueError(f"actions[{row}] is {actions[row]}; it must lie in {self.space} and be finite")


def _action_limits(space: spaces.Space) -> tuple[np.ndarray, np.ndarray, str]:
    """The lowest and highest value of each component, and the dtype kinds that are accepted."""
    if (finite := choices(space)) is not None:
        low, count = finite
        return low, low + count - 1, "iu"
    if isinstance(space, spaces.MultiBinary):
        return np.zeros(space.shape, np.int64), np.ones(space.shape, np.int64), "iub"
    assert isinstance(space, spaces.Box)
    low, high = float_bounds(space)
    largest = np.finfo(np.float64).max  # an infinite action is wrong even without bounds
    # A policy in float32 rounds the bound 0.4 up when it clips to it; that is not out of range.
    low = np.minimum(low, low.astype(np.float32), dtype=np.float64)
    high = np.maximum(high, high.astype(np.float32), dtype=np.float64)
    return np.maximum(low, -largest), np.minimum(high, largest), "f"
