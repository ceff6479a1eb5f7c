"""EnvPool's environments: the adapter to the environment contract, and how they are found and made.

Only this module imports envpool.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NoReturn, TypeVar

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from pyppo.contract import Columns, Purpose, Receive, env_seed, finite_ends
from pyppo.cores import thread_ids
from pyppo.masks import MASK, MASK_INFOS, policy_spaces
from pyppo.ops import PoolReader, PoolSender
from pyppo.spaces import ActionCheck, flatten_space

__all__ = [
    "EnvPoolVectorEnv", "auto_threads", "env_spaces", "family_of", "list_envs", "make_envs", "thread_ids",
]  # fmt: skip

Made = TypeVar("Made")


def _import_envpool() -> Any:
    try:
        import envpool
        import envpool.registration
    except ImportError as error:
        raise ImportError(
            "EnvPool is not installed; install it with `pip install 'pyppo[envpool]'`, or pass your own "
            "gymnasium.vector.VectorEnv to pyppo.Trainer"
        ) from error
    return envpool


class EnvPoolVectorEnv(VectorEnv):
    """One synchronous EnvPool pool as a `gymnasium.vector.VectorEnv` in next-step autoreset, so that wrappers compose.

    `send` and `recv` are the two halves of `step`. They go straight to EnvPool's compiled calls: its Python wrapper
    costs about 8 us a step, as much as sixty-four CartPole steps. Nested observations are given flat, with the names
    that EnvPool has for them ("ems/x1"); a mask that EnvPool gives in its infos is the observation entry "action_mask".

    EnvPool says truncated where an episode ends in itself exactly at its step limit.

    Args:
        pool: made by `envpool.make(..., env_type="gymnasium")`; synchronous, one player an environment.
        threads: the system's numbers of the pool's threads, where they are known.

    Attributes:
        one_core: whether the caller shares its core with the pool's threads (`pyppo.cores.Cores` says so).
        reports_games: whether this is Atari, whose infos have the game's own reward and end.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    checks_actions = True
    seeded_when_made = True

    def __init__(self, pool: Any, threads: frozenset[int] = frozenset()) -> None:
        self.threads, self.one_core = threads, False
        config = pool.config
        if config["batch_size"] not in (0, config["num_envs"]):
            raise ValueError(
                f"pool has batch_size {config['batch_size']}; it must be num_envs = {config['num_envs']} (synchronous)"
            )
        if (why := _why_not(config["max_num_players"])) is not None:
            raise ValueError(f"pool cannot be used: {why}")
        self._pool = pool
        self._pid = os.getpid()
        self.num_envs = int(config["num_envs"])
        self.single_observation_space = _observation_space(pool.spec)
        self.single_action_space = pool.spec.gymnasium_action_space
        self._check = ActionCheck(self.single_action_space, self.num_envs)
        self._ids = np.arange(self.num_envs, dtype=np.int32)
        self._read_layout(pool)
        self._send, self._recv = pool._send, pool._recv
        # What the pool's threads read the actions from, while the caller may already write the next ones. They have
        # read all of it when the step is received, so one buffer is enough.
        self._actions = np.zeros(self._check.shape, self._action_dtype)
        self._message = [self._ids, self._ids, self._actions]
        self._sender = PoolSender(self._send, self._message, self._actions, *self._check.bounds())

    def _read_layout(self, pool: Any) -> None:
        """Where each array lies in what EnvPool's compiled calls take and give."""
        if list(pool._action_keys[:2]) != ["env_id", "players.env_id"] or len(pool._action_keys) != 3:
            raise TypeError(f"pool takes the action arrays {list(pool._action_keys)}; it must take one besides the ids")
        self._action_dtype = pool._spec._action_spec[2][0]
        keys = list(pool._state_keys)
        self._done, self._truncated, self._reward = (keys.index(key) for key in ("done", "trunc", "reward"))
        obs = [(_entry_name(key), i) for i, key in enumerate(keys) if _is_obs(key)]
        infos = [key for key in keys if key.startswith("info:") and key not in _ID_INFOS]
        self._infos = [(key.removeprefix("info:"), keys.index(key)) for key in infos]
        self._obs: list[tuple[str, int]] | None = None
        self._plain_obs = obs[0][1]
        if isinstance(self.single_observation_space, spaces.Dict):
            masks = [(MASK, dict(self._infos)[name]) for name in MASK_INFOS if name in dict(self._infos)]
            self._obs = obs + (masks[:1] if MASK not in dict(obs) else [])
            if set(dict(self._obs)) != set(self.single_observation_space.spaces):
                raise TypeError(f"pool gives {sorted(dict(self._obs))}; it must be as {self.single_observation_space}")
        self.reports_games = {"reward", "terminated", "lives"} <= {name for name, _ in self._infos}
        self._game = [keys.index(f"info:{name}") for name in ("reward", "terminated")] if self.reports_games else []

    # VectorEnv wants both as attributes; batching an Atari space takes 28 MB at 1,024 environments, mostly for nothing.
    @cached_property
    def observation_space(self) -> spaces.Space:  # type: ignore[override]
        """Of all environments together."""
        return batch_space(self.single_observation_space, self.num_envs)

    @cached_property
    def action_space(self) -> spaces.Space:  # type: ignore[override]
        """Of all environments together."""
        return batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: None = None, options: None = None) -> tuple[Any, dict[str, Any]]:  # type: ignore[override]
        """Start new episodes everywhere. Seeds are fixed when the pool is made: `seed` must be None."""
        if seed is not None:
            raise ValueError(f"seed is {seed}; it must be None: EnvPool is seeded when made (make_envs(seed=...))")
        if options:
            raise ValueError(f"options is {options}; it must be None: EnvPool takes its options when made")
        self._guard()
        self._pool._reset(self._ids)
        state = self._pool._recv()
        return self._observation(state), {name: state[i] for name, i in self._infos}

    def send(self, actions: np.ndarray) -> None:
        """Start a step. Actions: `[N]` or `[N, D]` in the action space; checked and copied."""
        self._guard()
        if self._sender.send(actions, self.one_core):
            return
        self._check(actions)  # says what is wrong; or they are right, and only for NumPy to convert
        self._actions[...] = actions
        self._send(self._message)
        if self.one_core:
            os.sched_yield()

    def recv(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Finish the step: observation, rewards `[N]` float32, terminated `[N]`, truncated `[N]`, infos."""
        state = self._recv()
        truncated = state[self._truncated]
        terminated = state[self._done] > truncated  # done and not truncated
        infos = {name: state[i] for name, i in self._infos}
        return self._observation(state), state[self._reward], terminated, truncated, infos

    def receiver(self, columns: Columns) -> Receive:
        """`recv` for a whole rollout, thinner: each answer goes straight to its place, infos nowhere.

        What it writes to `terminated` is "done", truncated or not: `terminated &= ~truncated`, once for all steps, is
        left to the caller.
        """
        done, cut = self._done, self._truncated
        flags = [(columns.rewards, self._reward), (columns.terminated, done), (columns.truncated, cut)]
        observations = [(columns.obs[name], i) for name, i in self._obs or [("obs", self._plain_obs)]]

        def ends(x: np.ndarray, state: list[np.ndarray]) -> np.ndarray:
            return finite_ends(x, state[done] > state[cut])

        # Through `self`, or a closed pool would live on, and be waited for.
        receive = PoolReader(lambda: self._recv(), flags, observations, done, ends).read
        raw, over = columns.episode_rewards, columns.episode_over
        if raw is None or over is None:
            return receive
        raw_reward, game_over = self._game

        def receive_games(t: int) -> None:
            state = receive(t)
            raw[t] = state[raw_reward]
            np.logical_or(state[game_over], state[cut], out=over[t])

        return receive_games

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """`send` and `recv`."""
        self.send(actions)
        return self.recv()

    def close_extras(self, **kwargs: Any) -> None:
        """Let the pool go; its threads end with it."""
        self._pool, self._send, self._recv = None, self._closed, self._closed
        self._sender = PoolSender(self._closed, self._message, self._actions, *self._check.bounds())

    def _observation(self, state: list[np.ndarray]) -> Any:
        if self._obs is None:
            return state[self._plain_obs]
        return {name: state[i] for name, i in self._obs}

    def _guard(self) -> None:
        if self._pool is None:
            self._closed()
        if os.getpid() != self._pid:
            raise RuntimeError("EnvPool hangs after a fork; make the environments in the process that uses them")

    def _closed(self, *_: Any) -> NoReturn:
        raise RuntimeError("the environments are closed")


# Batches of these take less time than waking a second core does (about 40 us).
_CHEAP_FAMILIES = ("classic_control", "toy_text", "minigrid")


def auto_threads(env_id: str, num_envs: int) -> int:
    """EnvPool threads where none are asked for: one for classic control, toy text and MiniGrid, whose steps take
    a microsecond; otherwise one for each environment, at most one for each core that this process may use."""
    return 1 if is_cheap(env_id) else min(num_envs, len(os.sched_getaffinity(0)))


def is_cheap(env_id: str) -> bool:
    """Whether a step takes about a microsecond: classic control, toy text, MiniGrid."""
    return family_of(env_id).startswith(_CHEAP_FAMILIES)


_RESERVED_OPTIONS = ("batch_size", "env_seed", "env_type", "num_envs", "num_threads", "seed", "task_id")


def list_envs() -> list[str]:
    """The names of EnvPool's environments, sorted."""
    return sorted(_import_envpool().list_all_envs())


def family_of(env_id: str) -> str:
    """The family that EnvPool has an environment in, "atari" or "mujoco.dmc" for example."""
    return str(_import_envpool().registration.registry.specs[env_id][0]).removeprefix("envpool.")


def env_spaces(env_id: str, options: Mapping[str, Any] | None = None) -> tuple[spaces.Dict, spaces.Space]:
    """Observation and action space, as `EnvGroup` has them, of one environment of `make_envs`, without making it.

    Raises:
        as `make_envs`.
    """
    make_spec = _import_envpool().make_spec

    def make() -> tuple[spaces.Dict, spaces.Space]:
        spec = make_spec(env_id, **(options or {}))
        if (why := _why_not(spec.config.max_num_players)) is not None:
            raise ValueError(f"{env_id} cannot be trained: {why}")
        if (file := _missing_file(spec.config)) is not None:
            raise OSError(f"EnvPool cannot make {env_id} here: its installation lacks {file}")
        return policy_spaces(_observation_space(spec), spec.gymnasium_action_space)[:2]

    return _configured(env_id, options, make)


_SUDOKU = {"mixed": "10000_mixed_puzzles.npy", "very-easy": "1000_very_easy_puzzles.npy"}


def _missing_file(config: Any) -> str | None:
    """A file that these environments read when they are made and that is not there: EnvPool's wheels lack some."""
    files = {name: getattr(config, name) for name in ("cfg_path", "wad_path", "vzd_path") if hasattr(config, name)}
    if getattr(config, "sudoku_database", None) in _SUDOKU:  # read even where a board is given
        folder = os.path.join(config.base_path, "jumanji", "assets", "sudoku")  # noqa: PTH118
        files["sudoku_database"] = os.path.join(folder, _SUDOKU[config.sudoku_database])  # noqa: PTH118
    return next((file for file in files.values() if file and not os.path.exists(file)), None)  # noqa: PTH110


_ID_INFOS = ("info:env_id", "info:players.env_id")


def _is_obs(key: str) -> bool:
    return key == "obs" or key.startswith("obs:")


def _entry_name(key: str) -> str:
    """The flat name of one of EnvPool's arrays, which joins nested ones by "." or ":"."""
    return key.removeprefix("obs").lstrip(":").replace(".", "/").replace(":", "/") or "obs"


def _observation_space(spec: Any) -> spaces.Space:
    """A pool's observation space: a plain space, or a flat Dict, which has the mask that EnvPool gives in its infos."""
    space = spec.gymnasium_observation_space
    flat = {name: entry.space for name, entry in flatten_space(space).items()}
    arrays = spec.state_array_spec
    masks = [arrays[f"info:{name}"] for name in MASK_INFOS if f"info:{name}" in arrays]
    if masks and MASK not in flat:
        return spaces.Dict({**flat, MASK: spaces.MultiBinary(tuple(masks[0].shape))})
    return spaces.Dict(flat) if isinstance(space, spaces.Dict) else space


def _why_not(max_num_players: int) -> str | None:
    """Why environments with so many players cannot be trained; None: they can."""
    if max_num_players == 1:
        return None
    return f"it has up to {max_num_players} players an environment; pyppo trains environments of one player"


def make_envs(
    env_id: str,
    num_envs: int,
    seed: int,
    *,
    purpose: Purpose = "train",
    rank: int = 0,
    rebuild: int = 0,
    first_env: int = 0,
    num_threads: int = 0,
    options: Mapping[str, Any] | None = None,
) -> EnvPoolVectorEnv:
    """A pool of `num_envs` environments, each seeded by its own hash (see `env_seed`).

    Args:
        first_env: index of the pool's first environment among all groups; the same environment gets the same seed
            however `num_envs` are split into pools.
        num_threads: 0 chooses (see `auto_threads`). Trajectories are the same for any number.
        options: further arguments of `envpool.make`.

    Raises:
        ImportError: EnvPool is not installed.
        ValueError: no such environment, an option that it does not take, or one that is set here.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}; it must be at least 1")
    envpool = _import_envpool()
    seeds = [env_seed(seed, purpose, rank, first_env + i, rebuild) for i in range(num_envs)]

    def make() -> EnvPoolVectorEnv:
        threads, before = num_threads or auto_threads(env_id, num_envs), thread_ids()
        pool = envpool.make(
            env_id, env_type="gymnasium", num_envs=num_envs, seed=seeds, num_threads=threads, **(options or {})
        )
        return EnvPoolVectorEnv(pool, thread_ids() - before)

    return _configured(env_id, options, make)


# Doom's games against other players, which nobody joins: EnvPool 1.2 reads past them, and the process is gone.
_CRASHING = ("Cig-v1", "MultiDuel-v1")


def _configured(env_id: str, options: Mapping[str, Any] | None, make: Callable[[], Made]) -> Made:
    """What `make` makes of an environment, after checks of its name and its options."""
    known = list_envs()
    if env_id not in known:
        close = difflib.get_close_matches(str(env_id), known, n=3)
        hint = f" (near: {', '.join(close)})" if close else ""
        others = "; environments of your own, Gymnasium's too, are the envs of pyppo.Trainer(config, envs=...)"
        raise ValueError(f"env_id is {env_id!r}; it must be one of EnvPool's {len(known)} environments{hint}{others}")
    if env_id in _CRASHING:
        raise ValueError(
            f"{env_id} cannot be trained: it is a game of several players, and EnvPool crashes at its start"
        )
    if not isinstance(options, (Mapping, type(None))):
        raise TypeError(f"options is {options!r}; it must be a mapping of EnvPool's arguments to values")
    for name in options or {}:
        if name in _RESERVED_OPTIONS:
            raise ValueError(f"options has {name!r}; it must be left to make_envs and the configuration")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*precision lowered.*")  # bounds given in float64
        try:
            return make()
        except TypeError as error:
            if not options:
                raise
            raise ValueError(f"env_options has {dict(options)}, which {env_id} does not take: {error}") from error
        except RuntimeError as error:  # files that this installation of EnvPool lacks, for example
            raise OSError(f"EnvPool cannot make {env_id} here: {error}") from error
