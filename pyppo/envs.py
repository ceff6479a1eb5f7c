"""The face that the trainer sees of any environments that keep the contract (`pyppo.contract`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from pyppo.contract import (
    Column,
    Columns,
    Purpose,
    Receive,
    StepBatch,
    autoreset_of,
    check_answer,
    check_step,
    env_seed,
    finite_ends,
)
from pyppo.gymnasium_envs import blame, final_rows, finish_interrupted, refuse_shared
from pyppo.masks import MASK, MASK_INFOS, ActionMask, dict_of, mask_shape, masks_in, split_mask
from pyppo.spaces import ActionCheck, ObservationCheck, choices, dict_space, flatten_space

__all__ = [
    "ActionCheck", "Column", "Columns", "EnvGroup", "Purpose", "Receive", "StepBatch", "dict_space", "env_seed",
]  # fmt: skip

_RESETS: WeakKeyDictionary[VectorEnv, int] = WeakKeyDictionary()
"""By environments, since several groups may be over the same ones: of a trainer and of an evaluation."""

_RESET, _STEP = ("obs", "infos"), ("obs", "rewards", "terminated", "truncated", "infos")
# When it is asked to put arrays together of which one has another shape or dtype, as observations or infos had before.
_NUMPY_SAYS = ("broadcast", "Output array", "Cannot cast array")


class EnvGroup:
    """A uniform face over a `gymnasium.vector.VectorEnv`: a flat dict of observations, `send` and `recv`.

    Attributes:
        num_envs: N.
        obs_space: of one environment, a flat `Dict` of Box, Discrete, MultiDiscrete and MultiBinary; a plain space is
            the one entry "obs", an action mask the entry "action_mask", a MultiBinary.
        action_space: of one environment; where masks are of combinations of actions (`pyppo.masks.ActionMask`), the
            Discrete space of these.
        autoreset: "next_step" or "same_step".
        reports_games: whether `StepBatch.episode_rewards` and `episode_over` are given.

    Args:
        env: the environments.
        autoreset_mode: "next_step", "same_step" or "disabled" for environments whose metadata does not say.
        mask_in_infos: whether `infos` has an action mask ("action_mask" or "legal_action_mask"); the environments are
            then reset once to see its shape. None: it is looked for in Gymnasium's own vector environments.
        first_env: index of the first environment among all groups, for its seed.
        purpose: "train" or "evaluate", for its seed.

    Raises:
        TypeError: not a vector environment, or a space that is not supported.
        ValueError: the autoreset mode is unknown or contradicts the metadata, two rows are the same environment, or the
            mask does not fit the action space.
    """

    def __init__(
        self,
        env: VectorEnv,
        *,
        autoreset_mode: str | None = None,
        mask_in_infos: bool | None = None,
        first_env: int = 0,
        purpose: Purpose = "train",
    ) -> None:
        if not isinstance(env, VectorEnv):
            raise TypeError(f"env is a {type(env).__name__}; it must be a gymnasium.vector.VectorEnv")
        refuse_shared(env.unwrapped)
        self.env = env
        self.num_envs = env.num_envs
        self.first_env, self.purpose = first_env, purpose
        self.autoreset_mode = autoreset_of(env, autoreset_mode)
        self.autoreset: Literal["next_step", "same_step"] = (
            "next_step" if self.autoreset_mode == "next_step" else "same_step"
        )
        self.mask_in_infos = mask_in_infos
        self.owned = False
        self.reports_games = bool(getattr(env.unwrapped, "reports_games", False))
        entries = flatten_space(env.single_observation_space)
        self._features, self._mask_parts = split_mask(entries)
        self._observed = ObservationCheck(entries, self.num_envs, first_env)
        self._entries = entries
        # Refuses what is not supported; a mask of continuous actions would mean nothing.
        finite = choices(env.single_action_space) is not None
        if mask_in_infos is None and not finite and not isinstance(env.single_action_space, spaces.MultiBinary):
            self.mask_in_infos = False
        # Only what a class itself defines: a wrapper that passed these two through would be left out of the step.
        self._split = hasattr(type(env), "send") and hasattr(type(env), "recv")
        self._checks = not _says(env, "checks_actions")
        self._mask: ActionMask | None = None
        self._spaces: tuple[spaces.Dict, spaces.Space] | None = None
        self._check = ActionCheck(env.single_action_space, self.num_envs)
        self._info_mask: str | None = None
        self._actions: np.ndarray | None = None
        self._pending = False
        self._steps = 0

    def place(self, first_env: int, purpose: Purpose) -> None:
        """Say which environments of all groups these are, and what for: seeds and messages go by it."""
        self.first_env, self.purpose = first_env, purpose
        self._observed.first_env = first_env
        if self._mask is not None:
            self._mask.first_env = first_env

    # --- spaces ------------------------------------------------------------------------------------------------------

    @property
    def resets(self) -> int:
        """How often the environments were reset, by this group or another one over them."""
        try:
            return _RESETS.get(self.env.unwrapped, 0)
        except TypeError:  # not hashable, a dataclass for example: such are not watched
            return 0

    def _count_reset(self) -> None:
        with suppress(TypeError):
            _RESETS[self.env.unwrapped] = self.resets + 1

    @property
    def obs_space(self) -> spaces.Dict:
        """Of one environment, flat."""
        return self._known_spaces()[0]

    @property
    def action_space(self) -> spaces.Space:
        """Of one environment."""
        return self._known_spaces()[1]

    def _known_spaces(self) -> tuple[spaces.Dict, spaces.Space]:
        if self._spaces is None:
            infos = {}
            look = self.mask_in_infos
            if look is None:
                look = isinstance(self.env.unwrapped, (SyncVectorEnv, AsyncVectorEnv))
            if look and not self._mask_parts:
                self._count_reset()
                finish_interrupted(self.env.unwrapped)
                infos = self._ask(lambda: self.env.reset())[1]
            self._settle(infos)
        assert self._spaces is not None
        return self._spaces

    def _settle(self, infos: Mapping[str, Any]) -> None:
        """Decide where the action mask is, with the infos of a reset, and with it the spaces."""
        space, shape = self.env.single_action_space, None
        if self._mask_parts:
            shape = mask_shape(self._mask_parts)
        elif self.mask_in_infos is not False:
            self._info_mask = next((name for name in MASK_INFOS if name in infos), None)
            if self._info_mask is not None:
                shape = self._masks_of(infos).shape[1:]
            elif self.mask_in_infos:
                raise ValueError(f"infos has {sorted(infos)}; it must have 'action_mask' or 'legal_action_mask'")
        if shape is not None:
            self._mask = ActionMask(shape, space, self.first_env)
            if self._mask.joint:
                self._checks, self._check = True, ActionCheck(self._mask.action_space, self.num_envs)
        space = space if self._mask is None else self._mask.action_space
        self._spaces = dict_of(self._features, self._mask), space

    # --- stepping ----------------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> dict[str, np.ndarray]:
        """Start new episodes. `seed`, hashed, seeds the environments where they can be seeded after they are made;
        EnvPool's cannot (`pyppo.envpool_envs.make_envs` did)."""
        fixed = _says(self.env.unwrapped, "seeded_when_made")
        self._actions, self._steps = None, 0
        self._count_reset()
        finish_interrupted(self.env.unwrapped)
        if self._pending:  # an answer nobody took would be the next one's; from an idle EnvPool it is empty
            self._pending = False
            self.env.recv()  # type: ignore[attr-defined]
        seeds = None if seed is None or fixed else self._seeds(seed)
        answer = self._ask(lambda: self.env.reset(seed=seeds))  # type: ignore[arg-type]
        check_answer(f"reset of {type(self.env).__name__}", answer, _RESET)
        obs, infos = answer
        arrays = self._arrays(obs)
        self._observed.first(arrays)
        if self._spaces is None:
            self._settle(infos)
        elif self._mask is None and self.mask_in_infos is None and any(name in infos for name in MASK_INFOS):
            raise ValueError(
                f"infos of {type(self.env).__name__} has an action mask. Shall it be used? Then pass EnvGroup(env, "
                "mask_in_infos=True) for env, which is reset once to see its shape; else mask_in_infos=False. (from "
                "pyppo.envs import EnvGroup)"
            )
        return self._observations(arrays, infos, None)

    def _seeds(self, seed: int) -> int | list[int]:
        seeds = [env_seed(seed, self.purpose, 0, self.first_env + i, 0) for i in range(self.num_envs)]
        return seeds if isinstance(self.env.unwrapped, (SyncVectorEnv, AsyncVectorEnv)) else seeds[0]

    def send(self, actions: np.ndarray) -> None:
        """Start a step; where the environment has no `send`, the step is taken in `recv`."""
        if self._checks:
            self._check(actions)
        if self._mask is not None and self._mask.joint:
            actions = self._mask.to_env(actions)
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
            answer = self._ask(lambda: self.env.step(actions))
            check_answer(f"step of {type(self.env).__name__}", answer, _STEP)
            obs, rewards, terminated, truncated, infos = answer
        self._steps += 1
        check_step(self.num_envs, rewards, terminated, truncated)
        arrays, done = self._arrays(obs), np.asarray(terminated | truncated, bool)
        self._observed(arrays, self._steps)
        games = self._game(infos, truncated) if self.reports_games else (None, None)
        final_obs = None
        if self.autoreset_mode == "next_step":
            if terminated.any():
                arrays = {name: finite_ends(x, np.asarray(terminated, bool)) for name, x in arrays.items()}
            observations = self._observations(arrays, infos, done)
        elif not done.any():
            observations = self._observations(arrays, infos, None)
        elif self.autoreset_mode == "same_step":
            final_obs = self._final_obs(infos, done)
            observations = self._observations(arrays, infos, None)
        else:
            final_obs = self._finals({name: arrays[name][done] for name in self._features})
            terminated, truncated = terminated.copy(), truncated.copy()
            observations = self._reset_rows(arrays, infos, done)
        return StepBatch(observations, rewards, terminated, truncated, final_obs, infos, *games)

    def _reset_rows(
        self, arrays: dict[str, np.ndarray], infos: Mapping[str, Any], done: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Disabled autoreset: the observations after a reset of the rows that are done."""
        merged = {name: x.copy() for name, x in arrays.items()}  # beforehand: the arrays may be the environment's own
        obs, reset_infos = self._ask(lambda: self.env.reset(options={"reset_mask": done.copy()}))
        fresh = self._arrays(obs)
        self._observed(fresh, self._steps)
        for name, x in merged.items():
            x[done] = fresh[name][done]
        if self._info_mask is None:
            return self._observations(merged, infos, None)
        before, after = self._masks_of(infos, done), self._masks_of(reset_infos, ~done)
        before, after = before.reshape(self.num_envs, -1), after.reshape(self.num_envs, -1)
        masks = np.where(done[:, None], after, before)
        return self._observations(merged, {self._info_mask: masks}, None)

    def receiver(self, columns: Columns) -> Receive | None:
        """A thinner `recv` for a whole rollout, where the environments have one."""
        # Not from a base class: what a subclass changes would be left out.
        if "receiver" not in vars(type(self.env)) or type(self).recv is not EnvGroup.recv:
            return None
        self._known_spaces()
        obs: dict[str, Column] = dict(columns.obs)
        for name in self._observed.limits:
            obs[name] = _Through(columns.obs[name], partial(self._limited, name))
        if (mask := self._mask) is not None:
            ignores = self.autoreset == "next_step"

            def read(t: int, x: np.ndarray) -> np.ndarray:
                ignored = columns.terminated[t - 1] | columns.truncated[t - 1] if ignores else None
                return mask.read(x, ignored, self._steps)

            obs[MASK] = _Through(columns.obs[MASK], read)
        write = self.env.receiver(columns._replace(obs=obs))  # type: ignore[attr-defined]

        def receive(t: int) -> None:
            self._steps += 1
            write(t)
            self._pending = False

        return receive

    def _limited(self, name: str, t: int, x: np.ndarray) -> np.ndarray:
        self._observed.check_limits(name, x)
        return x

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    # --- what the environments gave ----------------------------------------------------------------------------------

    def _ask(self, call: Callable[[], Any]) -> Any:
        """What `reset` or `step` gives; where Gymnasium cannot put observations together, says which one is wrong."""
        try:
            return call()
        except (ValueError, TypeError, KeyError) as error:
            if (found := blame(self.env.unwrapped)) is not None:
                raise ValueError(f"{found} (step {self._steps + 1})") from error
            if any(said in str(error) for said in _NUMPY_SAYS):
                raise ValueError(
                    f"{type(self.env).__name__} failed at step {self._steps + 1}: {error}. What an environment gives, "
                    "its infos and the action mask in them included, must keep its shape"
                ) from error
            raise

    def _arrays(self, obs: Any) -> dict[str, np.ndarray]:
        """All entries of an observation, by name."""
        arrays = {}
        for name, entry in self._entries.items():
            x = obs
            try:
                for key in entry.path:
                    x = x[key]
            except (KeyError, IndexError, TypeError):
                raise ValueError(f"observation has no entry {name!r}; it must be as the observation space") from None
            arrays[name] = x
        return arrays

    def _observations(
        self, arrays: dict[str, np.ndarray], infos: Mapping[str, Any], ignored: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """The trainer's observations: features, and the mask in its one form."""
        if self._mask is None:
            return arrays
        if self._mask_parts:
            parts = [arrays[name] for name in self._entries if name not in self._features]
            raw = parts[0] if len(parts) == 1 else np.concatenate([x.reshape(len(x), -1) for x in parts], axis=1)
        else:
            raw = self._masks_of(infos, ignored)
        return {**{name: arrays[name] for name in self._features}, MASK: self._mask.read(raw, ignored, self._steps)}

    def _masks_of(self, infos: Mapping[str, Any], unneeded: np.ndarray | None = None) -> np.ndarray:
        assert self._info_mask is not None
        if self._mask is not None and unneeded is not None and unneeded.all() and self._info_mask not in infos:
            return np.ones((self.num_envs, self._mask.width), bool)  # Gymnasium leaves out what no row has
        return masks_in(infos, self._info_mask, self.num_envs, unneeded, self._steps, self.first_env)

    def _game(self, infos: Mapping[str, Any], truncated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The game's own rewards, and where it is over."""
        return infos["reward"], (infos["terminated"] != 0) | truncated

    def _finals(self, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Final observations `[D, ...]`; nothing is drawn from them, so every action is allowed."""
        if self._mask is None:
            return features
        count = len(next(iter(features.values())))
        return {**features, MASK: np.ones((count, self._mask.width), bool)}

    def _final_obs(self, infos: Mapping[str, Any], done: np.ndarray) -> dict[str, np.ndarray]:
        if "final_obs" not in infos:
            raise ValueError(
                "infos has no 'final_obs' in a step with a done row; it must have one: the autoreset mode is same-step"
            )
        return self._finals(final_rows(infos["final_obs"], self._features, np.flatnonzero(done)))


class _Through:
    """A column that changes or checks what is written to it."""

    def __init__(self, column: Column, change: Callable[[int, np.ndarray], np.ndarray]) -> None:
        self._column, self._change = column, change

    def __setitem__(self, t: int, array: np.ndarray) -> None:
        self._column[t] = self._change(t, array)


def _says(env: VectorEnv, trait: str) -> bool:
    """Whether the environment's own class says so; asked of the object, a wrapper might answer for what it wraps."""
    return bool(getattr(type(env), trait, False))
