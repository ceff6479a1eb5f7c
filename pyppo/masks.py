"""Action masks: where an environment has one, which of its forms it takes, and which rows can be drawn from.

The trainer knows one form, the observation entry "action_mask", bool `[N, A]`: one number an action of a Discrete space
or a bit of a MultiBinary one; a MultiDiscrete action's masks side by side, A the sum of `nvec`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from pyppo.spaces import MAX_CHOICES, Entry, choices, flatten_space

__all__ = [
    "MASK", "MASK_INFOS", "ActionMask", "dict_of", "mask_shape", "masks_in", "policy_spaces", "split_mask",
]  # fmt: skip

MASK = "action_mask"
"""The observation entry's name."""
MASK_INFOS = ("action_mask", "legal_action_mask")
"""What a mask is called in `infos`."""


class ActionMask:
    """From an environment's masks to bool `[N, A]`, and from the trainer's actions to the environment's.

    Masks of a MultiDiscrete action, nvec = (n_1, ..., n_K), may be `[n_1 + ... + n_K]`; `[K, n]` where all n are equal;
    or say of each *combination* of components whether it is allowed, `[n_1, ..., n_K]`. No product of K distributions
    can hold to the last, so there the trainer's action is one choice among all n_1 * ... * n_K combinations.

    Args:
        shape: of one environment's mask.
        action_space: the environment's.
        first_env: index of the first environment, for messages.

    Attributes:
        width: A.
        action_space: the trainer's: the environment's own, or a Discrete one of all combinations.

    Raises:
        ValueError: the mask does not fit the action space, or there are too many combinations.
        TypeError: the action space has no choices to forbid.
    """

    def __init__(self, shape: tuple[int, ...], action_space: spaces.Space, first_env: int = 0) -> None:
        self.action_space, self._env_space, self.first_env = action_space, action_space, first_env
        self._starts: np.ndarray | None = None
        self._combinations: tuple[int, ...] = ()
        finite = choices(action_space)
        if finite is None and not isinstance(action_space, spaces.MultiBinary):
            raise TypeError(
                f"there is an action mask and the action space is {action_space}; its actions must be finite"
            )
        if finite is None:
            self.width, allowed = math.prod(action_space.shape or ()), [action_space.shape]
            self._bits = True
        else:
            self._low, count = finite
            self._bits, nvec = False, tuple(count.ravel().tolist())
            self.width, allowed = sum(nvec), []
            if action_space.shape:
                self._starts = np.cumsum([0, *nvec[:-1]])
                if len(set(nvec)) == 1:
                    allowed.append((*count.shape, nvec[0]))
                if shape == nvec and shape not in [(self.width,), *allowed]:
                    self._take_combinations(nvec)
                    return
                allowed.append(nvec)
        if shape not in [(self.width,), *allowed]:
            forms = " or ".join(map(str, dict.fromkeys([(self.width,), *allowed])))
            raise ValueError(f"action mask has shape {shape}; it must be {forms} for the action space {action_space}")

    def _take_combinations(self, nvec: tuple[int, ...]) -> None:
        self.width = math.prod(nvec)
        if self.width > MAX_CHOICES:
            raise ValueError(
                f"action mask has shape {nvec}, {self.width:,} combinations; there must be at most {MAX_CHOICES:,}"
            )
        self._starts, self._combinations = None, nvec
        self.action_space = spaces.Discrete(self.width)

    @property
    def joint(self) -> bool:
        """Whether the trainer's actions are combinations, for `to_env` to take apart."""
        return bool(self._combinations)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """The trainer's actions as the environment takes them: combinations `[N]` taken apart to `[N, K]`."""
        if not self._combinations:
            return actions
        components = np.stack(np.unravel_index(actions, self._combinations), axis=1) + self._low
        return components.astype(self._env_space.dtype)

    def read(self, raw: np.ndarray, ignored: np.ndarray | None, step: int) -> np.ndarray:
        """An environment's masks `[N, ...]` as bool `[N, A]`; a view where that is possible.

        Args:
            ignored: bool `[N]`, rows whose coming action is ignored: there a mask that allows nothing becomes one that
                allows everything, since something must be drawn. None: no row.
            step: for the message.

        Raises:
            ValueError: a number other than 0 and 1, or a row that allows no action.
        """
        mask = raw.reshape(len(raw), -1)
        if mask.shape[1] != self.width:
            raise ValueError(
                f"action mask changed at step {step}: it has shape {raw.shape}; it must have {self.width} numbers a row"
            )
        if mask.dtype != np.bool_:
            odd = (mask != 0) & (mask != 1)
            if odd.any():
                row = int(np.flatnonzero(odd.any(axis=1))[0])
                raise ValueError(
                    f"environment {self.first_env + row} gave an action mask with {mask[row][odd[row]][0]} at step "
                    f"{step}; it must hold 1 or True where an action is allowed, 0 or False elsewhere"
                )
            mask = mask.astype(np.bool_)
        if self._bits or (allowed := self._allows(mask)).all():
            return mask
        blocked = ~allowed
        if ignored is not None:
            mask = mask.copy()
            mask[blocked & ignored] = True
            blocked &= ~ignored
        if blocked.any():
            row = int(np.flatnonzero(blocked)[0])
            raise ValueError(
                f"environment {self.first_env + row} allows no action at step {step}: its action mask has "
                f"{self._nothing(mask[row])}; an unfinished episode's must allow at least one"
            )
        return mask

    def _allows(self, mask: np.ndarray) -> np.ndarray:
        """Bool `[N]`: whether there is an action for each component."""
        if self._starts is None:
            return np.logical_or.reduce(mask, axis=1)
        return np.logical_and.reduce(np.logical_or.reduceat(mask, self._starts, axis=1), axis=1)

    def _nothing(self, row: np.ndarray) -> str:
        if self._starts is None or len(self._starts) == 1:
            return f"only False, {self.width} times"
        empty = np.flatnonzero(~np.logical_or.reduceat(row, self._starts))
        return f"only False for component {int(empty[0])}"


