"""The environment contract, and the face that the trainer sees of any environments that keep it.

What the trainer asks of environments, once for all of them (`EnvGroup`): N environments step side by side; observations
are a dict of arrays `[N, ...]`; a finished episode is reset by the environments themselves, in one of two ways:

- next-step (EnvPool, Gymnasium's default): the row with `terminated` or `truncated` carries the episode's final
  observation; the next row ignores its action, has reward 0 and carries the first observation of the new episode.
- same-step: the row with `terminated` or `truncated` already carries the new episode's first observation; the final
  one is in `infos["final_obs"]`.

An environment's class may offer more, as EnvPool's does; a wrapper's class offers none of what it wraps:

- `send` and `recv`: the two halves of `step`.
- `checks_actions = True`: it refuses wrong actions itself (`ActionCheck`).
- `receiver(columns)`: a thinner `recv` for a whole rollout. A subclass does not inherit it.
- `seeded_when_made = True`: `reset` takes no seed, nor through wrappers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

__all__ = [
    "ActionCheck", "Column", "Columns", "EnvGroup", "Envs", "Purpose", "Receive", "StepBatch", "as_group", "as_groups",
    "dict_space", "env_seed",
]  # fmt: skip

Purpose = Literal["train", "evaluate", "warmup"]
_PURPOSES: tuple[Purpose, ...] = ("train", "evaluate", "warmup")


class Columns(NamedTuple):
    """Where one group's answers to the steps of a rollout are written; `column[t] = array` writes one step's."""

    obs: Mapping[str, Column]
    """Row t + 1 takes the observations that follow step t."""
    rewards: Column
    terminated: Column
    truncated: Column


class Column(Protocol):
    """An array `[T, n, ...]` with T or T + 1 rows, or what writes to one."""

    def __setitem__(self, t: int, array: np.ndarray) -> None: ...


Receive = Callable[[int], None]
"""Waits for the answer to step t and writes it to a group's columns."""


class StepBatch(NamedTuple):
    """What N environments answered to one step. Arrays may be views that the next step overwrites."""

    obs: dict[str, np.ndarray]
    """Observations `[N, ...]`; the one entry of a plain array is named "obs"."""
    rewards: np.ndarray
    """`[N]` float."""
    terminated: np.ndarray
    """`[N]` bool: the episode ended in itself; nothing follows."""
    truncated: np.ndarray
    """`[N]` bool: the episode was cut off, by a time limit for example; its value goes on."""
    final_obs: dict[str, np.ndarray] | None
    """Same-step autoreset: `[D, ...]`, the final observations of the D rows that are done, in row order. Else None."""
    infos: dict[str, Any]


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


# --- actions --------------------------------------------------------------------------------------------------------


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
    if isinstance(space, spaces.Discrete):
        return np.asarray(space.start), np.asarray(space.start + space.n - 1), "iu"
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return np.asarray(space.start), space.start + space.nvec - 1, "iu"
    if isinstance(space, spaces.MultiBinary) and len(space.shape) == 1:
        return np.zeros(space.shape, np.int64), np.ones(space.shape, np.int64), "iub"
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating) and len(space.shape) >= 1:
        largest = np.finfo(np.float64).max  # an infinite action is wrong even without bounds
        # A policy in float32 rounds the bound 0.4 up when it clips to it; that is not out of range.
        low = np.minimum(space.low, space.low.astype(np.float32), dtype=np.float64)
        high = np.maximum(space.high, space.high.astype(np.float32), dtype=np.float64)
        return np.maximum(low, -largest), np.minimum(high, largest), "f"
    raise TypeError(
        f"action space {space} is not supported; it must be Discrete, MultiDiscrete or MultiBinary of one dimension, "
        "or a floating point Box of at least one"
    )


# --- one face for all -----------------------------------------------------------------------------------------------

Autoreset = Literal["next_step", "same_step"]


