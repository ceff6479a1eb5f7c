"""Evaluation: whole episodes in environments of their own, with every statistic left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from torch import nn

from pyppo.actions import Distribution, stream_seed
from pyppo.checkpoint import find_checkpoint, load, read_config
from pyppo.envs import EnvGroup, make_envs

_TRAINING_ONLY = ("episodic_life", "reward_clip")  # Atari options that make an episode or a reward another thing


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the evaluated episodes came to."""

    returns: np.ndarray
    """[episodes] float64, the environment's own sum of rewards."""
    lengths: np.ndarray
    """[episodes] int64, steps."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes (population, as `numpy.std`)."""
        return float(self.returns.std())

    def __repr__(self) -> str:
        return f"Evaluation(episodes={len(self.returns)}, mean={self.mean:.2f}, std={self.std:.2f})"


def evaluate(
    policy: Any,
    env_id: str | None = None,
    *,
    episodes: int = 10,
    deterministic: bool = True,
    seed: int = 0,
    num_envs: int | None = None,
    env_options: Mapping[str, Any] | None = None,
    envs: VectorEnv | None = None,
) -> Evaluation:
    """Run `episodes` whole episodes and collect their returns.

    Environment i of n contributes its first `episodes / n` episodes, fixed beforehand: taking whichever end first
    would favour short ones. Evaluation seeds differ from training's for any pair of seeds.

    Args:
        policy: a policy with `act`, or the path of a run or checkpoint folder.
        env_id: the environment; None: the one that the policy was trained on.
        episodes: how many, at least 1.
        deterministic: take the mode of the action distribution; otherwise sample from it.
        seed: of the environments and of sampled actions.
        num_envs: environments side by side; None: as many as episodes, at most 16.
        env_options: options of the environment; None: the ones saved with the policy, without those that only
            training wants (Atari's `episodic_life` and `reward_clip`).
        envs: your own environments instead of EnvPool's.

    Returns:
        Returns and lengths, environment by environment.

    Raises:
        ValueError, TypeError: an argument breaks its rule; no such environment; nothing says which environment.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; it must be at least 1")
    if num_envs is not None and num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}; it must be at least 1")
    if isinstance(policy, (str, Path)):
        config = read_config(find_checkpoint(Path(policy)).parent.parent)
        env_id = env_id or config.env_id
        env_options = config.env_options if env_options is None and env_id == config.env_id else env_options
        policy = load(policy)
    width = num_envs or min(episodes, 16)
    group = EnvGroup(envs) if envs is not None else _make(policy, env_id, env_options, width, seed)
    try:
        with _as_it_was(policy, stream_seed(seed, "evaluate")):
            return _run(policy, group, episodes, deterministic, stream_seed(seed, "evaluate.environments"))
    finally:
        if envs is None:
            group.close()


def _make(policy: Any, env_id: str | None, env_options: Mapping[str, Any] | None, num_envs: int, seed: int) -> EnvGroup:
    saved = getattr(policy, "metadata", None) or {}
    env_id = env_id or saved.get("env_id")
    if env_id is None:
        raise ValueError("env_id is None and the policy does not name its environment; it must be given")
    if env_options is None:
        env_options = saved.get("env_options", {}) if saved.get("env_id") == env_id else {}
    options = {name: value for name, value in env_options.items() if name not in _TRAINING_ONLY}
    return EnvGroup(make_envs(env_id, num_envs, seed, purpose="evaluate", options=options))


@contextmanager
def _as_it_was(policy: Any, seed: int) -> Iterator[None]:
    """Evaluation mode and a noise stream of its own; afterwards the policy is what it was."""
    training = policy.training if isinstance(policy, nn.Module) else False
    noise = policy.reseed(seed) if hasattr(policy, "reseed") else None
    if training:
        policy.eval()
    try:
        yield
    finally:
        if training:
            policy.train()
        if noise is not None:
            policy.reseed(*noise)


def _run(policy: Any, group: EnvGroup, episodes: int, deterministic: bool, seed: int) -> Evaluation:
    n = group.num_envs
    quota = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
    distribution = Distribution.from_space(group.action_space)
    finished: list[list[tuple[float, int]]] = [[] for _ in range(n)]
    returns, lengths = np.zeros(n), np.zeros(n, np.int64)
    obs, valid = group.reset(seed), np.ones(n, bool)
    while any(len(done) < wanted for done, wanted in zip(finished, quota, strict=True)):
        given = obs["obs"] if list(obs) == ["obs"] else obs
        group.send(distribution.clip(np.asarray(policy.act(given, deterministic=deterministic))))
        step = group.recv()
        returns += np.where(valid, step.rewards, 0.0)
        lengths += valid
        done = (step.terminated | step.truncated) & valid
        for row in np.flatnonzero(done):
            if len(finished[row]) < quota[row]:
                finished[row].append((float(returns[row]), int(lengths[row])))
        returns[done], lengths[done] = 0.0, 0
        if group.autoreset == "next_step":
            valid = ~done
        obs = step.obs
    columns = [episode for one in finished for episode in one]
    return Evaluation(np.array([r for r, _ in columns]), np.array([k for _, k in columns], np.int64))
