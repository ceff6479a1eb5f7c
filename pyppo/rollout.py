"""The [T, N] storage of a rollout, and the loop that fills it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from pyppo.masks import MASK
from pyppo.spaces import dict_space

__all__ = ["Act", "Collector", "Episode", "Rollout", "find_not_finite"]


class Step(Protocol):
    """What a group answers to one step; `pyppo.envs.StepBatch` says what each array is."""

    @property
    def obs(self) -> dict[str, np.ndarray]: ...
    @property
    def rewards(self) -> np.ndarray: ...
    @property
    def terminated(self) -> np.ndarray: ...
    @property
    def truncated(self) -> np.ndarray: ...
    @property
    def final_obs(self) -> dict[str, np.ndarray] | None: ...
    @property
    def episode_rewards(self) -> np.ndarray | None: ...
    @property
    def episode_over(self) -> np.ndarray | None: ...


class Group(Protocol):
    """What the collector needs of a group of environments; `pyppo.envs.EnvGroup` says what each is."""

    @property
    def num_envs(self) -> int: ...
    @property
    def obs_space(self) -> spaces.Dict: ...
    @property
    def action_space(self) -> spaces.Space: ...
    @property
    def autoreset(self) -> str: ...
    @property
    def reports_games(self) -> bool: ...
    def reset(self, seed: int | None = None) -> dict[str, np.ndarray]: ...
    def send(self, actions: np.ndarray) -> None: ...
    def recv(self) -> Step: ...
    def receiver(self, columns: Any) -> Callable[[int], None] | None: ...


class Episode(NamedTuple):
    """One finished episode: the environment's own sum of rewards and number of steps, before clipping and scaling.

    Of Atari, one game: its raw rewards over all lives, whatever training takes for an episode.
    """

    episode_return: float
    length: int
    step: int
    """Valid steps taken in all environments when it ended."""


class Rollout:
    """T steps of N environments, time-major, on one device. Row T of `obs` and `values` is what follows the last step.

    Attributes:
        obs: entries `[T+1, N, ...]`; floats as float32, integers as the environment has them (unsigned ones of more
            than 8 bits in a signed type), "action_mask" as bool `[T+1, N, A]`.
        actions: `[T, N]` int64 (Discrete), `[T, N, *shape]` int64 (MultiDiscrete, MultiBinary, Box of integers: as the
            distribution counts them, from 0) or float32 (Box of floats); as sampled, before any clipping.
        logp, advantages, returns: `[T, N]` float32. values: `[T+1, N]` float32.
        rewards: `[T, N]` float32, what advantages are estimated from; the collector writes the raw ones.
        raw_rewards: `[T, N]` float64 on the CPU, the environment's own.
        terminated, truncated, valid: `[T, N]` bool. A row that only carries a reset is not valid.
        final_values: `[T, N]` float32, values of final observations at truncated rows (same-step autoreset), or None.
        steps: `[N]` int64, steps that each row ever took, reset rows included: the counter of its action noise.
        dist_params: entries `[T, N, ...]` float32, the acting distribution's parameters, where asked for; else None.
        states: `[T+1, N, *state_shape]` float32, what a policy that carries a state has of the steps before each row,
            whether or not an episode starts with it; else None.
        starts: `[T+1, N]` bool: an episode starts with this row, so a state is zero before it. Filled where there are
            states.

    Args:
        num_steps: T. num_envs: N.
        obs_space: as `EnvGroup.obs_space`; a plain space is the entry "obs".
        action_space: of one environment.
        store_dist: shapes of distribution parameters to keep, by name.
        same_step: whether the environments reset in the same step.
        state_shape: of the state that the policy carries for one environment; None: it has none.
    """

    def __init__(
        self,
        num_steps: int,
        num_envs: int,
        obs_space: spaces.Space,
        action_space: spaces.Space,
        *,
        device: torch.device | str = "cpu",
        store_dist: Mapping[str, tuple[int, ...]] | None = None,
        same_step: bool = False,
        state_shape: tuple[int, ...] | None = None,
    ) -> None:
        for name, value in (("num_steps", num_steps), ("num_envs", num_envs)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.num_steps, self.num_envs, self.device = num_steps, num_envs, torch.device(device)

        def zeros(rows: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros((rows, num_envs, *shape), dtype=dtype, device=self.device)

        entries = dict_space(obs_space).spaces
        self.obs = {k: zeros(num_steps + 1, *(s.shape or ()), dtype=_storage_dtype(k, s)) for k, s in entries.items()}
        continuous = np.issubdtype(action_space.dtype, np.floating)
        action_dtype = torch.float32 if continuous else torch.int64
        self.actions = zeros(num_steps, *(action_space.shape or ()), dtype=action_dtype)
        self.logp, self.rewards = zeros(num_steps), zeros(num_steps)
        self.values = zeros(num_steps + 1)
        self.terminated, self.truncated, self.valid = (zeros(num_steps, dtype=torch.bool) for _ in range(3))
        self._known: _KnownRows | None = None
        self.advantages, self.returns = zeros(num_steps), zeros(num_steps)
        self.final_values = zeros(num_steps) if same_step else None
        self.dist_params = {k: zeros(num_steps, *shape) for k, shape in store_dist.items()} if store_dist else None
        self.states = zeros(num_steps + 1, *state_shape) if state_shape is not None else None
        self.starts = zeros(num_steps + 1, dtype=torch.bool)
        self.steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self.raw_rewards = torch.zeros((num_steps, num_envs), dtype=torch.float64)

    def valid_rows(self) -> Tensor:
        """Where `valid` is true: flat indices int64 `[n]` on the rollout's device, in [T, N] order.

        Where the collector filled a GPU's rollout they are known, and nothing waits for the device. Where `valid` was
        written since, or replaced, they are looked up in it. A write that torch is not told of, through `valid.data`
        or a pointer, must be followed by `know_valid(None)`.
        """
        known = self._still_known()
        return self.valid.reshape(-1).nonzero().squeeze(1) if known is None else known

    @property
    def num_valid(self) -> int:
        """How many rows are valid, without waiting for the device where `valid_rows` does not."""
        known = self._still_known()
        return int(self.valid.count_nonzero()) if known is None else len(known)

    def know_valid(self, rows: Tensor | None) -> None:
        """Take `rows` for what `valid_rows` finds in `valid` as it is now; None: look when asked.

        For who wrote `valid` through torch and knows what it wrote. NumPy's writes are not counted, so storage on the
        CPU is looked at.
        """
        valid = self.valid
        known = None if rows is None or valid.is_inference() else _KnownRows(rows, valid, valid._version)
        self._known = known

    def _still_known(self) -> Tensor | None:
        """The rows that are known, unless `valid` is not what it was then."""
        if (known := self._known) is None:
            return None
        same = self.valid is known.valid and self.valid._version == known.version
        return known.rows if same else None


class _KnownRows(NamedTuple):
    """The valid rows of a rollout, and the tensor and version of it that they are of."""

    rows: Tensor
    valid: Tensor
    version: int


# torch can hold these and do hardly anything with them.
_SIGNED = {"uint16": torch.int32, "uint32": torch.int64, "uint64": torch.int64}


def _storage_dtype(name: str, space: spaces.Space) -> torch.dtype:
    if name == MASK:
        return torch.bool
    if np.issubdtype(space.dtype, np.floating):
        return torch.float32
    return _SIGNED.get(str(space.dtype)) or torch.from_numpy(np.zeros(0, space.dtype)).dtype


Act = Callable[[Rollout, int, slice], np.ndarray]
FinalValue = Callable[..., Tensor]


class _Columns(NamedTuple):
    """One group's rows of the storage; `column[t] = array` writes what a step gave (`pyppo.envs.Columns`)."""

    obs: dict[str, np.ndarray | _PinnedColumn]
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    episode_rewards: np.ndarray | None
    episode_over: np.ndarray | None


