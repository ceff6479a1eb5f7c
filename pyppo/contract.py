"""The environment contract: how finished episodes are reset, what a step gives, where it is written, and seeds.

What the trainer asks of environments, once for all of them (`pyppo.envs.EnvGroup`): N environments step side by side;
observations are one flat dict of arrays `[N, ...]` (`pyppo.spaces`), an action mask is its entry "action_mask"
(`pyppo.masks`); a finished episode is reset in one of three ways:

- next-step (EnvPool, Gymnasium's default): the row with `terminated` or `truncated` carries the episode's final
  observation; the next row ignores its action, has reward 0 and carries the first observation of the new episode.
- same-step: the row with `terminated` or `truncated` already carries the new episode's first observation; the final
  one is in `infos["final_obs"]`.
- disabled: the environments reset when told to, `reset(options={"reset_mask": bool [N]})`; `EnvGroup` tells them right
  after a step with done rows, and is then an environment with same-step autoreset.

An environment's class may offer more, as EnvPool's does; a wrapper's class offers none of what it wraps:

- `send` and `recv`: the two halves of `step`.
- `checks_actions = True`: it refuses wrong actions itself (`ActionCheck`).
- `receiver(columns)`: a thinner `recv` for a whole rollout, which writes a step's flags before its observations, and
  these as `finite_ends` gives them. A subclass does not inherit it.
- `seeded_when_made = True`: `reset` takes no seed, nor through wrappers.
- `reports_games` (of the unwrapped environment): what it ends and rewards in training is not what is reported, as with
  Atari's episodic life and clipped rewards; `infos` has the game's own "reward" and "terminated".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from gymnasium.vector import VectorEnv

__all__ = [
    "Autoreset", "Column", "Columns", "Purpose", "Receive", "StepBatch", "autoreset_of", "check_answer", "check_step",
    "env_seed", "finite_ends",
]  # fmt: skip

Purpose = Literal["train", "evaluate", "warmup"]
_PURPOSES: tuple[Purpose, ...] = ("train", "evaluate", "warmup")


class Columns(NamedTuple):
    """Where one group's answers to the steps of a rollout are written; `column[t] = array` writes one step's."""

    obs: Mapping[str, Column]
    """Row t + 1 takes the observations that follow step t."""
    rewards: Column
    terminated: np.ndarray
    truncated: np.ndarray
    episode_rewards: np.ndarray | None = None
    """The rewards that are reported, where the group says `reports_games`."""
    episode_over: np.ndarray | None = None
    """Where what is reported ends, likewise."""


class Column(Protocol):
    """An array `[T, n, ...]` with T or T + 1 rows, or what writes to one."""

    def __setitem__(self, t: int, array: np.ndarray) -> None: ...


Receive = Callable[[int], None]
"""Waits for the answer to step t and writes it to a group's columns."""


class StepBatch(NamedTuple):
    """What N environments answered to one step. Arrays may be views that the next step overwrites."""

    obs: dict[str, np.ndarray]
    """Observations `[N, ...]` as `EnvGroup.obs_space` has them; the one entry of a plain array is named "obs"."""
    rewards: np.ndarray
    """`[N]` float."""
    terminated: np.ndarray
    """`[N]` bool: the episode ended in itself; nothing follows."""
    truncated: np.ndarray
    """`[N]` bool: the episode was cut off, by a time limit for example; its value goes on."""
    final_obs: dict[str, np.ndarray] | None
    """Same-step autoreset: `[D, ...]`, the final observations of the D rows that are done, in row order. Else None."""
    infos: dict[str, Any]
    episode_rewards: np.ndarray | None = None
    """`[N]`: the rewards that are reported, where they are not `rewards`: an Atari game's, not clipped."""
    episode_over: np.ndarray | None = None
    """`[N]` bool: where what is reported ends, if that is not where `terminated` or `truncated` is: a game's end."""


def finite_ends(x: np.ndarray, terminated: np.ndarray) -> np.ndarray:
    """Observations `[N, ...]` with 0 for what is not finite in the rows where an episode terminated.

    Nothing follows from such a row, and a simulation that broke may well end its episode with NaN; but with next-step
    autoreset the policy is still asked for the action that the reset ignores.
    """
    if x.dtype.kind != "f":
        return x
    finite = np.isfinite(x)
    if np.count_nonzero(finite) == x.size:
        return x
    return np.where(finite | ~terminated.reshape(-1, *[1] * (x.ndim - 1)), x, x.dtype.type(0))


