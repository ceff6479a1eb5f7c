"""The [T, N] storage of a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from pyppo.masks import MASK
from pyppo.spaces import dict_space

__all__ = ["Rollout"]


class Rollout:
    """T steps of N environments, time-major, on one device. Row T of `obs` and `values` is what follows the last step.

    Attributes:
        obs: entries `[T+1, N, ...]`; floats as float32, integers as the environment has them (unsigned ones of more
            than 8 bits in a signed type), "action_mask" as bool `[T+1, N, A]`.
        actions: `[T, N]` int64 (Discrete), `[T, N, *shape]` int64 (MultiDiscrete, MultiBinary, Box of integers: as the
            distribution counts them, from 0) or float32 (Box of floats); as sampled, before any clipping.
        logp, advantages, returns: `[T, N]` float32. values: `[T+1, N]` float32.
        rewards: `[T, N]` float32, what advantages are estimated from: scaled where the collector is told how.
        raw_rewards: `[T, N]` float64 on the CPU, the environment's own.
        terminated, truncated, valid: `[T, N]` bool. A row that only carries a reset is not valid.
        flags: bool `[3, P]`, P >= T * N, the storage of these three, which one copy fills.
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
        self.obs = {k: zeros(num_steps + 1, *(s.shape or ()), dtype=storage_dtype(k, s)) for k, s in entries.items()}
        continuous = np.issubdtype(action_space.dtype, np.floating)
        action_dtype = torch.float32 if continuous else torch.int64
        self.actions = zeros(num_steps, *(action_space.shape or ()), dtype=action_dtype)
        self.logp, self.rewards = zeros(num_steps), zeros(num_steps)
        self.values = zeros(num_steps + 1)
        size = num_steps * num_envs
        # Each begins at a multiple of 64 bytes, as a tensor of its own would.
        self.flags = torch.zeros((3, -(-size // 64) * 64), dtype=torch.bool, device=self.device)
        self.terminated, self.truncated, self.valid = (x[:size].view(num_steps, num_envs) for x in self.flags)
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
SIGNED = {"uint16": torch.int32, "uint32": torch.int64, "uint64": torch.int64}


def storage_dtype(name: str, space: spaces.Space) -> torch.dtype:
    """How a rollout keeps an observation's entry: floats as float32, unsigned integers above 8 bits as signed ones."""
    if name == MASK:
        return torch.bool
    if np.issubdtype(space.dtype, np.floating):
        return torch.float32
    return SIGNED.get(str(space.dtype)) or torch.from_numpy(np.zeros(0, space.dtype)).dtype