class _PinnedColumn:
    """Writes `[n, ...]` into `storage[t, rows]` on a GPU, through page-locked memory."""

    def __init__(self, storage: Tensor, rows: slice) -> None:
        self._storage, self._rows = storage, rows
        self._slot = torch.empty_like(storage[0, rows], device="cpu", pin_memory=True)
        self._view = self._slot.numpy()

    def __setitem__(self, t: int, array: np.ndarray) -> None:
        # The slot is free again: the actions that answered its last content have been read back.
        self._view[...] = array
        self._storage[t, self._rows].copy_(self._slot, non_blocking=True)


class _Part:
    """One group, its rows, and where its steps are written."""

    def __init__(
        self, group: Group, rows: slice, rollout: Rollout, host: dict[str, np.ndarray], finals: _Finals
    ) -> None:
        self.group, self.rows = group, rows
        flags = [host[name][:, rows] for name in ("rewards", "terminated", "truncated")]
        # What is reported lies apart only where it differs.
        games = [host[name][:, rows] if group.reports_games else None for name in ("episode_rewards", "episode_over")]
        on_cpu = rollout.device.type == "cpu"
        obs = {name: x.numpy()[:, rows] if on_cpu else _PinnedColumn(x, rows) for name, x in rollout.obs.items()}
        self.columns = _Columns(obs, *flags, *games)
        steps = rollout.steps[rows]
        self.steps = steps.numpy() if on_cpu else steps
        self.one = np.ones((), np.int64) if on_cpu else 1  # NumPy takes a microsecond to convert a Python number
        direct = group.receiver(self.columns)
        self.done_is_raw = direct is not None
        self.receive = self._receive if direct is None else direct
        self._finals = finals

    def _receive(self, t: int) -> None:
        """Write the answer to step t: its reward and flags in row t, the observation that follows in row t + 1."""
        step, columns = self.group.recv(), self.columns
        columns.rewards[t] = step.rewards
        columns.terminated[t] = step.terminated
        columns.truncated[t] = step.truncated
        if columns.episode_rewards is not None and columns.episode_over is not None:
            columns.episode_rewards[t] = step.episode_rewards
            columns.episode_over[t] = step.episode_over
        for name, column in columns.obs.items():
            column[t + 1] = step.obs[name]
        if step.final_obs is not None:
            self._keep_finals(step, t)

    def _keep_finals(self, step: Step, t: int) -> None:
        assert step.final_obs is not None
        ended, first = np.flatnonzero(step.terminated | step.truncated), self.rows.start
        for i, row in enumerate(ended):
            if step.truncated[row] and not step.terminated[row]:  # a terminated row needs no value
                self._finals.append((t, first + int(row), {name: x[i].copy() for name, x in step.final_obs.items()}))

    def settle(self) -> None:
        """Once all steps are taken: done rows that were cut off are not terminated."""
        if self.done_is_raw:
            np.greater(self.columns.terminated, self.columns.truncated, out=self.columns.terminated)


