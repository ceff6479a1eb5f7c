"""The tensors that a captured update works on: where they lie does not change from one replay to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pyppo import ops
from pyppo.config import Config
from pyppo.engines.objective import STATS
from pyppo.engines.torch_engine import Batch
from pyppo.rollout import Rollout

__all__ = ["UpdateBuffers", "rollout_tensors"]

_AT_ONCE = 32  # tensors that one gather takes
_COLUMNS = len(STATS) + 3  # of the log: a loss's statistics [8], the gradient's norm, whether the step was taken


def rollout_tensors(rollout: Rollout) -> list[Tensor]:
    """Everything of a rollout that an engine reads or writes."""
    groups = (rollout.obs, rollout.dist_params or {})
    single = (rollout.actions, rollout.logp, rollout.values, rollout.advantages, rollout.returns, rollout.steps)
    return [x for group in groups for x in group.values()] + list(single)


def _entries(batch: Batch) -> Iterator[Tensor]:
    """Every tensor of a batch but its weights, always in the same order."""
    obs = batch.data.obs
    yield from obs.values() if isinstance(obs, Mapping) else [obs]
    yield from batch.data[1:6]
    yield from batch.old.values()


class UpdateBuffers:
    """What one captured update reads and writes. Numbers that change between replays are tensors on the device.

    Attributes:
        columns: the rollout's rows [T * N]: its own storage, and buffers for what is computed of it.
        computes: whether anything is.
        rows: int64 [T * N], of which the first `count` say which rows are valid.
        order: int64 [T * N], of which the first `count` are the epoch's permutation.
        count, part, place: int64 [1], the number of valid rows, the minibatch within the epoch, and within the update.
        minibatch: [capacity, ...], rows of `columns`; weights: float32 [capacity], 0 where a row only fills it up.
        rate: the learning rate, 0-d.
        stopped, skip: bool [1], whether the update has stopped; whether this minibatch takes no step.
        log: [M, 10], each minibatch's statistics; log_host: its copy in page-locked memory.
        stops: bool [epochs], in page-locked memory: whether the update had stopped at an epoch's end.
    """

    def __init__(self, batch: Batch, rollout: Rollout, config: Config) -> None:
        own = {x.untyped_storage().data_ptr() for x in rollout_tensors(rollout)}
        like, pinned = batch.data.logp, batch.data.logp.is_cuda
        device, dtype, total = like.device, like.dtype, len(like)

        def lies_there(x: Tensor) -> bool:
            return x.untyped_storage().data_ptr() in own and x.is_contiguous()

        self._computed = [not lies_there(x) for x in _entries(batch)]
        self.computes = any(self._computed)
        self.columns = batch.map(lambda x: x if lies_there(x) else x.new_empty(x.shape))
        self.num_parts = config.num_minibatches
        capacity = -(-total // self.num_parts)

        def integers(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        self.rows, self.order = integers(total), integers(total)
        self.count, self.part, self.place = integers(1), integers(1), integers(1)
        self.minibatch = batch.map(lambda x: x.new_zeros(capacity, *x.shape[1:]))
        self.weights = torch.zeros(capacity, dtype=torch.float32, device=device)
        self.rate = torch.zeros((), dtype=dtype, device=device)
        self.stopped, self.skip = (torch.zeros(1, dtype=torch.bool, device=device) for _ in range(2))
        self.log = torch.zeros(config.update_epochs * self.num_parts, _COLUMNS, dtype=dtype, device=device)
        self.log_host = torch.zeros(self.log.shape, dtype=dtype, pin_memory=pinned)
        self.stops = torch.zeros(config.update_epochs, dtype=torch.bool, pin_memory=pinned)

    def refresh(self, batch: Batch) -> None:
        """Take in what was computed of the rollout; the rest lies in its storage."""
        for kept, now, computed in zip(_entries(self.columns), _entries(batch), self._computed, strict=True):
            if computed:
                kept.copy_(now)

    def begin(self, rows: Tensor, learning_rate: float) -> None:
        """Set out on an update of the valid rows, int64 [count]."""
        self.rows[: len(rows)].copy_(rows)
        self.count.fill_(len(rows))
        self.rate.fill_(learning_rate)
        for x in (self.stopped, self.log, self.place):
            x.zero_()

    def shuffle(self, count: int, seed: int, iteration: int, epoch: int) -> None:
        """Set out on an epoch."""
        ops.permutation(count, seed=seed, iteration=iteration, epoch=epoch, out=self.order[:count])
        self.part.zero_()

    def rehearse(self) -> None:
        """Set out on calls that must change no parameter: as in an update that has stopped."""
        self.stopped.fill_(True)
        self.part.zero_()
        self.place.zero_()

    def take(self) -> Batch:
        """Gather minibatch `part` of the epoch, and fill it up with one of its rows at weight 0."""
        pairs = list(zip(_entries(self.columns), _entries(self.minibatch), strict=True))
        for first in range(0, len(pairs), _AT_ONCE):
            columns, out = zip(*pairs[first : first + _AT_ONCE], strict=True)
            ops.gather_minibatch(
                columns, self.rows, self.order, count=self.count, part=self.part, num_parts=self.num_parts, out=out,
                weights=self.weights,
            )  # fmt: skip
        return self.minibatch._replace(weights=self.weights.to(self.rate.dtype))

    def note(self, stats: Tensor, grad_norm: Tensor) -> None:
        """Log this minibatch, and go on to the next."""
        row = torch.cat([stats, grad_norm.reshape(1), ~self.skip])
        self.log.index_copy_(0, self.place, row.unsqueeze(0))
        self.place += 1
        self.part += 1

    def tensors(self) -> list[Tensor]:
        """All of them, those of the rollout included."""
        own = [x for x in vars(self).values() if isinstance(x, Tensor)]
        return [*own, *_entries(self.columns), *_entries(self.minibatch)]
