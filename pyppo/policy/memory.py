"""Recurrent layers over sequences in which episodes begin anywhere."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pyppo.policy.networks import generator_untouched

__all__ = ["Memory", "zero_where"]


def zero_where(starts: Tensor, state: Tensor) -> Tensor:
    """A state [B, *state_shape], zero for the environments in which an episode starts, bool [B]."""
    return torch.where(starts.view(-1, *(1,) * (state.dim() - 1)), 0.0, state)


class Memory(nn.Module):
    """A GRU or LSTM whose state is one tensor, and is zero where an episode begins.

    The weights of each gate are orthogonal; biases are zero, but 1 for the gate that keeps the state (Jozefowicz et al.
    2015, "An Empirical Exploration of Recurrent Network Architectures").

    Args:
        kind: "gru" or "lstm".
        inputs, size: widths of what goes in and of the hidden state, which is what comes out.
        generator: of the weights.

    Attributes:
        state_shape: (size,), or (2, size) of an LSTM: hidden and cell state.
    """

    def __init__(self, kind: str, inputs: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        if kind not in ("gru", "lstm"):
            raise ValueError(f"recurrent is {kind!r}; it must be 'gru' or 'lstm'")
        self.kind, self.size = kind, size
        self.state_shape: tuple[int, ...] = (size,) if kind == "gru" else (2, size)
        cells = nn.GRU if kind == "gru" else nn.LSTM
        with generator_untouched():
            self.cells = cells(inputs, size, device="cpu", dtype=torch.float32)
        keeps = 1  # torch's order of gates: reset, update, new; input, forget, cell, output
        for name, p in self.cells.named_parameters():
            gates = p.data.chunk(3 if kind == "gru" else 4)
            for gate in gates:
                if name.startswith("weight"):
                    nn.init.orthogonal_(gate, generator=generator)
                else:
                    nn.init.zeros_(gate)
            if name == "bias_ih_l0":
                nn.init.ones_(gates[keeps])

    def forward(self, x: Tensor, state: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The hidden state after each row, and the whole state after the last.

        Episodes that begin within the sequence are sequences of their own, all of one batch: the time goes as the
        longest of them, not as a step for each row.

        Args:
            x: [T, B, inputs].
            state: [B, *state_shape], what flows into row 0.
            starts: bool [T, B]; the state before these rows is zero. None: before none.

        Returns:
            [T, B, size] and [B, *state_shape]. In the parameters' dtype under autocast too, since a state that is
            rounded at every step drifts.
        """
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                dtype = next(self.cells.parameters()).dtype
                return self.forward(x.to(dtype), state.to(dtype), starts)
        if starts is not None:
            state = zero_where(starts[0], state)
            if len(x) > 1:
                begins = starts.cpu().numpy()
                if begins[1:].any():
                    return self._packed(x, state, begins)
        out, last = self.cells(x, self._split(state))
        return out, self._join(last)

    def _packed(self, x: Tensor, state: Tensor, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        length, num_envs = starts.shape
        plan = _plan(starts)
        packed, position, first, last = (torch.as_tensor(part, device=x.device) for part in plan[:4])
        begin = zero_where(torch.as_tensor(plan.fresh, device=x.device), state.index_select(0, first))
        sequences = PackedSequence(x.flatten(0, 1).index_select(0, packed), torch.as_tensor(plan.batch_sizes))
        out, end = self.cells(sequences, self._split(begin))
        rows = out.data.index_select(0, position).view(length, num_envs, self.size)
        return rows, self._join(end).index_select(0, last)

    def _split(self, state: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """A state as the cells take it, [1, B, size] each."""
        if self.kind == "gru":
            return state.unsqueeze(0)
        return state[:, 0].unsqueeze(0).contiguous(), state[:, 1].unsqueeze(0).contiguous()

    def _join(self, state: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return state.squeeze(0) if isinstance(state, Tensor) else torch.stack([part.squeeze(0) for part in state], 1)


class _Plan(NamedTuple):
    """How rows [T, B] lie in a packed batch of S segments, the longest first."""

    packed: np.ndarray
    """[T * B], which row is where in the packed data."""
    position: np.ndarray
    """[T * B], its inverse: where each row is."""
    env: np.ndarray
    """[S], the environment of each segment."""
    last: np.ndarray
    """[B], each environment's last segment."""
    fresh: np.ndarray
    """[S] bool: its episode starts with it; else it goes on from the state that flows into row 0."""
    batch_sizes: np.ndarray
    """[longest], how many segments have so many rows."""


def _plan(starts: np.ndarray) -> _Plan:
    length, num_envs = starts.shape
    begins = starts.copy()
    begins[0] = True  # of a segment, whether or not of an episode
    flat = begins.T.ravel()  # environment by environment, so that each segment is in one piece
    first = np.flatnonzero(flat)
    sizes = np.diff(first, append=flat.size)
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    segment = np.cumsum(flat) - 1
    step = np.arange(flat.size) - first[segment]
    batch_sizes = len(sizes) - np.searchsorted(np.sort(sizes), np.arange(sizes.max()), side="right")
    offset = np.concatenate([[0], np.cumsum(batch_sizes)[:-1]])
    by_env = offset[step] + rank[segment]
    position = by_env.reshape(num_envs, length).T.ravel()
    packed = np.empty_like(position)
    packed[position] = np.arange(position.size)
    last = rank[segment.reshape(num_envs, length)[:, -1]]
    return _Plan(packed, position, (first // length)[order], last, starts.T.ravel()[first][order], batch_sizes)