_Finals = list[tuple[int, int, dict[str, np.ndarray]]]
"""Same-step autoreset: step, row and final observation of what was cut off."""


class Collector:
    """Fills rollouts from groups of environments that are served in turn.

    Group g owns a contiguous slice of rows; while it steps, the policy acts for the others. What a row sees does not
    depend on how rows are grouped.

    Args:
        groups: environments; their rows in this order make up the rollout's N.
        rollout: storage to fill.
        act: `act(rollout, t, rows)` writes actions, log-probabilities and values of row t and returns the actions to
            send. The flags and rewards of the rollout are not yet there when it is called.
        final_value: values `[n]` of observations (entries `[n, ...]`, on the rollout's device), and of the states that
            flow into them where the rollout keeps states; needed for same-step autoreset.

    Attributes:
        episodes: finished episodes, oldest first; the caller empties it.
        valid_steps: valid steps so far, of all rollouts.
        ready: whether `collect` can go on from where the last rollout ended; an exception out of it, which leaves
            environments in the middle of a step, makes `reset` necessary.
    """

    def __init__(
        self, groups: Sequence[Group], rollout: Rollout, act: Act, final_value: FinalValue | None = None
    ) -> None:
        self.rollout, self.act, self.final_value = rollout, act, final_value
        self.episodes: list[Episode] = []
        self.valid_steps = 0
        self.same_step = _check_groups(groups, rollout, final_value)
        self._host = _host_arrays(rollout, games=groups[0].reports_games)
        self._finals: _Finals = []
        self._parts: list[_Part] = []
        first = 0
        for group in groups:
            rows = slice(first, first + group.num_envs)
            self._parts.append(_Part(group, rows, rollout, self._host, self._finals))
            first += group.num_envs
        self._done = np.zeros(rollout.num_envs, bool)
        self._returns = np.zeros(rollout.num_envs)
        self._lengths = np.zeros(rollout.num_envs, np.int64)
        self.ready = False

    def reset(self, seed: int | None = None) -> None:
        """Start new episodes in all environments; what was unfinished is dropped. Counters go on."""
        self.ready = False
        for part in self._parts:
            obs = part.group.reset(seed)
            for name, column in part.columns.obs.items():
                column[self.rollout.num_steps] = obs[name]
        self.rollout.starts[-1] = True
        self._done[:] = False
        self._returns[:] = 0
        self._lengths[:] = 0
        self.ready = True

    def collect(self) -> int:
        """Fill the rollout: T steps from where the last one ended. Returns how many of its rows are valid."""
        if not self.ready:
            raise RuntimeError("collect was called before reset, or after a collect that failed")
        self.ready = False
        rollout, act, last = self.rollout, self.act, self.rollout.num_steps - 1
        parts = [(part.receive, part.group.send, part.rows, part.steps, part.one) for part in self._parts]
        for tensor in rollout.obs.values():
            tensor[0] = tensor[-1]
        if rollout.states is not None:
            rollout.states[0], rollout.starts[0] = rollout.states[-1], rollout.starts[-1]
        self._finals.clear()
        for t in range(rollout.num_steps):
            for receive, send, rows, steps, one in parts:
                if t:
                    receive(t - 1)
                    if rollout.states is not None:
                        self._write_starts(t, rows)
                send(act(rollout, t, rows))
                steps += one
        for part in self._parts:
            part.receive(last)
            if rollout.states is not None:
                self._write_starts(last + 1, part.rows)
            part.settle()
        count = self._finish()
        self.ready = True
        return count

    def _write_starts(self, t: int, rows: slice) -> None:
        """Which episodes start with row t: after the row that carries the reset, or right after the end."""
        end = t - 1 if self.same_step else t - 2
        host = self._host
        done = host["terminated"][end, rows] | host["truncated"][end, rows] if end >= 0 else self._done[rows]
        self.rollout.starts[t, rows] = torch.from_numpy(done)

    def _finish(self) -> int:
        """What can wait until all steps are taken: validity, episodes, final values, and the copy to the device."""
        host, rollout = self._host, self.rollout
        done = host["terminated"] | host["truncated"]
        valid = host["valid"]
        over = host.get("episode_over", done)
        if self.same_step:
            valid[:] = True
        else:
            valid[0] = ~self._done
            valid[1:] = ~done[:-1]
            _check_resets(done, valid)
        _check_rewards(host["rewards"])
        _check_observations(rollout.obs, valid, host["terminated"], self.same_step)
        if rollout.device.type != "cpu":
            for name in ("terminated", "truncated", "valid"):
                getattr(rollout, name).copy_(torch.from_numpy(host[name]))
        rollout.rewards.copy_(rollout.raw_rewards)
        self._value_finals()
        # From here on nothing fails, so a rollout counts as a whole or not at all.
        self._count_episodes(over & valid, valid)
        self._done = done[-1].copy()
        count = int(np.count_nonzero(valid))
        self.valid_steps += count
        return count

    def _count_episodes(self, over: np.ndarray, valid: np.ndarray) -> None:
        """Episodes that ended in this rollout, in order of time then row; the rest is carried over."""
        # Running sums over the rollout; an episode's own is the difference to the one at the end before it.
        rewards = self._host.get("episode_rewards", self._host["rewards"])
        returns = np.cumsum(np.where(valid, rewards, 0.0), axis=0) + self._returns
        lengths = np.cumsum(valid, axis=0) + self._lengths
        steps = self.valid_steps + np.cumsum(np.count_nonzero(valid, axis=1))
        row, t = np.nonzero(over.T)  # by row, then by time
        first = np.diff(row, prepend=-1) != 0
        own_return, self._returns = _between(returns, row, t, first)
        own_length, self._lengths = _between(lengths, row, t, first)
        in_time = np.lexsort((row, t))
        columns = (column[in_time].tolist() for column in (own_return, own_length, steps[t]))
        self.episodes.extend(map(Episode, *columns))

    def _value_finals(self) -> None:
        """Same-step autoreset: the values of final observations, in one call and in an order free of the grouping."""
        final_values = self.rollout.final_values
        if final_values is None:
            return
        final_values.zero_()
        if not self._finals:
            return
        assert self.final_value is not None
        self._finals.sort(key=lambda item: item[:2])
        device = self.rollout.device
        obs = {
            name: torch.from_numpy(np.stack([item[2][name] for item in self._finals])).to(device, tensor.dtype)
            for name, tensor in self.rollout.obs.items()
        }
        _check_finals(obs, self._finals)
        index = torch.tensor([item[:2] for item in self._finals], device=device)
        states = self.rollout.states  # what flows on from a row is in the next one, its episode over or not
        flows = () if states is None else (states[index[:, 0] + 1, index[:, 1]],)
        values = self.final_value(obs, *flows)
        final_values[index[:, 0], index[:, 1]] = values.to(final_values)


