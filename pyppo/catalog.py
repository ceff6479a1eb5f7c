"""What can be trained here: EnvPool's environments by name, what each gives and takes, and why some cannot be used."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from gymnasium import spaces

from pyppo.envpool_envs import env_spaces, family_of, list_envs
from pyppo.masks import MASK

__all__ = ["Known", "describe", "find"]


class Known(NamedTuple):
    """One environment."""

    name: str
    family: str
    observations: str
    """In words; empty where it cannot be trained."""
    actions: str
    """In words; empty where it cannot be trained."""
    why_not: str
    """Why it cannot be trained here; empty where it can."""


def find(pattern: str = "") -> list[str]:
    """Names that contain `pattern`, or match it where it has `*`, `?` or `[`; case does not matter. A family's name
    finds all of it."""
    text = pattern.lower()
    whole = any(sign in text for sign in "*?[")

    def fits(name: str) -> bool:
        return fnmatch.fnmatchcase(name.lower(), text) if whole else text in name.lower()

    return [name for name in list_envs() if fits(name) or (text != "" and fits(family_of(name)))]


def describe(names: Iterable[str]) -> list[Known]:
    """What the environments give and take. None is made: their specifications are enough."""
    known: dict[str, tuple[str, str, str]] = {}
    rows = []
    for name in names:
        family = family_of(name)
        # Atari's specification takes a sixth of a second, since it starts the game, and differs in the actions alone.
        key = family if family == "atari" else name
        if key not in known:
            known[key] = _describe(name, "up to 18 actions" if family == "atari" else "")
        rows.append(Known(name, family, *known[key]))
    return rows


def _describe(name: str, actions: str) -> tuple[str, str, str]:
    try:
        obs_space, action_space = env_spaces(name)
    except (ValueError, TypeError, ImportError, OSError) as error:
        why = str(error).removeprefix(f"{name} cannot be trained: ")
        return "", "", why.removeprefix(f"EnvPool cannot make {name} here: ")
    masked = ", masked" if MASK in obs_space.spaces else ""
    entries = {key: space for key, space in obs_space.items() if key != MASK}
    parts = [_short(space) if list(entries) == ["obs"] else f"{key} {_short(space)}" for key, space in entries.items()]
    more = f", … {len(parts)} entries" if len(parts) > 4 else ""
    return ", ".join(parts[:4]) + more, (actions or _short(action_space)) + masked, ""


def _short(space: spaces.Space) -> str:
    """A space in a few letters: "uint8[4, 84, 84]", "Discrete(4)"."""
    if isinstance(space, spaces.Box):
        return f"{space.dtype}{list(space.shape)}"
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.size > 4:
        low, high = int(np.min(space.nvec)), int(np.max(space.nvec))
        return f"{space.nvec.size} of Discrete({low}{f' to {high}' if high > low else ''})"
    return str(space).replace("MultiBinary((", "MultiBinary(").replace(",))", ")").replace("))", ")")