def policy_spaces(
    obs_space: spaces.Space, action_space: spaces.Space
) -> tuple[spaces.Dict, spaces.Space, ActionMask | None]:
    """Observation and action space as a policy has them, for the environment's own.

    The observations are flat (`pyppo.spaces.flatten_space`), an entry "action_mask" is a MultiBinary of A. A Tuple of
    masks under that name, one a component, counts as one after the other.

    Raises:
        TypeError, ValueError: a space is not supported, the mask does not fit, or it is all that there is.
    """
    features, parts = split_mask(flatten_space(obs_space))
    if not parts:
        choices(action_space)  # refuses what is not supported
        return dict_of(features), action_space, None
    if not features:
        raise ValueError(f"observation space {obs_space} has only an action mask; there must be something to observe")
    mask = ActionMask(mask_shape(parts), action_space)
    return dict_of(features, mask), mask.action_space, mask


def split_mask(entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], list[Entry]]:
    """An observation's entries without its mask, and those of the mask."""
    parts = {name: entry for name, entry in entries.items() if name == MASK or name.startswith(f"{MASK}/")}
    return {name: entry for name, entry in entries.items() if name not in parts}, list(parts.values())


def mask_shape(parts: Sequence[Entry]) -> tuple[int, ...]:
    """The shape of a mask of these entries: of the one, or of all one after the other."""
    shapes = [tuple(part.space.shape or ()) for part in parts]
    return shapes[0] if len(parts) == 1 else (sum(map(math.prod, shapes)),)


def masks_in(
    infos: Mapping[str, Any], name: str, num_envs: int, unneeded: np.ndarray | None, step: int, first_env: int = 0
) -> np.ndarray:
    """The masks `[N, ...]` that `infos[name]` holds, as Gymnasium's vector environments batch them.

    Args:
        unneeded: bool `[N]`, rows that may lack one. None: no row may. step, first_env: for messages.

    Raises:
        ValueError: it is not there, or not for every row that needs one.
    """
    if name not in infos:
        raise ValueError(f"infos has no {name!r} at step {step}; it must have one after every reset and step")
    masks, there = infos[name], infos.get(f"_{name}")
    missing = np.zeros(num_envs, bool) if there is None else ~np.asarray(there)
    if unneeded is not None:
        missing = missing & ~unneeded
    if missing.any():
        row = first_env + int(np.flatnonzero(missing)[0])
        raise ValueError(f"environment {row} gave no {name!r} in its info at step {step}; it must always give one")
    if isinstance(masks, np.ndarray) and masks.dtype != object:
        return masks
    # Rows that Gymnasium did not batch: lists, or one mask a component.
    some = next(row for row in masks if row is not None)
    rows = [np.concatenate([np.ravel(x) for x in (some if row is None else row)]) for row in masks]
    for i, numbers in enumerate(rows):
        if numbers.shape != rows[0].shape:
            raise ValueError(
                f"environment {first_env + i} gave {name!r} with {numbers.size} numbers at step {step}; it must have "
                f"{rows[0].size}, as environment {first_env} has"
            )
    return np.stack(rows)


def dict_of(features: Mapping[str, Entry], mask: ActionMask | None = None) -> spaces.Dict:
    """The policy's observation space: the features, and the mask where there is one."""
    own = {MASK: spaces.MultiBinary(mask.width)} if mask is not None else {}
    return spaces.Dict({**{name: entry.space for name, entry in features.items()}, **own})
