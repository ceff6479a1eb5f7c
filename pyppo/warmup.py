"""Random play: actions that any space and mask allow, and the observations that they lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from gymnasium import spaces

from pyppo.masks import MASK
from pyppo.rollout import Group
from pyppo.spaces import choices, float_bounds

__all__ = ["random_actions", "random_rows"]


def random_rows(groups: Sequence[Group], rows: int, seed: int) -> dict[str, np.ndarray]:
    """Observations under random actions that the masks allow, to start observation statistics from.

    Steps all groups until there are at least `rows` valid rows; leaves them in the middle of episodes. What comes out
    depends on `seed` and the environments only, not on the grouping.

    Returns:
        entries `[rows', ...]`, rows' >= rows, in [T, N] order: the observations that the actions answered.
    """
    rng = np.random.default_rng(seed)
    num_envs = sum(group.num_envs for group in groups)
    edges = np.cumsum([0] + [group.num_envs for group in groups])
    parts = [group.reset(seed) for group in groups]
    obs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    valid = np.ones(num_envs, bool)
    kept: list[dict[str, np.ndarray]] = []
    count = 0
    while count < rows:
        kept.append({name: x[valid] for name, x in obs.items()})
        _check_warmup(obs, valid)
        count += int(valid.sum())
        actions = random_actions(groups[0].action_space, num_envs, rng, obs.get(MASK))
        for group, first, last in zip(groups, edges[:-1], edges[1:], strict=True):
            group.send(actions[first:last])
        steps = [group.recv() for group in groups]
        obs = {name: np.concatenate([step.obs[name] for step in steps]) for name in obs}
        if groups[0].autoreset == "next_step":
            valid = ~np.concatenate([step.terminated | step.truncated for step in steps])
    return {name: np.concatenate([part[name] for part in kept]) for name in obs}


def _check_warmup(obs: Mapping[str, np.ndarray], valid: np.ndarray) -> None:
    for name, x in obs.items():
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x[valid]).all():
            row = next(int(row) for row in np.flatnonzero(valid) if not np.isfinite(x[row]).all())
            raise ValueError(
                f"environment {row} gave an observation {name!r} that is not finite, under random actions; it must be "
                "finite"
            )


def random_actions(space: spaces.Space, n: int, rng: np.random.Generator, mask: np.ndarray | None = None) -> np.ndarray:
    """Actions `[n, *shape]`, uniform over finite sets and finite bounds, standard normal where a component has none.

    Args:
        mask: bool `[n, A]`, the actions to choose among (`pyppo.masks`), at least one for each component. None: all.
    """
    if (finite := choices(space)) is not None:
        low, count = finite
        if mask is None:
            actions = rng.integers(low, low + count, size=(n, *low.shape))
        else:
            actions = low + _among(mask, count.ravel(), rng).reshape(n, *low.shape)
        return actions.astype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        bits = rng.integers(0, 2, size=(n, *space.shape))
        return bits if mask is None else bits * mask.reshape(bits.shape)
    assert isinstance(space, spaces.Box)
    least, most = float_bounds(space)
    bounded = np.isfinite(least) & np.isfinite(most)
    low, high = np.where(bounded, least, 0.0), np.where(bounded, most, 1.0)
    uniform = rng.uniform(low, high, size=(n, *space.shape))
    normal = np.clip(rng.standard_normal((n, *space.shape)), least, most)
    return np.where(bounded, uniform, normal).astype(space.dtype)


def _among(mask: np.ndarray, nvec: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each row and component one of the choices that the mask allows, `[n, K]`."""
    drawn = np.where(mask, rng.random(mask.shape), -1.0)
    parts = np.split(drawn, np.cumsum(nvec)[:-1], axis=1)
    return np.stack([part.argmax(axis=1) for part in parts], axis=1)
