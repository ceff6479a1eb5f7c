"""The general engine for policies with a state: whole sequences, from the state that flowed into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.engines import as_tensors, valid_indices
from pyppo.engines.torch_engine import KL_CHUNK, TorchEngine, map_minibatch, map_obs
from pyppo.policy import Minibatch, zero_where
from pyppo.rollout import Rollout


class Sequences:
    """All T steps of some environments of a rollout.

    Args:
        whole: their rows [T, B, ...], with the state that flows in, where episodes start, and which rows are valid.
        old: the parameters of the distribution that acted [T, B, ...], by name; empty unless the objective wants them.
    """

    weights: Tensor | None = None  # what is not valid is left out

    def __init__(self, whole: Minibatch, old: Mapping[str, Tensor]) -> None:
        self.whole, self._old = whole, old

    @cached_property
    def rows(self) -> Tensor | None:
        """Which of the [T * B] rows are valid; None: all."""
        assert self.whole.valid is not None
        return None if bool(self.whole.valid.all()) else valid_indices(self.whole.valid)

    @cached_property
    def data(self) -> Minibatch:
        """The valid rows, in [T, B] order, without their observations."""
        return map_minibatch(self.whole._replace(obs={}), self.valid)

    @cached_property
    def old(self) -> dict[str, Tensor]:
        """`old` at the valid rows."""
        return {key: self.valid(x) for key, x in self._old.items()}

    def valid(self, x: Tensor) -> Tensor:
        """The valid rows of [T, B, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def select(self, index: Tensor) -> Sequences:
        """The environments of `index`, in its order: one gather for each tensor."""
        return self._map(lambda x, dim: x.index_select(dim, index))

    def slice(self, start: int, stop: int) -> Sequences:
        """Environments start to stop, as views."""
        return self._map(lambda x, dim: x.narrow(dim, start, stop - start))

    def _map(self, take: Callable[[Tensor, int], Tensor]) -> Sequences:
        def rows(x: Tensor) -> Tensor:
            return take(x, 1)

        state, starts, valid = self.whole[6:]
        assert state is not None
        assert starts is not None
        assert valid is not None
        whole = map_minibatch(self.whole, rows)
        whole = whole._replace(state=take(state, 0), starts=rows(starts), valid=rows(valid))
        return Sequences(whole, {key: rows(x) for key, x in self._old.items()})


class SequenceEngine(TorchEngine):
    """`TorchEngine` for a policy that carries a state (`pyppo.policy.StatefulPolicy`).

    The state that flows into each row is kept in the rollout. Minibatches are whole sequences, all T steps of some
    environments, replayed from the state that flowed into the first row, zero again where an episode starts; rows that
    only carry a reset move no state that counts, and are left out of the loss. Gradients do not flow into the rollout
    before.

    Raises:
        ValueError: as `TorchEngine`; or there are more minibatches than environments.
    """

    def __init__(self, policy: nn.Module, config: Config, device: torch.device, distribution: Distribution) -> None:
        super().__init__(policy, config, device, distribution)
        self.state_shape = tuple(self.policy.state_shape)
        if config.num_minibatches > config.num_envs:
            raise ValueError(
                f"num_minibatches is {config.num_minibatches}; it must be at most num_envs = {config.num_envs}, since "
                "the policy has a state and a minibatch is all steps of some environments"
            )

    # --- acting ------------------------------------------------------------------------------------------------------

    def act(self, rollout: Rollout, t: int, rows: slice) -> np.ndarray:
        """Fill row `t` of `rows` with action, log-prob and value, and with the state that flows into row t + 1."""
        assert rollout.states is not None
        obs = {key: x[t, rows] for key, x in rollout.obs.items()}
        with torch.no_grad():
            state = self._state(rollout.states[t, rows], rollout.starts[t, rows])
            if not self.fused:
                return self._act_by_state(rollout, t, rows, obs, state)
            params, value, rollout.states[t + 1, rows] = self._call(self.policy.heads, self._one_step(obs), state)
            params = {key: x.squeeze(0) if x.dim() > 2 else x for key, x in params.items()}
            return self._store(rollout, t, rows, params, value.squeeze(0))

    def _act_by_state(self, rollout: Rollout, t: int, rows: slice, obs: dict[str, Tensor], state: Tensor) -> np.ndarray:
        assert rollout.states is not None
        actions, after = self.policy.act(self._arrays(obs), state=state)
        actions = np.asarray(actions)
        rollout.actions[t, rows] = torch.as_tensor(actions).to(rollout.actions)
        given = self._one_step(obs), rollout.actions[t, rows].unsqueeze(0), state
        logp, _, value = self._call(self.policy.evaluate, *given)
        rollout.logp[t, rows], rollout.values[t, rows] = logp.squeeze(0), value.squeeze(0)
        rollout.states[t + 1, rows] = after
        return self.distribution.clip(actions)

    @torch.no_grad()
    def value(self, obs: Mapping[str, np.ndarray | Tensor], state: Tensor | None = None) -> Tensor:
        """Values [n] of observations that follow `state` [n, *state_shape]; None: that begin episodes."""
        tensors = as_tensors(obs, self.device)
        count = len(next(iter(tensors.values())))
        if state is None:
            state = torch.zeros(count, *(self.state_shape or ()), device=self.device)
        state = state.to(self.device, self.flat.data.dtype)
        if self.fused:
            return self._call(self.policy.heads, self._one_step(tensors), state)[1].squeeze(0)
        actions = self._as_stored(np.asarray(self.policy.act(self._arrays(tensors), state=state)[0]))
        given = self._one_step(tensors), actions.unsqueeze(0), state
        return self._call(self.policy.evaluate, *given)[2].squeeze(0)

    def bootstrap(self, rollout: Rollout) -> None:
        """Write the value of the observation after the last step to `rollout.values[T]`."""
        assert rollout.states is not None
        obs = {key: x[-1] for key, x in rollout.obs.items()}
        rollout.values[-1] = self.value(obs, self._state(rollout.states[-1], rollout.starts[-1]))

    def _state(self, state: Tensor, starts: Tensor) -> Tensor:
        """The state [n, *] as the policy takes it: zero where an episode starts."""
        return zero_where(starts, state).to(self.flat.data.dtype)

    def _one_step(self, obs: dict[str, Tensor]) -> Any:
        """Observations [n, *], prepared, as sequences of one step."""
        return map_obs(self._prepare(obs), lambda x: x.unsqueeze(0))

    # --- updating ----------------------------------------------------------------------------------------------------

    def _flatten(self, rollout: Rollout) -> Sequences:
        """The whole rollout, observations prepared."""
        assert rollout.states is not None
        length, num_envs = rollout.num_steps, rollout.num_envs
        batch = super()._flatten(rollout)

        def unflatten(x: Tensor) -> Tensor:
            return x.unflatten(0, (length, num_envs))

        whole = map_minibatch(batch.data, unflatten)._replace(
            state=rollout.states[0].to(self.flat.data.dtype), starts=rollout.starts[:length], valid=rollout.valid
        )
        return Sequences(whole, {key: unflatten(x) for key, x in batch.old.items()})

    def _units(self, rows: Tensor, rollout: Rollout) -> Tensor:
        return torch.arange(rollout.num_envs if len(rows) else 0, device=self.device)

    def _heads(self, minibatch: Sequences) -> tuple[dict[str, Tensor], Tensor]:
        whole = minibatch.whole
        params, value, _ = self._call(self.policy.heads, whole.obs, whole.state, whole.starts)
        return {key: minibatch.valid(x) if x.dim() > 2 else x for key, x in params.items()}, minibatch.valid(value)

    def _evaluate(self, minibatch: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        whole = minibatch.whole
        given = whole.obs, whole.actions, whole.state, whole.starts
        logp, entropy, value = self._call(self.policy.evaluate, *given)
        return minibatch.valid(logp), minibatch.valid(entropy), minibatch.valid(value)

    def _shown(self, minibatch: Sequences) -> Minibatch:
        return minibatch.whole

    def _chunks(self, batch: Sequences, rows: Tensor) -> Iterator[Sequences]:
        length, num_envs = batch.whole.logp.shape
        size = max(1, KL_CHUNK // length)
        chunks = (batch.slice(first, min(first + size, num_envs)) for first in range(0, num_envs, size))
        return (chunk for chunk in chunks if len(chunk.data.logp))
