"""How EnvPool's environments are stepped: in how many groups, in turn or at once, on how many threads and which cores.

Results never depend on it; speed does, on how long a step takes against waking another core. So a short trial at the
start measures: rollouts of the policy in environments of their own, candidates in turn.

Where the policy is on a GPU, the trial is of the environments alone, and never of the number of groups: a policy's last
bits depend on how many rows it sees at once, so the same run could end otherwise on a machine that is busy. There the
kind of environments says how many groups there are.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pyppo.config import Config
from pyppo.cores import Cores
from pyppo.envpool_envs import EnvPoolVectorEnv, auto_threads, is_cheap, make_envs
from pyppo.envs import EnvGroup, Purpose
from pyppo.masks import MASK
from pyppo.rollout import Act, Collector
from pyppo.storage import Rollout
from pyppo.warmup import random_actions

__all__ = ["Stepping", "Way", "choose", "make_groups"]

_log = logging.getLogger("pyppo")


@dataclass(frozen=True)
class Way:
    """One way to step the environments."""

    num_groups: int
    env_threads: int
    """EnvPool's, a group."""
    one_core: bool
    """Whether what serves a group keeps to one core, EnvPool's threads included: one core for all groups, or, where
    they are served at once, one for each."""
    at_once: bool = False
    """Whether each group is served by a thread of its own; else they are served in turn."""

    def cores(self, groups: Iterable[EnvGroup]) -> Cores | None:
        """What the collector keeps to."""
        pools = [group.env for group in groups if isinstance(group.env, EnvPoolVectorEnv)]
        return Cores(pools, each=self.at_once) if self.one_core else None

    def __str__(self) -> str:
        groups = f"{self.num_groups} group{'s' * (self.num_groups > 1)}{' at once' * self.at_once}"
        threads = f"{self.env_threads} thread{'s' * (self.env_threads > 1)}"
        cores = ", a core each" if self.at_once else ", one core" if self.one_core else ""
        return f"{groups}, {threads}{cores}"


def make_groups(
    config: Config,
    way: Way,
    *,
    rebuild: int = 0,
    num_envs: int | None = None,
    purpose: Purpose = "train",
) -> list[EnvGroup]:
    """EnvPool's environments; each has the same seed however many groups and threads there are.

    Args:
        rebuild: how often a run's environments were made before.
        num_envs: how many; None: as many as the settings say.
        purpose: what they are for, part of their seeds.
    """
    count = config.num_envs if num_envs is None else num_envs
    size = count // way.num_groups
    groups = [
        EnvGroup(
            make_envs(
                config.env_id,
                size,
                config.seed,
                purpose=purpose,
                rebuild=rebuild,
                first_env=first,
                num_threads=way.env_threads,
                options=config.env_options,
            ),
            first_env=first,
        )
        for first in range(0, count, size)
    ]
    for group in groups:
        group.owned = True
    return groups


@dataclass(frozen=True)
class Stepping:
    """The way chosen, and what the trial measured."""

    way: Way
    rows_per_second: dict[Way, float] = field(default_factory=dict)
    """Of each candidate; empty where there was nothing to choose."""
    seconds: float = 0.0
    """What the trial took."""


# --- the choice -----------------------------------------------------------------------------------------------------

_FEWEST_ROLLOUTS = 20
"""A run of fewer is over before a trial has paid."""
_MAKING_SECONDS = 0.3
"""What making the trial's environments may take in all; where it would be longer, the trial has fewer of them."""
_TRIAL_SHARE = 0.02
"""What a trial may take of the time that stepping will take in all, as its first round says."""
_TRIAL_SECONDS = (0.1, 3.0)
"""The least and the most that a trial takes, its first round apart."""
_SEVERAL = (2, 4, 8)
"""Numbers of groups to try. Of more at once, each would wait for Python's interpreter, which every step needs."""
_NUM_STEPS = {True: 32, False: 128}
"""Of a rollout of the trial at most, where steps are cheap and where they are not: a rollout's end, where groups at
once wait for the last one, must not weigh more than in training."""
_QUICK = 0.001
"""Seconds that making an environment takes at most where its steps are cheap too."""
_SLICE_SECONDS = {True: 0.004, False: 0.05}
"""Of a round, where steps are cheap and where they are not. A core that had nothing to do in the last one takes
milliseconds to come back."""
_ROUNDS = (2, 16)
"""The fewest and the most, the first apart, which pays for what is slow once."""
_HOPELESS = 0.75
"""A candidate that is slower than this share of the best is not measured again."""
_GAIN = 1.05
"""How much faster than a simpler one a candidate must be: less is noise."""


