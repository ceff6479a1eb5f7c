"""The loop that fills rollouts: groups of environments served in turn or at once, and where their steps are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from pyppo.cores import Cores, at_once
from pyppo.episodes import Episode, EpisodeCounter
from pyppo.finite import check_finals, check_observations, check_rewards
from pyppo.storage import Rollout
from pyppo.transfer import Cuda, Device, Results, SlotColumn, Uploads

__all__ = ["Act", "Collector", "Episode", "Rollout"]


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


Act = Callable[[Rollout, int, slice], np.ndarray]
FinalValue = Callable[..., Tensor]
Scale = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class _Columns(NamedTuple):
    """One group's rows of the storage; `column[t] = array` writes what a step gave (`pyppo.envs.Columns`)."""

    obs: Mapping[str, np.ndarray | SlotColumn]
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    episode_rewards: np.ndarray | None
    episode_over: np.ndarray | None


class _Part:
    """One group, its rows, and where its steps are written.

    Args:
        device: the GPU that observations go to; None: they are written where the rollout keeps them.
        ended: bool `[N]`, which rows ended with the last rollout's last step.
        finals: takes the final observations of same-step autoreset.
    """

    def __init__(
        self,
        group: Group,
        rows: slice,
        rollout: Rollout,
        host: dict[str, np.ndarray],
        device: Device | None,
        ended: np.ndarray,
        finals: _Finals,
    ) -> None:
        self.group, self.rows = group, rows
        self._ended, self._finals = ended[rows], finals
        self._same_step = group.autoreset == "same_step"
        flags = [host[name][:, rows] for name in ("rewards", "terminated", "truncated")]
        # What is reported lies apart only where it differs.
        games = [host[name][:, rows] if group.reports_games else None for name in ("episode_rewards", "episode_over")]
        # What is written as steps arrive: observations, and where episodes start if a state wants to know.
        arriving = [*rollout.obs.values()] + ([] if rollout.states is None else [rollout.starts])
        self.uploads = None if device is None else Uploads(arriving, rows, device)
        columns: Sequence[Any] = (
            [x.numpy()[:, rows] for x in arriving] if self.uploads is None else self.uploads.columns
        )
        self.columns = _Columns(dict(zip(rollout.obs, columns, strict=False)), *flags, *games)
        self._starts = None if rollout.states is None else columns[-1]
        steps = rollout.steps[rows]
        on_cpu = steps.device.type == "cpu"
        self.steps = steps.numpy() if on_cpu else steps
        self.one = np.ones((), np.int64) if on_cpu else 1  # NumPy takes a microsecond to convert a Python number
        direct = group.receiver(self.columns)
        self.done_is_raw = direct is not None
        self._write = self._receive if direct is None else direct
        self.receive = self._write if self.uploads is None and self._starts is None else self._arrive

    def reset(self, seed: int | None, row: int) -> None:
        """Start new episodes, whose first observations go to `row`."""
        obs = self.group.reset(seed)
        if self.uploads is not None:
            self.uploads.fence()
            self.uploads.begin()
        for name, column in self.columns.obs.items():
            column[row] = obs[name]
        if self._starts is not None:
            self._starts[row] = np.ones(self.group.num_envs, bool)
        if self.uploads is not None:
            self.uploads.send(row)

    def _arrive(self, t: int) -> None:
        """`_write`, with what else belongs to row t + 1, and on its way to the GPU."""
        if self.uploads is not None:
            self.uploads.begin()
        self._write(t)
        if self._starts is not None:
            # An episode starts after the row that carries the reset, or right after the end.
            end = t if self._same_step else t - 1
            terminated, truncated = self.columns.terminated, self.columns.truncated
            self._starts[t + 1] = self._ended if end < 0 else terminated[end] | truncated[end]
        if self.uploads is not None:
            self.uploads.send(t + 1)

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
    """Fills rollouts from groups of environments that are served in turn, or each by a thread of its own.

    Group g owns a contiguous slice of rows; in turn, while it steps, the policy acts for the others. What a row sees
    does not depend on how rows are grouped.

    Args:
        groups: environments; their rows in this order make up the rollout's N.
        rollout: storage to fill.
        act: `act(rollout, t, rows)` writes actions, log-probabilities and values of row t and returns the actions to
            send. The flags and rewards of the rollout are not yet there when it is called.
        final_value: values `[n]` of observations (entries `[n, ...]`, on the rollout's device), and of the states that
            flow into them where the rollout keeps states; needed for same-step autoreset.
        scale: `scale(rewards, terminated, truncated, valid)`, `[T, N]` on the CPU, gives the rewards that advantages
            are estimated from; None: the environment's own.
        device: how observations go to a GPU; None: by CUDA where the rollout is there.
        cores: what collecting keeps to; None: all cores, and the groups in turn. Where it has a core for each group,
            they are served at once, each by a thread of its own: `act` is called by all of them, but for the first row
            of the first group, which is done before the others begin.

    Attributes:
        ready: whether `collect` can go on from where the last rollout ended. An exception out of it, which leaves
            environments in the middle of a step, makes `reset` necessary, and so does a reset by somebody else: an
            evaluation in the same environments, for example.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        rollout: Rollout,
        act: Act,
        final_value: FinalValue | None = None,
        *,
        scale: Scale | None = None,
        device: Device | None = None,
        cores: Cores | None = None,
    ) -> None:
        self.rollout, self.act, self.final_value, self.scale = rollout, act, final_value, scale
        self._cores = cores
        self.same_step = _check_groups(groups, rollout, final_value)
        if device is None and rollout.device.type == "cuda":
            device = Cuda(rollout.device)
        self._device = device
        self._results = None if device is None else Results(rollout.flags, rollout.rewards, device)
        own = (rollout.terminated, rollout.truncated, rollout.valid)
        flags = [x.numpy() for x in own] if self._results is None else self._results.flags
        self._host = _host_arrays(rollout, flags, games=groups[0].reports_games)
        self._counter = EpisodeCounter(rollout.num_envs)
        self._ended = np.zeros(rollout.num_envs, bool)
        self._finals: _Finals = []
        self._parts: list[_Part] = []
        first = 0
        for group in groups:
            rows = slice(first, first + group.num_envs)
            self._parts.append(_Part(group, rows, rollout, self._host, device, self._ended, self._finals))
            first += group.num_envs
        self._ready, self._resets = False, -1

    @property
    def ready(self) -> bool:
        """Whether `collect` can go on."""
        return self._ready and self._resets == self._count_resets()

    def _count_resets(self) -> int:
        """How often the environments were reset, by anybody."""
        return sum(getattr(part.group, "resets", 0) for part in self._parts)

    @property
    def episodes(self) -> list[Episode]:
        """Finished episodes, oldest first; the caller empties it."""
        return self._counter.episodes

    @property
    def valid_steps(self) -> int:
        """Valid steps so far, of all rollouts."""
        return self._counter.valid_steps

    @valid_steps.setter
    def valid_steps(self, steps: int) -> None:
        self._counter.valid_steps = steps

    def reset(self, seed: int | None = None) -> None:
        """Start new episodes in all environments; what was unfinished is dropped. Counters go on."""
        self._ready = False
        for part in self._parts:
            part.reset(seed, self.rollout.num_steps)
        self._ended[:] = False
        self._counter.reset()
        self._ready, self._resets = True, self._count_resets()

    def collect(self) -> int:
        """Fill the rollout: T steps from where the last one ended. Returns how many of its rows are valid."""
        if not self.ready:
            raise RuntimeError(
                "collect was called before reset, after a collect that failed, or after somebody else's reset"
            )
        self._ready = False
        self._begin()
        with self._cores or nullcontext():
            if self._cores is not None and self._cores.each:
                self._serve_at_once(self._cores)
            else:
                self._serve(self._parts)
        for part in self._parts:
            part.settle()
        count = self._finish()
        self._ready = True
        return count

    def _serve(self, parts: Sequence[_Part], first: int = 0, given_up: Callable[[], bool] | None = None) -> None:
        """Take the steps from the first on, the parts in turn."""
        rollout, act, last = self.rollout, self.act, self.rollout.num_steps - 1
        served = [(part.receive, part.group.send, part.rows, part.steps, part.one) for part in parts]
        for t in range(first, rollout.num_steps):
            if given_up is not None and given_up():
                return
            for receive, send, rows, steps, one in served:
                if t:
                    receive(t - 1)
                send(act(rollout, t, rows))
                steps += one
        for part in parts:
            part.receive(last)

    def _serve_at_once(self, cores: Cores) -> None:
        """Take all steps, the parts at the same time. The caller's first one comes before: there the policy is made
        ready for this rollout."""
        caller = self._parts[0]
        caller.group.send(self.act(self.rollout, 0, caller.rows))
        caller.steps += caller.one
        at_once([partial(self._serve, [part], int(part is caller)) for part in self._parts], cores)

    def _begin(self) -> None:
        """Take the last rollout's row T for row 0, ahead of what will be written to row T."""
        rollout = self.rollout
        kept = [*rollout.obs.values()] + ([] if rollout.states is None else [rollout.states, rollout.starts])
        if self._device is None or self._results is None:
            for tensor in kept:
                tensor[0] = tensor[-1]
        else:
            self._device.copy([(tensor[0], tensor[-1]) for tensor in kept], self._device.compute())
            self._results.begin()
        for part in self._parts:
            if part.uploads is not None:
                part.uploads.fence()
        self._finals.clear()

    def _finish(self) -> int:
        """What can wait until all steps are taken: validity, checks, rewards and flags to the device, episodes."""
        host, rollout = self._host, self.rollout
        done = host["terminated"] | host["truncated"]
        valid = host["valid"]
        over = host.get("episode_over", done)
        if self.same_step:
            valid[:] = True
        else:
            valid[0] = ~self._ended
            valid[1:] = ~done[:-1]
            _check_resets(done, valid)
        check_rewards(host["rewards"])
        check_observations(rollout.obs, valid, host["terminated"], self.same_step)
        self._value_finals()
        # From here on nothing fails, so a rollout counts as a whole or not at all.
        rewards = self._scaled()
        if self._results is None:
            rollout.rewards.copy_(rewards)
        else:
            rollout.know_valid(self._results.send(rewards))
        self._ended[:] = done[-1]
        return self._counter.count(host.get("episode_rewards", host["rewards"]), over & valid, valid)

    def _scaled(self) -> Tensor:
        """The rewards that advantages are estimated from, `[T, N]` on the CPU."""
        if self.scale is None:
            return self.rollout.raw_rewards
        flags = (torch.from_numpy(self._host[name]) for name in ("terminated", "truncated", "valid"))
        return self.scale(self.rollout.raw_rewards, *flags)

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
        where = [item[:2] for item in self._finals]
        obs = {
            name: torch.from_numpy(np.stack([item[2][name] for item in self._finals])).to(tensor.dtype)
            for name, tensor in self.rollout.obs.items()
        }
        check_finals(obs, where)
        index = torch.tensor(where).T
        if self._device is not None:
            obs = {name: self._device.upload(x) for name, x in obs.items()}
            index = self._device.upload(index)
        t, row = index
        states = self.rollout.states  # what flows on from a row is in the next one, its episode over or not
        flows = () if states is None else (states[t + 1, row],)
        values = self.final_value(obs, *flows)
        final_values[t, row] = values.to(final_values)


def _host_arrays(rollout: Rollout, flags: Sequence[np.ndarray], games: bool) -> dict[str, np.ndarray]:
    """Where flags and rewards are written as steps arrive.

    Args:
        flags: terminated, truncated, valid: the storage itself on the CPU, else what goes to the device in the end.
        games: whether what is reported lies in arrays of its own.
    """
    arrays = dict(zip(("terminated", "truncated", "valid"), flags, strict=True))
    if games:
        arrays["episode_rewards"] = np.zeros(flags[0].shape)
        arrays["episode_over"] = np.zeros(flags[0].shape, bool)
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