class EnvGroup:
    """A uniform face over a `gymnasium.vector.VectorEnv`: a dict of observations, `send` and `recv`.

    Attributes:
        num_envs: N.
        obs_space: a `Dict` space of Boxes, of one environment; a plain Box becomes its one entry "obs".
        action_space: of one environment.
        autoreset: "next_step" or "same_step".

    Args:
        env: the environments.
        autoreset_mode: "next_step" or "same_step" for environments whose metadata does not say.
        first_env: index of the first environment among all groups, for its seed.
        purpose: "train" or "evaluate", for its seed.

    Raises:
        TypeError: not a vector environment, or a space that is not supported.
        ValueError: the autoreset mode is unknown or disabled.
    """

    def __init__(
        self, env: VectorEnv, *, autoreset_mode: str | None = None, first_env: int = 0, purpose: Purpose = "train"
    ) -> None:
        if not isinstance(env, VectorEnv):
            raise TypeError(f"env is a {type(env).__name__}; it must be a gymnasium.vector.VectorEnv")
        self.env = env
        self.num_envs = env.num_envs
        self.first_env, self.purpose = first_env, purpose
        self.autoreset = _autoreset_of(env, autoreset_mode)
        self._is_dict = isinstance(env.single_observation_space, spaces.Dict)
        self.obs_space = dict_space(env.single_observation_space)
        self.action_space = env.single_action_space
        check = ActionCheck(self.action_space, self.num_envs)
        # Only what a class itself defines: a wrapper that passed these two through would be left out of the step.
        self._split = hasattr(type(env), "send") and hasattr(type(env), "recv")
        self._check = _accept if _says(env, "checks_actions") else check
        self._actions: np.ndarray | None = None
        self._pending = False

    def reset(self, seed: int | None = None) -> dict[str, np.ndarray]:
        """Start new episodes. `seed`, hashed, seeds the environments where they can be seeded after they are made;
        EnvPool's cannot (`pyppo.envpool_envs.make_envs` did)."""
        fixed = _says(self.env.unwrapped, "seeded_when_made")
        self._actions = None
        if self._pending:  # an answer nobody took would be the next one's; from an idle EnvPool it is empty
            self._pending = False
            self.env.recv()  # type: ignore[attr-defined]
        obs, _ = self.env.reset(seed=None if seed is None or fixed else self._seeds(seed))  # type: ignore[arg-type]
        observations = self._as_dict(obs)
        for name, space in self.obs_space.spaces.items():
            was, wanted = getattr(observations.get(name), "shape", None), (self.num_envs, *(space.shape or ()))
            if was != wanted:
                raise ValueError(f"observation {name!r} has shape {was}; it must be {wanted}")
        return observations

    def _seeds(self, seed: int) -> int | list[int]:
        seeds = [env_seed(seed, self.purpose, 0, self.first_env + i, 0) for i in range(self.num_envs)]
        return seeds if isinstance(self.env.unwrapped, (SyncVectorEnv, AsyncVectorEnv)) else seeds[0]

    def send(self, actions: np.ndarray) -> None:
        """Start a step; where the environment has no `send`, the step is taken in `recv`."""
        self._check(actions)
        if self._split:
            self._pending = True  # beforehand: an interrupt may come between the two
            try:
                self.env.send(actions)  # type: ignore[attr-defined]
            except Exception:  # refused, so there is nothing to wait for
                self._pending = False
                raise
        else:
            self._actions = actions

    def recv(self) -> StepBatch:
        """Finish the step."""
        if self._split:
            obs, rewards, terminated, truncated, infos = self.env.recv()  # type: ignore[attr-defined]
            self._pending = False
        else:
            if self._actions is None:
                raise RuntimeError("recv was called before send")
            actions, self._actions = self._actions, None
            obs, rewards, terminated, truncated, infos = self.env.step(actions)
        final_obs = None
        if self.autoreset == "same_step":
            final_obs = self._final_obs(infos, terminated | truncated)
        return StepBatch(self._as_dict(obs), rewards, terminated, truncated, final_obs, infos)

    def receiver(self, columns: Columns) -> Receive | None:
        """A thinner `recv` for a whole rollout, where the environments have one."""
        # Not from a base class: what a subclass changes would be left out.
        if "receiver" not in vars(type(self.env)) or type(self).recv is not EnvGroup.recv:
            return None
        write = self.env.receiver(columns)  # type: ignore[attr-defined]

        def receive(t: int) -> None:
            write(t)
            self._pending = False

        return receive

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    def _as_dict(self, obs: Any) -> dict[str, np.ndarray]:
        return obs if self._is_dict else {"obs": obs}

    def _final_obs(self, infos: dict[str, Any], done: np.ndarray) -> dict[str, np.ndarray] | None:
        """Gymnasium gives an object array with one observation a done row; array environments give a batch."""
        rows = np.flatnonzero(done)
        if not len(rows):
            return None
        if "final_obs" not in infos:
            raise ValueError(
                "infos has no 'final_obs' in a step with a done row; it must have one: the autoreset mode is same-step"
            )
        final = infos["final_obs"]
        if isinstance(final, Mapping):
            return {name: _take(final[name], rows) for name in self.obs_space.spaces}
        if not self._is_dict:
            return {"obs": _take(final, rows)}
        return {name: np.stack([final[row][name] for row in rows]) for name in self.obs_space.spaces}