def choose(
    config: Config,
    act: Act | None,
    *,
    allow_groups: bool,
    on_gpu: bool = False,
    store_dist: Mapping[str, tuple[int, ...]] | None = None,
    state_shape: tuple[int, ...] | None = None,
) -> Stepping:
    """The fastest way to step `config`'s environments among those that its fields leave open.

    Args:
        act: the policy's part of a step (`pyppo.rollout.Act`), for a rollout of the trial's own; its actions are not
            the ones sent. None: it takes no time.
        allow_groups: whether the number of groups may be chosen, which needs an engine whose results do not depend on
            it.
        on_gpu: whether the policy acts on a GPU, so that a group may step while the policy acts for another.
        store_dist, state_shape: what `act` keeps of its distribution and state, as `Rollout` takes them.

    Returns:
        the way and the speeds measured. There is no trial where one way is open, the run is short, or environments
        take too long to make.
    """
    allow_groups = allow_groups and not on_gpu
    if config.num_groups == "auto" and on_gpu:
        config = config.replace(num_groups=_groups_for_gpu(config))
    usual, ways = _usual(config, allow_groups), _ways(config, allow_groups)
    if len(ways) == 1 or config.total_timesteps < _FEWEST_ROLLOUTS * config.batch_size:
        return _told(Stepping(usual))
    start = time.perf_counter()
    making = _making_seconds(config)
    num_envs = _trial_size(config.num_envs, making * len(ways), max(way.num_groups for way in ways))
    quick = making < _QUICK
    kept = {"store_dist": store_dist, "state_shape": state_shape}
    trials = [_Trial(config, way, num_envs, quick, act, kept) for way in (ways if num_envs else [])]
    speeds = _measure(trials, config.total_timesteps)
    best = usual
    for way in ways if speeds else ():
        if best not in speeds or speeds[way] > _GAIN * speeds[best]:
            best = way
    return _told(Stepping(best, speeds, time.perf_counter() - start))


def _told(stepping: Stepping) -> Stepping:
    measured = ", ".join(f"{way}: {speed:,.0f}" for way, speed in stepping.rows_per_second.items())
    trial = f" (rows a second in a trial of {stepping.seconds:.2f} s: {measured})" if measured else ""
    _log.info("environments are stepped in %s%s", stepping.way, trial)
    return stepping


def _groups_for_gpu(config: Config) -> int:
    """Two, of which one steps while the policy acts for the other, where steps take long enough to be worth a call of
    the policy more; else one."""
    num_groups = 1 if config.num_envs % 2 or is_cheap(config.env_id) else 2
    why = "one steps while the policy acts on the GPU for the other" if num_groups == 2 else "steps are cheap"
    if config.num_envs % 2:
        why = f"num_envs = {config.num_envs} is odd"
    _log.info("num_groups is %d: %s", num_groups, why)
    return num_groups


