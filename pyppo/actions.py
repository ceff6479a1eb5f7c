"""Action spaces: the distribution family of each, and the way from its samples to the environment's actions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from pyppo.spaces import choices, float_bounds


@dataclass(frozen=True, eq=False)
class Distribution:
    """An action space's distribution family, and the way from its samples to the environment's actions."""

    kind: str
    """"categorical", "multi_categorical", "bernoulli" or "normal"."""
    shape: tuple[int, ...]
    """Shape of one action."""
    dtype: str
    """NumPy dtype of the environment's actions."""
    nvec: tuple[int, ...] | None = None
    """Number of choices of each component (multi_categorical: MultiDiscrete, Box of integers), or of the only one
    (categorical)."""
    start: tuple[int, ...] | None = None
    """The environment's smallest action, each component (discrete spaces)."""
    low: np.ndarray | None = None
    """Lower bounds, -inf where there is none (normal)."""
    high: np.ndarray | None = None
    """Upper bounds, +inf where there is none (normal)."""
    action_bounds: str = "clip"
    """"clip": samples are clipped to the bounds; "rescale": [-1, 1] is mapped onto the bounds, then clipped."""

    @classmethod
    def from_space(cls, space: spaces.Space, action_bounds: str = "clip") -> Distribution:
        """The family for a Gymnasium action space.

        Raises:
            TypeError: the space has no family here.
            ValueError: `action_bounds` is neither "clip" nor "rescale", or the space has too many choices.
        """
        if action_bounds not in ("clip", "rescale"):
            raise ValueError(f"action_bounds is {action_bounds!r}; it must be 'clip' or 'rescale'")
        shape, dtype = tuple(space.shape or ()), str(space.dtype)
        if (finite := choices(space)) is not None:
            start, nvec = (tuple(x.ravel().tolist()) for x in finite)
            return cls("multi_categorical" if shape else "categorical", shape, dtype, nvec=nvec, start=start)
        if isinstance(space, spaces.MultiBinary):
            return cls("bernoulli", shape, dtype)
        assert isinstance(space, spaces.Box)
        low, high = float_bounds(space)
        return cls("normal", shape, dtype, low=low, high=high, action_bounds=action_bounds)

    @property
    def num_params(self) -> int:
        """Width of the policy head: logits, or means."""
        return sum(self.nvec) if self.nvec is not None else math.prod(self.shape)

    @property
    def loss_arguments(self) -> dict[str, Any]:
        """The keyword arguments by which `ops.sample` and `ops.ppo_loss` know the family."""
        nvec = {"nvec": self.nvec} if self.kind == "multi_categorical" else {}
        return {"distribution": self.kind, **nvec}

    def kernel_arguments(self, params: Mapping[str, Tensor]) -> dict[str, Any]:
        """`loss_arguments` and the heads' parameters, detached: the kernels refuse to lose a gradient silently."""
        return {**self.loss_arguments, **{name: x.detach() for name, x in params.items()}}

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Samples [n, ...] as the environment takes them [n, *shape]: a copy, offset, clipped or rescaled."""
        actions = actions.reshape(len(actions), *self.shape)
        if self.kind != "normal":
            offset = np.array(self.start).reshape(self.shape) if self.start is not None else 0
            return (actions + offset).astype(self.dtype)
        assert self.low is not None
        assert self.high is not None
        if self.action_bounds == "rescale":
            bounded = np.isfinite(self.low) & np.isfinite(self.high)
            low, high = np.where(bounded, self.low, 0.0), np.where(bounded, self.high, 0.0)
            actions = actions.astype(np.float64)
            scaled = low + (np.clip(actions, -1.0, 1.0) + 1.0) * 0.5 * (high - low)
            actions = np.where(bounded, scaled, actions)
        return np.clip(actions.astype(self.dtype), self.low.astype(self.dtype), self.high.astype(self.dtype))

    def clip(self, actions: np.ndarray) -> np.ndarray:
        """Actions already in the environment's coordinates [n, *shape], a copy clipped to the finite bounds."""
        if self.kind != "normal":
            return actions.astype(self.dtype)
        assert self.low is not None
        assert self.high is not None
        return np.clip(actions.astype(self.dtype), self.low.astype(self.dtype), self.high.astype(self.dtype))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` is its inverse. Infinite bounds are written as null."""
        bounds = {name: _bounds_to_list(getattr(self, name)) for name in ("low", "high")}
        listed = {name: list(v) if (v := getattr(self, name)) is not None else None for name in ("nvec", "start")}
        return {
            "kind": self.kind, "shape": list(self.shape), "dtype": self.dtype, **listed, **bounds,
            "action_bounds": self.action_bounds,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> Distribution:
        """The distribution that `to_dict` described."""
        shape = tuple(spec["shape"])
        listed = {name: tuple(v) if (v := spec[name]) is not None else None for name in ("nvec", "start")}
        low, high = _bounds_from_list(spec["low"], -np.inf, shape), _bounds_from_list(spec["high"], np.inf, shape)
        plain = {name: spec[name] for name in ("kind", "dtype", "action_bounds")}
        return cls(shape=shape, low=low, high=high, nvec=listed["nvec"], start=listed["start"], **plain)


def _bounds_to_list(bound: np.ndarray | None) -> list[float | None] | None:
    return None if bound is None else [float(b) if np.isfinite(b) else None for b in bound.ravel()]


def _bounds_from_list(bound: list[float | None] | None, missing: float, shape: tuple[int, ...]) -> np.ndarray | None:
    if bound is None:
        return None
    return np.array([missing if b is None else b for b in bound], dtype=np.float64).reshape(shape)


def log_prob_entropy(
    distribution: Distribution, params: Mapping[str, Tensor], actions: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability of `actions` [B, *shape] and entropy, each [B], differentiable in the heads' parameters.

    For code that needs these apart from the loss; the fused loss has formulas of its own. `params["action_mask"]` bool
    [B, A], if it is there: False forbids an action, and of a MultiBinary is a bit that is surely 0.
    """
    actions = actions.reshape(len(actions), *(() if distribution.kind == "categorical" else (-1,)))
    if distribution.kind == "normal":
        normal = torch.distributions.Normal(params["mean"], params["log_std"].exp(), validate_args=False)
        return normal.log_prob(actions).sum(1), normal.entropy().sum(1)
    logits, mask = params["logits"], params.get("action_mask")
    if distribution.kind == "bernoulli":
        return _bits(logits, mask, actions)
    assert distribution.nvec is not None
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    families = [
        torch.distributions.Categorical(logits=part, validate_args=False)
        for part in logits.split(distribution.nvec, dim=1)
    ]
    columns = actions.unbind(1) if distribution.kind == "multi_categorical" else [actions]
    logp = [family.log_prob(column) for family, column in zip(families, columns, strict=True)]
    return torch.stack(logp).sum(0), torch.stack([family.entropy() for family in families]).sum(0)


def _bits(logits: Tensor, mask: Tensor | None, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of independent bits, each [B]; one that is forbidden is surely 0."""
    family = torch.distributions.Bernoulli(logits=logits, validate_args=False)
    logp, entropy = family.log_prob(actions.to(logits.dtype)), family.entropy()
    if mask is not None:
        logp = torch.where(mask, logp, torch.where(actions.bool(), -math.inf, 0.0))
        entropy = torch.where(mask, entropy, 0.0)
    return logp.sum(1), entropy.sum(1)


def stream_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for one use of randomness, so that no two streams of a run share their noise."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
