"""Observations as numbers that a network takes: one-hot, scaled, flattened, each space in its own way.

An observation space here is a flat Dict whose leaves are Box, Discrete, MultiDiscrete and MultiBinary. The leaf
"action_mask" is no feature: it says which actions are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from pyppo.masks import MASK

__all__ = [
    "IMAGE_SCALE", "Prepared", "check_leaves", "features_of", "has_symbols", "is_image", "num_features",
    "one_hot_symbols", "space_from_dict", "space_to_dict",
]  # fmt: skip

IMAGE_SCALE = 255.0
"""What uint8 is divided by."""


class Prepared(dict[str, Tensor]):
    """What a built-in policy's `prepare` gives where that is more than one tensor, and so no raw observation."""


def check_leaves(obs_space: spaces.Dict, num_params: int) -> None:
    """Whether a policy can take these observations.

    Args:
        num_params: what an action mask must cover.

    Raises:
        TypeError: a leaf is of another space.
        ValueError: there is no leaf but an action mask, or that has another length.
    """
    for key, space in obs_space.items():
        if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise TypeError(f"obs_space[{key!r}] is {space}; it must be a Box, Discrete, MultiDiscrete or MultiBinary")
        if 0 in (space.shape or ()):
            raise ValueError(f"obs_space[{key!r}] is {space}; it must have at least one element")
    mask = obs_space.get(MASK)
    if mask is not None and mask.shape != (num_params,):
        raise ValueError(f"obs_space['{MASK}'] has shape {mask.shape}; it must be {(num_params,)}, a flag each")
    if not set(obs_space) - {MASK}:
        raise ValueError(f"obs_space has {sorted(obs_space)}; it must have an entry that is not an action mask")


def is_image(space: spaces.Space) -> bool:
    """Whether a leaf is taken for an image: a Box of three dimensions."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3


def has_symbols(space: spaces.Space) -> bool:
    """Whether a leaf may be an image of symbols: one of integers."""
    return is_image(space) and np.issubdtype(space.dtype, np.integer)


def num_features(space: spaces.Space, symbols: int | None = None) -> int:
    """Width of what `features_of` makes of this leaf."""
    if symbols is not None and has_symbols(space):
        return symbols * math.prod(space.shape or ())
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(np.sum(space.nvec))
    return math.prod(space.shape or ())


def features_of(
    space: spaces.Space, x: Tensor, dtype: torch.dtype, scale: float = IMAGE_SCALE, symbols: int | None = None
) -> Tensor:
    """Features [B, F] of one leaf's observations [B, *shape].

    Discrete and MultiDiscrete: one-hot, each component. MultiBinary: 0 and 1. Box: flattened, uint8 divided by `scale`,
    but one-hot where `symbols` says how many there are and the leaf is an image of integers.

    Raises:
        ValueError: a Discrete or MultiDiscrete value or a symbol is out of range (on the CPU; a GPU would have to be
            waited for, and such a value has no feature set there).
    """
    if symbols is not None and has_symbols(space):
        return one_hot_symbols(x, symbols, dtype).flatten(1)
    if isinstance(space, spaces.Discrete):
        return _one_hot(x.reshape(-1, 1), (int(space.n),), (int(space.start),), space).to(dtype)
    if isinstance(space, spaces.MultiDiscrete):
        nvec = tuple(int(n) for n in np.ravel(space.nvec))
        return _one_hot(x.flatten(1), nvec, tuple(int(s) for s in np.ravel(space.start)), space).to(dtype)
    flat = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    return flat.to(dtype) / scale if isinstance(space, spaces.Box) and x.dtype == torch.uint8 else flat.to(dtype)


def _one_hot(x: Tensor, nvec: tuple[int, ...], start: tuple[int, ...], space: spaces.Space) -> Tensor:
    """Bool [B, sum(nvec)] of integers [B, K]; column by column, since each may have another number of values."""
    columns = [
        column.unsqueeze(1) == torch.arange(first, first + n, device=x.device)
        for column, n, first in zip(x.long().unbind(1), nvec, start, strict=True)
    ]
    hot = torch.cat(columns, dim=1)
    if x.device.type == "cpu" and int(hot.sum()) != x.numel():
        wrong = next(row for row, part in enumerate(hot) if int(part.sum()) != x.shape[1])
        raise ValueError(f"an observation of {space} is {x[wrong].tolist()}; it must lie in that space")
    return hot


def one_hot_symbols(x: Tensor, symbols: int, dtype: torch.dtype) -> Tensor:
    """[*shape, symbols] of integers [*shape] from 0 to `symbols` less 1.

    Raises:
        ValueError: one is out of range (on the CPU, as in `features_of`).
    """
    if x.device.type == "cpu" and x.numel() and (int(x.max()) >= symbols or int(x.min()) < 0):
        raise ValueError(
            f"an image has symbols from {int(x.min())} to {int(x.max())}; image_symbols is {symbols}, so they must be "
            f"from 0 to {symbols - 1}"
        )
    return (x.unsqueeze(-1) == torch.arange(symbols, device=x.device)).to(dtype)


# --- JSON -----------------------------------------------------------------------------------------------------------


def space_to_dict(space: spaces.Space) -> dict[str, Any]:
    """A leaf as JSON values. A Box keeps shape and dtype: its bounds mean nothing to a policy."""
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiDiscrete):
        lists = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
        return {"type": "MultiDiscrete", **lists, "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiBinary):
        n = space.n if isinstance(space.n, int | np.integer) else space.shape
        return {"type": "MultiBinary", "n": np.array(n).tolist()}
    return {"type": "Box", "shape": list(space.shape or ()), "dtype": str(space.dtype)}


def space_from_dict(spec: Mapping[str, Any]) -> spaces.Space:
    """The leaf that `space_to_dict` described; a Box is unbounded."""
    if spec["type"] == "Discrete":
        return spaces.Discrete(spec["n"], start=spec["start"], dtype=np.dtype(spec["dtype"]).type)
    if spec["type"] == "MultiDiscrete":
        start = np.array(spec["start"])
        return spaces.MultiDiscrete(np.array(spec["nvec"]), dtype=np.dtype(spec["dtype"]).type, start=start)
    if spec["type"] == "MultiBinary":
        return spaces.MultiBinary(spec["n"])
    shape, dtype = tuple(spec["shape"]), np.dtype(spec["dtype"])
    if dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, shape, dtype.type)
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return spaces.Box(low, high, shape, dtype.type)
