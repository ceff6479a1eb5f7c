"""What the trainer asks of a policy, with and without a state that it carries from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

__all__ = ["Minibatch", "Observation", "Policy", "StatefulPolicy"]

Observation = np.ndarray | Mapping[str, np.ndarray]


class Minibatch(NamedTuple):
    """What `auxiliary_loss` gets, on the engine's device: B valid rows of the rollout.

    A policy with a state gets whole sequences instead, so [T, B] wherever [B] is written here, and the last three.
    """

    obs: Any
    """What `heads` or `evaluate` was given: the dict of [B, *shape] tensors, or the output of `prepare`."""
    actions: Tensor
    """[B, *action shape], as sampled."""
    logp: Tensor
    """[B], log-probability under the policy that acted."""
    advantages: Tensor
    """[B], before the minibatch's own normalisation."""
    returns: Tensor
    """[B], the value targets."""
    values: Tensor
    """[B], the value estimates of the policy that acted."""
    state: Tensor | None = None
    """[B, *state_shape], what flows into the first step of each sequence."""
    starts: Tensor | None = None
    """[T, B] bool: an episode begins with this row, so the state before it is zero."""
    valid: Tensor | None = None
    """[T, B] bool: False at rows that only carry a reset, which must not count."""


@runtime_checkable
class Policy(Protocol):
    """What the trainer needs of an `nn.Module`. Two methods; everything else is optional.

    Observations reach `evaluate` as a dict of tensors [B, *shape], one entry named "obs" where the environment's
    observation is a plain array, in the storage dtype (float32 for floats, uint8 and integers as they are). An action
    mask is the entry "action_mask", bool [B, A].

    Optional, found by name:

    * `heads(obs) -> (params, value [B])`: the distribution's parameters, `{"logits": [B, A]}` or `{"mean": [B, D],
      "log_std": [D] or [B, D]}`, plus `"action_mask"` [B, A] if some actions are forbidden. A policy that has it trains
      through the fused loss, and `evaluate` is not called.
    * `prepare(obs) -> Any`: the part of the forward pass without parameters (normalisation, flattening). The engine
      calls it once for a whole rollout and passes rows of the result (a tensor or a dict of tensors) to `heads` or
      `evaluate`.
    * `value(obs) -> [B]`: the critic alone; without it the engine calls `act` and `evaluate` to get a value.
    * `auxiliary_loss(minibatch: Minibatch) -> 0-d tensor`: added to the loss of each minibatch.
    * `state_shape`: the policy carries a state from step to step, and keeps the protocol `StatefulPolicy`.
    """

    def evaluate(self, obs: Any, actions: Tensor, state: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of `actions`, entropy of the policy and value, each [B], differentiable."""
        ...

    def act(self, obs: Observation, deterministic: bool = False) -> np.ndarray:
        """Actions, as the environments take them, for observations in the storage dtype; NumPy in and out, a single one
        or a batch. With `heads`, what `Distribution.to_env` makes of a sample, or of the mode.

        Training and `pyppo.evaluate` hand it plain arrays (dicts where the environment's observations are) in the
        same dtypes as `evaluate`: float32 even where the environment gives float64.

        A policy without `heads` is sampled through this method: what it returns is stored and handed to `evaluate`;
        a copy clipped to the action space's finite bounds is sent to the environment.
        """
        ...


@runtime_checkable
class StatefulPolicy(Protocol):
    """A policy with a memory: one tensor [B, *state_shape] that each step takes and gives, zero at an episode's start.

    The same names as in `Policy`, over sequences. `prepare` (rows, as ever), `auxiliary_loss` and `heads` are optional;
    with `heads(obs, state, starts) -> (params, value [T, B], state)` it trains through the fused loss: entries of
    `params` are [T, B, ...] (`log_std` may be [D]), the last is the state after the last row.

    Attributes:
        state_shape: of one environment's state.
    """

    state_shape: tuple[int, ...]

    def evaluate(
        self, obs: Any, actions: Tensor, state: Tensor, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of `actions`, entropy and value, each [T, B], differentiable.

        Args:
            obs: entries [T, B, *shape], or what `prepare` made of them.
            actions: [T, B, *action shape].
            state: [B, *state_shape], what flows into the first row.
            starts: bool [T, B]; the state before these rows is zero, whatever it was. None: before none.
        """
        ...

    def act(self, obs: Observation, deterministic: bool = False, *, state: Tensor) -> tuple[np.ndarray, Tensor]:
        """Actions for a batch of observations, and the state [B, *state_shape] for the next step."""
        ...