def _usual(config: Config, allow_groups: bool) -> Way:
    """What is right where nothing is known: the given fields, and for the others what is never far from best."""
    num_groups = 1 if config.num_groups == "auto" else config.num_groups
    threads = 1 if config.env_threads == "auto" else config.env_threads
    way = _way(num_groups, threads, config.one_core is True, allow_groups)
    if config.env_threads == "auto" and not way.at_once:
        way = replace(way, env_threads=auto_threads(config.env_id, config.num_envs // num_groups))
    return way


def _way(num_groups: int, env_threads: int, one_core: bool, allow_groups: bool) -> Way:
    """With several groups on one core each where that can be."""
    at_once = one_core and allow_groups and 1 < num_groups <= len(os.sched_getaffinity(0))
    return Way(num_groups, env_threads, one_core, at_once)


def _ways(config: Config, allow_groups: bool) -> list[Way]:
    """The candidates, simple ones first; at least the usual way."""
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        return [_usual(config, allow_groups)]
    ways = []
    for num_groups in _group_numbers(config, allow_groups, cores):
        for threads in _thread_numbers(config, num_groups, cores):
            for one_core in [True, False] if config.one_core == "auto" else [config.one_core]:
                way = _way(num_groups, threads, one_core, allow_groups)
                if _may_be_best(way, config):
                    ways.append(way)
    at_once = [way for way in ways if way.at_once]
    return [way for way in ways if not way.at_once] + at_once[-2:]


def _group_numbers(config: Config, allow_groups: bool, cores: int) -> list[int]:
    if config.num_groups != "auto":
        return [config.num_groups]
    return [1, *(n for n in _SEVERAL if allow_groups and n <= cores and config.num_envs % n == 0)]


def _thread_numbers(config: Config, num_groups: int, cores: int) -> list[int]:
    if config.env_threads != "auto":
        return [config.env_threads]
    most = min(cores, config.num_envs // num_groups)
    return sorted({1, max(1, most // num_groups), most})


def _may_be_best(way: Way, config: Config) -> bool:
    """Whether a way is worth a trial, as far as the settings leave it open."""
    free_core, free_groups = config.one_core == "auto", config.num_groups == "auto"
    if way.at_once and way.env_threads > 1:
        return config.env_threads != "auto"  # they would share the one core
    if way.one_core and free_core:
        # Sharing a core is for what one thread steps faster than another core wakes.
        return way.env_threads == 1 and (way.num_groups == 1 or way.at_once)
    return way.at_once or not free_groups or way.num_groups <= 2  # in turn, one steps and one is served


def _making_seconds(config: Config) -> float:
    """What it takes to make an environment."""
    few, start = min(4, config.num_envs), time.perf_counter()
    make_groups(config, Way(1, 1, False), num_envs=few, purpose="warmup")
    return (time.perf_counter() - start) / few


def _trial_size(num_envs: int, making: float, most_groups: int) -> int:
    """Environments of the trial: as many as in training if they are quickly made, else fewer; 0: too slow for any.

    Args:
        making: seconds that one takes, in all ways together.
        most_groups: what the number has to be divisible by.
    """
    most = _MAKING_SECONDS / making
    size, least = num_envs, 4 * len(os.sched_getaffinity(0))
    while size > most and size % (2 * most_groups) == 0 and size // 2 >= least:
        size //= 2
    return size if size <= 2 * most else 0


class _Trial:
    """Rollouts in one way, with environments of its own."""

    def __init__(
        self,
        config: Config,
        way: Way,
        num_envs: int,
        quick: bool,
        act: Act | None,
        kept: Mapping[str, Any],
    ) -> None:
        self.way = way
        self._slice_seconds = _SLICE_SECONDS[quick]
        self._groups = make_groups(config, way, num_envs=num_envs, purpose="warmup")
        space = self._groups[0].action_space
        num_steps = min(_NUM_STEPS[quick], config.num_steps)
        self._rollout = Rollout(num_steps, num_envs, self._groups[0].obs_space, space, **kept)
        rng = np.random.default_rng(0)
        actions = [random_actions(space, num_envs, rng) for _ in range(num_steps)]

        def act_and_forget(rollout: Rollout, t: int, rows: slice) -> np.ndarray:
            if act is not None:
                act(rollout, t, rows)
            if MASK in rollout.obs:
                mask = rollout.obs[MASK][t, rows].numpy()
                return random_actions(space, len(mask), rng, mask)
            return actions[t][rows]

        self._collector = Collector(self._groups, self._rollout, act_and_forget, cores=way.cores(self._groups))
        self._collector.reset()
        self.seconds: list[float] = []
        """Of a row, in each round."""

    def measure(self) -> None:
        """One round: rollouts for a while."""
        rollouts, elapsed, start = 0, 0.0, time.perf_counter()
        while elapsed < self._slice_seconds:
            self._collector.collect()
            rollouts, elapsed = rollouts + 1, time.perf_counter() - start
        self._collector.episodes.clear()
        self.seconds.append(elapsed / (rollouts * self._rollout.num_steps * self._rollout.num_envs))

    def rows_per_second(self) -> float:
        """At the lower quartile of the rounds' times: what disturbs the machine for a moment only ever slows it.

        The first round counts while it is the only one.
        """
        seconds = sorted(self.seconds[1:] or self.seconds)
        return 1 / seconds[len(seconds) // 4]

    def close(self) -> None:
        for group in self._groups:
            group.close()


def _measure(trials: Sequence[_Trial], total_rows: int) -> dict[Way, float]:
    """Rows a second of each way, measured in turn; ends the trials.

    Args:
        total_rows: of the whole run, which says how long a trial may take.
    """
    fewest, most = _ROUNDS
    for trial in trials:
        trial.measure()
    left, start = list(trials), time.perf_counter()
    for round_ in range(most if trials else 0):
        best = max(trial.rows_per_second() for trial in left)
        least, longest = _TRIAL_SECONDS
        if round_ >= fewest:
            if time.perf_counter() - start > min(max(least, _TRIAL_SHARE * total_rows / best), longest):
                break
            left = [trial for trial in left if trial.rows_per_second() > _HOPELESS * best]
        for trial in left[:: 1 if round_ % 2 else -1]:  # to and fro: none always follows the same one
            trial.measure()
    for trial in trials:
        trial.close()
    return {trial.way: trial.rows_per_second() for trial in trials}
