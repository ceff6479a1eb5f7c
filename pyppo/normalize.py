"""Running statistics of observations and rewards, and the scaling that they feed.

Statistics are float64 buffers that move with their module and are saved with it. They change only in `update` and
`scale`: acting, evaluating and loading never touch them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from pyppo import ops

__all__ = ["ObservationNormalizer", "RewardScaler", "RunningMeanStd"]

_EPSILON = 1e-8
_KERNEL_DEVICES = ("cpu", "cuda")
_KERNEL_TYPES = (torch.float32, torch.float64)


class _Float64Module(nn.Module):
    """A module whose float64 buffers stay float64 under `.half()`, `.float()` and `.to(dtype)`, and move with it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self


class RunningMeanStd(_Float64Module):
    """Mean and population variance of everything seen, element by element of `shape`.

    Batches are merged as Chan, Golub and LeVeque (1979) do. Before the first row, mean is 0 and variance 1.

    Attributes:
        mean, var: float64 `shape`.
        count: float64 scalar, rows seen.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Take in `rows` `[n, *shape]`; none changes nothing."""
        if rows.shape[1:] != self.mean.shape:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; it must be {('n', *self.mean.shape)}")
        if len(rows) == 0:
            return
        rows = rows.to(self.mean)
        batch_mean = rows.mean(dim=0)
        batch_var = (rows - batch_mean).square_().mean(dim=0)
        total = self.count + len(rows)
        delta = batch_mean - self.mean
        # A division of tensors: torch turns number / tensor into a product with the reciprocal, which is not quite 1
        # where it should be, and the square of a large offset times that is a visible variance.
        share = torch.full_like(total, len(rows)) / total
        var = self.var * (1 - share) + batch_var * share + delta.square() * (share * (1 - share))
        # In place, so that views that engines hold stay true. The first batch replaces the placeholder variance.
        self.var.copy_(var)
        self.mean.add_(delta * share)
        self.count.copy_(total)


class ObservationNormalizer(nn.Module):
    """`clip((x - mean) / sqrt(var + 1e-8))` for each float entry of an observation dict; other entries pass unchanged.

    Args:
        obs_space: a `Dict` space of Boxes, or one Box (entry "obs").
        clip: bound of the result, None for none.
    """

    def __init__(self, obs_space: spaces.Space, clip: float | None = 10.0) -> None:
        super().__init__()
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}; it must be above 0, or None")
        entries = obs_space.spaces if isinstance(obs_space, spaces.Dict) else {"obs": obs_space}
        floats = {name: space for name, space in entries.items() if np.issubdtype(space.dtype, np.floating)}
        self._modules_of = {name: _module_name(name) for name in floats}
        parts = {self._modules_of[name]: RunningMeanStd(space.shape or ()) for name, space in floats.items()}
        self.statistics = nn.ModuleDict(parts)
        self.clip = clip

    def forward(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Entries `[n, ...]`, float ones normalised in float32. Changes no statistics."""
        return {name: self._normalize(name, x) if name in self._modules_of else x for name, x in obs.items()}

    def mean_and_scale(self, name: str) -> tuple[Tensor, Tensor]:
        """What is taken off a float entry, and what the rest is multiplied by: float32, of the entry's shape."""
        statistics = cast("RunningMeanStd", self.statistics[self._modules_of[name]])
        return statistics.mean.float(), torch.rsqrt(statistics.var + _EPSILON).float()

    def _normalize(self, name: str, x: Tensor) -> Tensor:
        if x.dtype in _KERNEL_TYPES and x.device.type in _KERNEL_DEVICES and not x.requires_grad:
            statistics = cast("RunningMeanStd", self.statistics[self._modules_of[name]])
            return ops.normalize(x, statistics.mean, statistics.var, eps=_EPSILON, clip=self.clip)
        mean, scale = self.mean_and_scale(name)
        x = (x.float() - mean) * scale
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def update(self, obs: dict[str, Tensor]) -> None:
        """Take in observations `[n, ...]`: valid rows only, in [T, N] order."""
        for name, module in self._modules_of.items():
            cast("RunningMeanStd", self.statistics[module]).update(obs[name])


def _module_name(name: str) -> str:
    """A name that torch takes for a module: an observation may be called "items", or have a dot in its name."""
    return (
        name if name and "." not in name and not hasattr(nn.ModuleDict(), name) else f"entry {name.replace('.', ' ')}"
    )


class RewardScaler(_Float64Module):
    """Divides rewards by the running deviation of each environment's discounted return.

    The return R is R * gamma + r, over valid rows, and starts anew after a done row; it carries on from rollout to
    rollout. Its deviation includes the rollout that is being scaled. (Gymnasium's NormalizeReward scales each step by
    the statistics so far and lets truncated episodes run into the next.)

    Args:
        num_envs: N.
        gamma: discount.
        clip: bound of a scaled reward, None for none.
    """

    returns: Tensor

    def __init__(self, num_envs: int, gamma: float, clip: float | None = 10.0) -> None:
        super().__init__()
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}; it must be above 0, or None")
        self.gamma = gamma
        self.clip = clip
        self.statistics = RunningMeanStd()
        self.register_buffer("returns", torch.zeros(num_envs, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.statistics._apply(fn)
        return super()._apply(fn)

    def reset(self) -> None:
        """Forget the unfinished returns: the environments start anew. The statistics stay."""
        self.returns.zero_()

    @torch.no_grad()
    def scale(self, rewards: Tensor, terminated: Tensor, truncated: Tensor, valid: Tensor) -> Tensor:
        """Update the statistics with one rollout, then scale it.

        Args:
            rewards: `[T, N]`, the environment's own. terminated, truncated, valid: `[T, N]` bool.

        Returns:
            float32 `[T, N]` on the device of `rewards`; 0 at invalid rows.
        """
        returns = self._discounted(rewards, terminated, truncated, valid)
        keep = valid.to(self.statistics.mean.device)
        self.statistics.update(returns.to(keep.device)[keep])
        scaled = rewards.double() / (self.statistics.var.to(rewards.device) + _EPSILON).sqrt()
        if self.clip is not None:
            scaled = scaled.clamp(-self.clip, self.clip)
        return torch.where(valid.to(rewards.device), scaled, 0.0).float()

    def _discounted(self, rewards: Tensor, terminated: Tensor, truncated: Tensor, valid: Tensor) -> Tensor:
        """Discounted return up to and with each row, float64 `[T, N]` on the CPU; carries `returns` forward."""
        r, ended, keep = rewards.double().cpu().numpy(), (terminated | truncated).cpu().numpy(), valid.cpu().numpy()
        ended = ended & keep
        factor, term = np.where(keep, self.gamma, 1.0), np.where(keep, r, 0.0)
        factor[1:][ended[:-1]] = 0.0
        out = np.empty_like(term)
        running = self.returns.cpu().numpy()
        for row, f, x in zip(out, factor, term, strict=True):  # NumPy: torch's dispatch would cost several times this
            np.multiply(running, f, out=row)
            np.add(row, x, out=row)
            running = row
        self.returns.copy_(torch.from_numpy(np.where(ended[-1], 0.0, running)))
        return torch.from_numpy(out)