# --- seeds ----------------------------------------------------------------------------------------------------------


def env_seed(seed: int, purpose: Purpose, rank: int, environment: int, rebuild: int) -> int:
    """The seed of one environment, in [0, 2**31).

    A hash, since EnvPool seeds environment i with `seed + i` and pools of seeds 1 and 2 would share all but one
    environment. The purpose takes its own two bits: training and evaluation share none, by construction.

    Args:
        seed: the run's seed.
        purpose: "train", "evaluate" or "warmup".
        rank: the process among those that train together.
        environment: the environment's index among all of this purpose and rank, whatever group it is in.
        rebuild: how often the environments were made before (a resumed run must not replay its first episodes).
    """
    if purpose not in _PURPOSES:
        raise ValueError(f"purpose is {purpose!r}; it must be one of {', '.join(map(repr, _PURPOSES))}")
    key = f"{seed}/{rank}/{environment}/{rebuild}".encode()
    hashed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (hashed % 2**29) * 4 + _PURPOSES.index(purpose)


# --- how finished episodes are reset --------------------------------------------------------------------------------

Autoreset = Literal["next_step", "same_step", "disabled"]


def autoreset_of(env: VectorEnv, given: str | None) -> Autoreset:
    """How `env` resets finished episodes: as `given`, or as its metadata says.

    Raises:
        ValueError: neither says, they contradict each other, or it is no mode.
    """
    said = env.metadata.get("autoreset_mode")
    mode = said if given is None else given
    found = _autoreset(mode)
    if found is not None:
        if (its_own := _autoreset(said)) not in (found, None):
            raise ValueError(
                f"autoreset_mode is {given!r}; it must be {its_own!r} or left out, since that is what the metadata of "
                f"these environments, a {type(env).__name__}, says"
            )
        return found
    if mode is None:
        raise ValueError(
            f"{type(env).__name__} does not say how it resets finished episodes (metadata['autoreset_mode']). Does the "
            "row with done carry the old episode's final observation? Then pass EnvGroup(env, "
            "autoreset_mode='next_step') for env. Or the new one's first, with the final one in infos['final_obs']? "
            "Then pass EnvGroup(env, autoreset_mode='same_step'). Or does it wait for "
            "reset(options={'reset_mask': ...})? Then autoreset_mode='disabled'. (from pyppo.envs import EnvGroup)"
        )
    raise ValueError(f"autoreset_mode is {mode!r}; it must be 'next_step', 'same_step' or 'disabled'")


def _autoreset(mode: Any) -> Autoreset | None:
    """Gymnasium's `AutoresetMode`, or its name, as one of ours; None: it is none."""
    name = str(getattr(mode, "value", mode)).lower().replace("_", "").replace("-", "")
    modes: dict[str, Autoreset] = {"nextstep": "next_step", "samestep": "same_step", "disabled": "disabled"}
    return modes.get(name)


# --- what a step gives, as it comes ---------------------------------------------------------------------------------

_STEP = ("rewards", "fiub", "numbers"), ("terminated", "bui", "bool"), ("truncated", "bui", "bool")


def check_step(num_envs: int, *given: Any) -> None:
    """That rewards, terminated and truncated are arrays `[N]` of numbers, bool and bool.

    Raises:
        TypeError: one is no NumPy array, or of another dtype. ValueError: one has another shape.
    """
    for x, (name, kinds, wanted) in zip(given, _STEP, strict=True):
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a NumPy array of {wanted}, ({num_envs},)")
        if x.shape != (num_envs,):
            raise ValueError(f"{name} has shape {x.shape}; it must be {(num_envs,)}")
        if x.dtype.kind not in kinds:
            raise TypeError(f"{name} has dtype {x.dtype}; it must be {wanted}")


def check_answer(call: str, answer: Any, parts: tuple[str, ...]) -> None:
    """That what `reset` or `step` gave has these parts: TypeError."""
    if not isinstance(answer, (tuple, list)) or len(answer) != len(parts):
        count = f"{len(answer)} values" if isinstance(answer, (tuple, list)) else f"a {type(answer).__name__}"
        raise TypeError(f"{call} gave {count}; it must give {len(parts)}: {', '.join(parts)}")