def _between(sums: np.ndarray, row: np.ndarray, t: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What running sums `[T, N]` gain up to each end `[t, row]` since the one before it, and since the last `[N]`.

    Args:
        row, t: the ends, by row and then by time. first: which of them are the first of their row.
    """
    at_end, last = sums[t, row], np.zeros_like(sums[0])
    gained = np.diff(at_end, prepend=0)
    gained[first] = at_end[first]
    last[row] = at_end  # a row's latest end is written last
    return gained, sums[-1] - last


def _host_arrays(rollout: Rollout, games: bool) -> dict[str, np.ndarray]:
    """Where flags and rewards are written: the storage itself on the CPU, else arrays that are copied at the end.

    `games`: what is reported lies in arrays of its own.
    """
    names = ("terminated", "truncated", "valid")
    if rollout.device.type == "cpu":
        arrays = {name: getattr(rollout, name).numpy() for name in names}
    else:
        arrays = {name: np.zeros((rollout.num_steps, rollout.num_envs), bool) for name in names}
    if games:
        arrays["episode_rewards"] = np.zeros((rollout.num_steps, rollout.num_envs))
        arrays["episode_over"] = np.zeros((rollout.num_steps, rollout.num_envs), bool)
    return {**arrays, "rewards": rollout.raw_rewards.numpy()}


def _check_groups(groups: Sequence[Group], rollout: Rollout, final_value: FinalValue | None) -> bool:
    """Whether the environments reset in the same step."""
    count = sum(group.num_envs for group in groups)
    if count != rollout.num_envs:
        raise ValueError(f"groups have {count} environments; they must have num_envs = {rollout.num_envs}")
    if len({group.reports_games for group in groups}) != 1:
        raise ValueError("groups differ in what they report, some are Atari and some are not; all must be of one kind")
    modes = {group.autoreset for group in groups}
    if len(modes) != 1:
        raise ValueError(f"groups reset in different ways ({', '.join(sorted(modes))}); all must do it in one way")
    for group in groups[1:]:
        if group.obs_space != groups[0].obs_space or group.action_space != groups[0].action_space:
            raise ValueError("groups differ in their observation or action space; all must have the same")
    same_step = modes == {"same_step"}
    if same_step and (final_value is None or rollout.final_values is None):
        raise ValueError("final_value is None or rollout has no final_values; same-step autoreset needs both")
    return same_step


def _check_resets(done: np.ndarray, valid: np.ndarray) -> None:
    wrong = done & ~valid
    if wrong.any():
        t, row = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"environment {row} reports done at step {t}, which only carries its reset; a reset row must not be done. "
            "Is its autoreset mode really next-step?"
        )


def _check_rewards(rewards: np.ndarray) -> None:
    if not math.isfinite(rewards.sum()) and not np.isfinite(rewards).all():
        t, row = (int(i) for i in np.argwhere(~np.isfinite(rewards))[0])
        raise ValueError(f"environment {row} gave reward {rewards[t, row]} at step {t}; it must be finite")


def _check_observations(obs: Mapping[str, Tensor], valid: np.ndarray, terminated: np.ndarray, same_step: bool) -> None:
    """Every observation must be finite that something is made of: what follows a step, unless nothing does."""
    if find_not_finite(obs) is None:
        return
    follows = np.ones_like(valid) if same_step else ~terminated
    used = torch.from_numpy(np.concatenate([valid[:1], follows]))
    if (found := find_not_finite(obs, used)) is not None:
        raise ValueError(f"{found}; it must be finite")


def _check_finals(obs: Mapping[str, Tensor], finals: _Finals) -> None:
    """Their values are part of the advantages, so each must be finite."""
    for name, x in obs.items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            wrong = int((~x.flatten(1).isfinite().all(1) if x.dim() > 1 else ~x.isfinite()).nonzero()[0])
            t, row, _ = finals[wrong]
            raise ValueError(
                f"environment {row} gave a final observation {name!r} that is not finite at step {t}; it must be finite"
            )


def find_not_finite(obs: Mapping[str, Tensor], used: Tensor | None = None) -> str | None:
    """Says which environment gave which observation that is not finite; None if none did.

    Args:
        obs: entries `[T+1, N, ...]`. used: bool `[T+1, N]`, the rows to look at; None: all.
    """
    for name, x in obs.items():
        # A sum is finite only if all of it is, and takes a twentieth of the time of the test that says so.
        if not x.is_floating_point() or math.isfinite(float(x.sum())) or bool(x.isfinite().all()):
            continue
        wrong = ~x.isfinite().flatten(2).all(2).cpu() if x.dim() > 2 else ~x.isfinite().cpu()
        if len(rows := (wrong if used is None else wrong & used).nonzero()):
            t, row = rows[0].tolist()
            return f"environment {row} gave an observation {name!r} that is not finite, row {t} of the rollout"
    return None
