"""Evaluation: whole episodes in environments of their own, with every statistic left alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from pyppo.actions import Distribution, stream_seed
from pyppo.checkpoint import load_checkpoint, restore_policy
from pyppo.config_rules import checked
from pyppo.envpool_envs import make_envs
from pyppo.envs import EnvGroup
from pyppo.own_envs import as_group
from pyppo.policy import BUILT_IN, ActorCriticPolicy, zero_where
from pyppo.storage import SIGNED

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
    envs: VectorEnv | EnvGroup | Sequence[str | Callable[[], Any]] | None = None,
) -> Evaluation:
    """Run `episodes` whole episodes and collect their returns.

    Environment i of n contributes its first `episodes / n` episodes, fixed beforehand: taking whichever end first
    would favour short ones. Evaluation seeds differ from training's for any pair of seeds.

    Args:
        policy: a policy with `act`, or the path of a run or checkpoint folder. The state of one with `state_shape` is
            carried from step to step and is zero where an episode begins.
        env_id: the environment; None: the one that the policy was trained on.
        episodes: how many, at least 1.
        deterministic: take the mode of the action distribution; otherwise sample from it.
        seed: of the environments and of sampled actions.
        num_envs: environments side by side; None: as many as episodes, at most 16.
        env_options: options of the environment, used as given; None: the ones saved with the policy, without those
            that only training wants (Atari's `episodic_life` and `reward_clip`).
        envs: your own environments instead of EnvPool's; an `EnvGroup` where the autoreset mode must be said; or a list
            of `gymnasium.make` names or of functions that make one environment each.

    Returns:
        Returns and lengths, environment by environment.

    Raises:
        ValueError, TypeError: an argument breaks its rule; no such environment, or one that the policy does not fit;
            nothing says which environment.
    """
    episodes = _count("episodes", episodes)
    seed = checked("seed", seed)
    width = min(episodes, 16) if num_envs is None else _count("num_envs", num_envs)
    if isinstance(policy, (str, Path)):
        policy = load_policy(policy)
    _check_policy(policy)
    if envs is not None:
        given = {"num_envs": num_envs, "env_options": env_options}
        if ignored := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{ignored[0]} is {given[ignored[0]]!r} and envs is given; it must be None, since it is EnvPool's"
            )
    place = (envs.first_env, envs.purpose) if isinstance(envs, EnvGroup) else None
    if envs is not None:
        group = as_group(envs, purpose="evaluate")
    else:
        group = make_group(policy, env_id, width, seed, env_options=env_options)
        group.owned = True
    try:
        with _as_it_was(policy, stream_seed(seed, "evaluate")):
            return _run(policy, group, episodes, deterministic, stream_seed(seed, "evaluate.environments"))
    finally:
        if group.owned:
            group.close()
        if group is envs and place is not None:  # a group of the user's own class; it may be trained in too
            group.place(*place)


def _count(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be an integer of at least 1") from None
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be at least 1")
    return number


def _check_policy(policy: Any) -> None:
    if isinstance(policy, type) or not callable(getattr(policy, "act", None)):
        what = f"the class {policy.__name__}" if isinstance(policy, type) else f"a {type(policy).__name__}"
        hint = ", as its .policy is" if hasattr(getattr(policy, "policy", None), "act") else ""
        must = "an object with act(obs, deterministic), or the path of a run or checkpoint folder"
        raise TypeError(f"policy is {what}; it must be {must}{hint}")


def load_policy(path: str | Path) -> ActorCriticPolicy:
    """The built-in policy of a run or checkpoint folder, wherever that was copied to.

    Raises:
        FileNotFoundError, ValueError: as `pyppo.load`; or the policy is a module of the user's own.
    """
    checkpoint = load_checkpoint(path)
    kind = checkpoint.state["policy"]["class"]
    if kind not in BUILT_IN:
        raise ValueError(
            f"{path} holds a {kind}, a module of your own; evaluate it from Python: "
            f"pyppo.evaluate(pyppo.load({str(path)!r}, policy=an_instance), env_id)"
        )
    policy = restore_policy(checkpoint)
    assert isinstance(policy, ActorCriticPolicy)
    return policy


def make_group(
    policy: Any, env_id: str | None, num_envs: int, seed: int, *, env_options: Mapping[str, Any] | None = None
) -> EnvGroup:
    """EnvPool's environments to evaluate `policy` in; the arguments are those of `evaluate`."""
    saved, named = getattr(policy, "metadata", None) or {}, env_id is not None
    env_id = env_id or saved.get("env_id")
    if env_id is None:
        raise ValueError("env_id is None and the policy does not name its environment; it must be given")
    if not named and saved.get("own_envs"):
        raise ValueError(
            f"env_id is None and the policy was trained in environments of your own ({env_id}); one of EnvPool's must "
            "be named, or envs given"
        )
    if env_options is None:
        kept = saved.get("env_options", {}) if saved.get("env_id") == env_id else {}
        env_options = {name: value for name, value in kept.items() if name not in _TRAINING_ONLY}
    group = EnvGroup(make_envs(env_id, num_envs, seed, purpose="evaluate", options=env_options), purpose="evaluate")
    wanted, given = getattr(policy, "obs_shapes", None), {key: x.shape for key, x in group.obs_space.items()}
    if wanted is not None and any(given.get(key) != shape for key, shape in wanted.items()):
        group.close()
        raise ValueError(f"{env_id} gives observations {given}; the policy was trained on {wanted}")
    try:
        _check_actions(policy, group)
    except (ValueError, TypeError):
        group.close()
        raise
    return group


@contextmanager
def _as_it_was(policy: Any, seed: int) -> Iterator[None]:
    """Evaluation mode and a noise stream of its own; afterwards the policy is what it was.

    A policy without `reseed` draws from torch's generator, which is seeded for it and put back.
    """
    modes = {module: module.training for module in policy.modules()} if isinstance(policy, nn.Module) else {}
    reseed = getattr(policy, "reseed", None)
    noise = None if reseed is None else reseed(seed)
    devices = {x.device for x in policy.parameters()} if isinstance(policy, nn.Module) else set()
    if modes:
        policy.eval()
    gpus = [device for device in devices if device.type == "cuda"]
    try:
        with torch.random.fork_rng(gpus, enabled=reseed is None):
            if reseed is None:  # only the generators that are put back
                torch.default_generator.manual_seed(seed)
                for gpu in gpus:
                    torch.cuda.default_generators[gpu.index or 0].manual_seed(seed)
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        if reseed is not None and noise is not None:
            reseed(*noise)


def _check_actions(policy: Any, group: EnvGroup) -> None:
    trained = getattr(policy, "distribution", None)
    if not isinstance(trained, Distribution):
        return
    ours, theirs = ((x.kind, x.shape, x.nvec, x.start) for x in (trained, Distribution.from_space(group.action_space)))
    if ours != theirs:
        raise ValueError(
            f"the environments' action space is {group.action_space}; the policy was trained on "
            f"{trained.kind} actions of shape {trained.shape}, {trained.num_params} parameters: another space"
        )


def _run(policy: Any, group: EnvGroup, episodes: int, deterministic: bool, seed: int) -> Evaluation:
    n = group.num_envs
    quota = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
    finished: list[list[tuple[float, int]]] = [[] for _ in range(n)]
    returns, lengths = np.zeros(n), np.zeros(n, np.int64)
    shape = getattr(policy, "state_shape", None)
    state = None if shape is None else _zeros(policy, (n, *shape))
    obs, valid = group.reset(seed), np.ones(n, bool)
    distribution = Distribution.from_space(group.action_space)
    _check_actions(policy, group)
    while any(len(done) < wanted for done, wanted in zip(finished, quota, strict=True)):
        stored = {key: _stored(x) for key, x in obs.items()}
        given = stored["obs"] if list(stored) == ["obs"] else stored
        if state is None:
            actions = policy.act(given, deterministic=deterministic)
        else:
            actions, state = policy.act(given, deterministic=deterministic, state=state)
        group.send(distribution.clip(np.asarray(actions)))
        step = group.recv()
        done = step.terminated | step.truncated
        # Of Atari, whole games and their raw rewards, whatever its options make of an episode.
        rewards = step.rewards if step.episode_rewards is None else step.episode_rewards
        over = (done if step.episode_over is None else step.episode_over) & valid
        returns += np.where(valid, rewards, 0.0)
        lengths += valid
        for row in np.flatnonzero(over):
            if len(finished[row]) < quota[row]:
                finished[row].append((float(returns[row]), int(lengths[row])))
        returns[over], lengths[over] = 0.0, 0
        begins = done
        if group.autoreset == "next_step":
            begins, valid = ~valid, ~(done & valid)
        if state is not None:
            state = zero_where(torch.from_numpy(begins).to(state.device), state)
        obs = step.obs
    columns = [episode for one in finished for episode in one]
    return Evaluation(np.array([r for r, _ in columns]), np.array([k for _, k in columns], np.int64))


def _zeros(policy: Any, shape: tuple[int, ...]) -> Tensor:
    """The state of episodes that begin, where the policy is."""
    like = next(policy.parameters(), torch.zeros(())) if isinstance(policy, nn.Module) else torch.zeros(())
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _stored(x: np.ndarray) -> np.ndarray:
    """In the dtype that a rollout stores, which is what the policy was trained on."""
    if x.dtype.kind == "f":
        return x.astype(np.float32, copy=False)
    kept = SIGNED.get(str(x.dtype))
    return x if kept is None else x.astype(torch.empty(0, dtype=kept).numpy().dtype)
