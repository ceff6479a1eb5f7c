"""Finished episodes, counted a rollout at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Episode", "EpisodeCounter"]


class Episode(NamedTuple):
    """One finished episode: the environment's own sum of rewards and number of steps, before clipping and scaling.

    Of Atari, one game: its raw rewards over all lives, whatever training takes for an episode.
    """

    episode_return: float
    length: int
    step: int
    """Valid steps taken in all environments when it ended."""


class EpisodeCounter:
    """Sums up episodes over the rollouts of N environments, of valid rows only.

    Attributes:
        episodes: finished ones, oldest first; the caller empties it.
        valid_steps: valid steps so far, of all rollouts.
    """

    def __init__(self, num_envs: int) -> None:
        self.episodes: list[Episode] = []
        self.valid_steps = 0
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)

    def reset(self) -> None:
        """Drop what is unfinished."""
        self._returns[:] = 0
        self._lengths[:] = 0

    def count(self, rewards: np.ndarray, over: np.ndarray, valid: np.ndarray) -> int:
        """Take in a rollout; episodes that ended in it come in order of time, then row; the rest is carried over.

        Args:
            rewards: `[T, N]`. over: bool `[T, N]`, valid rows where an episode ends. valid: bool `[T, N]`.

        Returns:
            how many rows are valid.
        """
        # Running sums over the rollout; an episode's own is the difference to the one at the end before it.
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
        count = int(steps[-1]) - self.valid_steps
        self.valid_steps += count
        return count


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