Envs = VectorEnv | EnvGroup | Sequence[VectorEnv | EnvGroup]
"""What `Trainer` takes: a `VectorEnv`, an `EnvGroup` where the autoreset mode must be said, or several of them."""


def as_group(env: VectorEnv | EnvGroup, *, first_env: int = 0, purpose: Purpose = "train") -> EnvGroup:
    """A new group over the environments of `env`, in the autoreset mode of a ready group or of the metadata."""
    if isinstance(env, EnvGroup):
        return EnvGroup(env.env, autoreset_mode=env.autoreset, first_env=first_env, purpose=purpose)
    return EnvGroup(env, first_env=first_env, purpose=purpose)


def as_groups(envs: Envs) -> list[EnvGroup]:
    """The user's environments, each a group, in the order given.

    Raises:
        ValueError, TypeError: there is none, or one does not keep the environment contract.
    """
    if not isinstance(envs, (VectorEnv, EnvGroup, Sequence)) or isinstance(envs, str):
        raise TypeError(f"envs is a {type(envs).__name__}; it must be {_ENVS}")
    groups: list[EnvGroup] = []
    for env in [envs] if isinstance(envs, (VectorEnv, EnvGroup)) else envs:
        groups.append(as_group(env, first_env=sum(group.num_envs for group in groups)))
    if not groups:
        raise ValueError(f"envs is empty; it must be {_ENVS}")
    return groups


_ENVS = "a gymnasium.vector.VectorEnv, an EnvGroup of one, or a sequence of them"


def _take(batch: Sequence[Any], rows: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(batch[row]) for row in rows])


def _says(env: VectorEnv, trait: str) -> bool:
    """Whether the environment's own class says so; asked of the object, a wrapper might answer for what it wraps."""
    return bool(getattr(type(env), trait, False))


def _accept(actions: np.ndarray) -> None:
    """The environment checks its own actions."""


def _autoreset_of(env: VectorEnv, given: str | None) -> Autoreset:
    mode = env.metadata.get("autoreset_mode") if given is None else given
    name = str(getattr(mode, "value", mode)).lower().replace("_", "").replace("-", "")
    if name == "nextstep":
        return "next_step"
    if name == "samestep":
        return "same_step"
    if name == "disabled":
        raise ValueError(
            f"{type(env).__name__} has autoreset disabled; it must reset finished episodes itself, "
            "in the next step (AutoresetMode.NEXT_STEP) or the same one (AutoresetMode.SAME_STEP)"
        )
    if mode is None:
        raise ValueError(
            f"{type(env).__name__} does not say how it resets finished episodes (metadata['autoreset_mode']). Does the "
            "row with done carry the old episode's final observation? Then pass EnvGroup(env, "
            "autoreset_mode='next_step') for env. Or the new one's first, with the final one in infos['final_obs']? "
            "Then pass EnvGroup(env, autoreset_mode='same_step'). (from pyppo.envs import EnvGroup)"
        )
    raise ValueError(f"autoreset_mode is {mode!r}; it must be 'next_step' or 'same_step'")


def dict_space(space: spaces.Space) -> spaces.Dict:
    """An observation space as `EnvGroup` has it: a plain Box becomes the one entry "obs" of a Dict."""
    entries = space.spaces if isinstance(space, spaces.Dict) else {"obs": space}
    for name, entry in entries.items():
        if not isinstance(entry, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise TypeError(
                f"observation space {name!r} is {entry}; it must be a Box or a finite space, or a Dict of them"
            )
    return space if isinstance(space, spaces.Dict) else spaces.Dict(entries)
