"""The built-in actor-critic with a memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from pyppo.actions import Distribution, log_prob_entropy, stream_seed
from pyppo.features import Prepared
from pyppo.policy.actor_critic import ActorCriticPolicy, Inputs
from pyppo.policy.memory import Memory
from pyppo.policy.protocol import Observation

__all__ = ["RecurrentPolicy"]


class RecurrentPolicy(ActorCriticPolicy):
    """Actor and critic on one GRU or LSTM, which goes on from step to step of an episode.

    Observations go through the encoder and the hidden layers, which are shared whatever `shared_trunk` says, then
    through the memory, then to linear heads. Whoever acts keeps the state: `state = policy.initial_state(n)`, then
    `actions, state = policy.act(obs, state=state)` for each step, and `state[done] = 0` where an episode begins.

    Attributes:
        memory: the recurrent layer.
        state_shape: of one environment's state, (size,) for a GRU and (2, size) for an LSTM.

    Args:
        recurrent: "gru" or "lstm".
        recurrent_size: width of its hidden state.
        obs_space, distribution, settings: as for `ActorCriticPolicy`.
    """

    def __init__(
        self,
        obs_space: spaces.Dict,
        distribution: Distribution,
        *,
        recurrent: str = "gru",
        recurrent_size: int = 128,
        seed: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(obs_space, distribution, seed=seed, **{**settings, "shared_trunk": True})
        self._settings |= {"recurrent": recurrent, "recurrent_size": recurrent_size}
        generator = torch.Generator().manual_seed(stream_seed(seed, "memory"))
        width = self.critic[0].in_features
        self.memory = Memory(recurrent, int(width), recurrent_size, generator)  # type: ignore[arg-type]
        self.state_shape = self.memory.state_shape
        self._make_heads(recurrent_size, (), "tanh", generator)

    def initial_state(self, num_envs: int) -> Tensor:
        """The state at the beginning of an episode: zeros [num_envs, *state_shape], where the policy is."""
        like = next(self.critic.parameters())
        return torch.zeros((num_envs, *self.state_shape), dtype=like.dtype, device=like.device)

    def heads(  # type: ignore[override]
        self, obs: Inputs, state: Tensor, starts: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Distribution parameters [T, B, ...], value [T, B] and the state after the last row.

        Args:
            obs: raw observations, entries [T, B, *shape], or what `prepare` made of their rows, [T, B, ...].
            state: [B, *state_shape], what flows into row 0.
            starts: bool [T, B]; the state before these rows is zero. None: before none.
        """
        first = obs if isinstance(obs, Tensor) else next(iter(obs.values()))
        length, num_envs = first.shape[:2]
        hidden, mask = self._hidden(_rows(obs))
        state = state.to(next(self.memory.parameters()).dtype)
        out, state = self.memory(hidden.unflatten(0, (length, num_envs)), state, starts)
        mask = None if mask is None else mask.unflatten(0, (length, num_envs))
        return self._params(self.actor(out), mask), self.critic(out).squeeze(-1), state

    def value(self, obs: Inputs, state: Tensor, starts: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The critic's value [T, B]; arguments as in `heads`."""
        return self.heads(obs, state, starts)[1]

    def evaluate(  # type: ignore[override]
        self, obs: Inputs, actions: Tensor, state: Tensor, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of `actions` [T, B, *shape], entropy and value, each [T, B], differentiable."""
        params, value, _ = self.heads(obs, state, starts)
        rows = {name: x.flatten(0, 1) if x.dim() > 2 else x for name, x in params.items()}
        logp, entropy = log_prob_entropy(self.distribution, rows, actions.flatten(0, 1))
        return logp.view_as(value), entropy.view_as(value), value

    @torch.no_grad()
    def act(  # type: ignore[override]
        self, obs: Observation, deterministic: bool = False, *, state: Tensor | None = None
    ) -> tuple[np.ndarray, Tensor]:
        """Environment-ready actions for one observation or a batch, and the state for the next step.

        Args:
            obs: raw observations [B, *shape] each, or a single one.
            deterministic: take the mode.
            state: [B, *state_shape]; `initial_state` at first, then what the last call gave, zeroed where an episode
                has begun since. It is not changed.

        Raises:
            ValueError: there is no state, or one of another shape; an observation has another shape.
        """
        tensors, batched = self._batch(obs)
        count = len(next(iter(tensors.values())))
        wanted = (count, *self.state_shape)
        if state is None or tuple(state.shape) != wanted:
            given = None if state is None else f"of shape {tuple(state.shape)}"
            raise ValueError(
                f"state is {given}; it must be a tensor of shape {wanted}: policy.initial_state({count}) at first, "
                "then what act gave with the actions: `actions, state = policy.act(obs, state=state)`"
            )
        params, _, state = self.heads({key: x.unsqueeze(0) for key, x in tensors.items()}, state)
        rows = {name: x.squeeze(0) if x.dim() > 2 else x for name, x in params.items()}
        actions = self._sample(rows, deterministic)
        return (actions if batched else actions[0]), state

    _SETTINGS = (*ActorCriticPolicy._SETTINGS, "recurrent", "recurrent_size")


def _rows(obs: Inputs) -> Inputs:
    """Sequences [T, B, ...] as rows [T * B, ...]."""
    if isinstance(obs, Tensor):
        return obs.flatten(0, 1)
    rows: Mapping[str, Tensor] = {name: x.flatten(0, 1) for name, x in obs.items()}
    return Prepared(rows) if isinstance(obs, Prepared) else rows
