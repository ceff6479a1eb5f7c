"""The engine for GPUs: acting and a whole minibatch step, each one captured CUDA graph."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pyppo import ops
from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.engines import Schedule
from pyppo.engines.captured import CaptureError, Graphs, Step
from pyppo.engines.objective import APPROX_KL, STATS, kl_limit, loss_settings, mean_metrics
from pyppo.engines.torch_engine import TorchEngine
from pyppo.engines.update_buffers import UpdateBuffers, rollout_tensors
from pyppo.rollout import Rollout

_log = logging.getLogger("pyppo")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not(policy: nn.Module, device: torch.device) -> str | None:
    """Why `CudaGraphEngine` cannot run a policy there, as far as that shows without a call; None: it can be tried."""
    if device.type != "cuda":
        return f"the device is {device}, not a GPU"
    return _unfit(policy)


def _unfit(policy: nn.Module) -> str | None:
    kind = type(policy).__name__
    if getattr(policy, "state_shape", None) is not None:
        return "the policy is recurrent"
    if not hasattr(policy, "heads"):
        return f"the policy, a {kind}, has no heads(), and its act() is NumPy"
    if getattr(policy, "auxiliary_loss", None) is not None:
        return f"the policy, a {kind}, has an auxiliary_loss(), which would see the rows that fill up a minibatch"
    for name, module in policy.named_modules():
        place = f"policy.{name}" if name else "the policy"
        if isinstance(module, _NormBase):
            return f"{place} is a {type(module).__name__}, which would count the rows that fill up a minibatch"
        if any(map(vars(module).get, _HOOKS)):
            return f"{place} has hooks, which a graph would not call"
    for name, p in policy.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return f"parameter {name} has hooks, which a graph would not call"
    return None


class CudaGraphEngine(TorchEngine):
    """`TorchEngine` without Python and launches between the kernels: what a step does is captured when it first runs,
    and replayed from then on.

    A graph for each group of rows acts: from row t of the observations to row t of everything else, and the actions to
    the host, which is the step's only wait. A second kind is one minibatch's gather, forward pass, loss, backward pass,
    clipping and Adam. All that they touch lies where it lay; what changes from replay to replay (the row, the
    minibatch's number, the permutation, the learning rate, whether the update has stopped) are tensors on the device.
    A minibatch has room for the largest part of a rollout, and is filled up with rows of weight 0, so no row of a
    policy's outputs may depend on other rows. The steps are captured again if parameters or storage moved, if modules
    of the policy changed, or a coefficient of the loss.

    A policy's Python runs when it is captured, not in every call: what it computes must be a function of its tensors
    alone. If it cannot be captured (it reads a number back from the device, say), an engine that "auto" took goes on
    as `TorchEngine`, and `name` and `reason` say so.

    Args:
        policy: a module with `heads`, without a state.
        config: the run's settings.
        device: a GPU. On the CPU the same steps run on the same tensors, uncaptured.
        distribution: the action space's family.

    Raises:
        ValueError: the policy cannot run here (see `why_not`), now or when it first acts or updates; or as
            `TorchEngine`.
    """

    name = "cuda_graph"

    def __init__(self, policy: nn.Module, config: Config, device: torch.device, distribution: Distribution) -> None:
        if (unfit := _unfit(policy)) is not None:
            raise _refusal(unfit)
        super().__init__(policy, config, device, distribution)
        self._captures = True
        self._graphs = self.new_graphs(device)
        self._rollout: Rollout | None = None
        self._bound_to: Any = None
        self._groups: dict[tuple[int, int], _Acting] = {}
        self._updating: _Updating | None = None

    new_graphs: Callable[[torch.device], Graphs] = Graphs

    # --- acting ------------------------------------------------------------------------------------------------------

    def act(self, rollout: Rollout, t: int, rows: slice) -> np.ndarray:
        """Fill row `t` of `rows` with action, log-prob and value; return the environment's actions [n, *shape]."""
        if self._captures:
            try:
                return self.distribution.to_env(self._acting(rollout, t, rows)(t))
            except CaptureError as error:
                self._go_on_without(error)
        return super().act(rollout, t, rows)

    def _acting(self, rollout: Rollout, t: int, rows: slice) -> _Acting:
        if rollout is not self._rollout or (t == 0 and rows.start == 0):
            self._look(rollout)
        key = rows.start, rows.stop
        if key not in self._groups:
            self._groups[key] = _Acting(self, rollout, t, rows)
        return self._groups[key]

    def act_step(self, rollout: Rollout, rows: slice, t: Tensor, sent: Tensor) -> None:
        """`act` on static tensors.

        Args:
            t: int64 [1], the row; it goes on to the next, after the last one to the first.
            sent: the actions, on the host.
        """
        with self._no_gradients():
            obs = {key: x[:, rows].index_select(0, t).squeeze(0) for key, x in rollout.obs.items()}
            params, value = self._call(self.policy.heads, self._prepare(obs))
            sample = self._draw(rollout, rows, params)
            sent.copy_(sample.actions.view_as(sent), non_blocking=True)
            written = [(rollout.actions, sample.actions), (rollout.logp, sample.logp), (rollout.values, value)]
            written += [(kept, params[key].expand(len(value), -1)) for key, kept in (rollout.dist_params or {}).items()]
            for column, x in written:
                row = column[:, rows]
                row.index_copy_(0, t, x.reshape(1, *row.shape[1:]).to(row.dtype))
            torch.remainder(t + 1, rollout.num_steps, out=t)

    # --- updating ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, schedule: Schedule, iteration: int) -> dict[str, float]:
        """All epochs over one rollout whose advantages and returns are set; the metrics, means over its rows."""
        if self._captures:
            try:
                return self._update(rollout, schedule, iteration)
            except CaptureError as error:
                self._go_on_without(error)
        return super().update(rollout, schedule, iteration)

    def _update(self, rollout: Rollout, schedule: Schedule, iteration: int) -> dict[str, float]:
        rows = rollout.valid_rows()
        if not len(rows):
            return super().update(rollout, schedule, iteration)
        self._look(rollout)
        if self._updating is None:
            self._updating = _Updating(self, rollout)
        update = self._updating
        update.match(schedule)
        try:
            update.launch(rows, schedule.learning_rate, iteration)
        finally:
            self.flat.written()
        metrics = update.read()
        if self.device.type == "cuda":
            ops.check_errors(self.device)
        wanted = self.dist_shapes is not None
        metrics["kl"] = self._exact_kl(update.buffers.columns, rows, schedule) if wanted else math.nan
        return metrics

    def minibatch_step(self, buffers: UpdateBuffers, schedule: Schedule) -> None:
        """Gather, forward, loss, backward, clipping and Adam on static tensors."""
        stats = self._backward(buffers.take(), schedule)
        if (limit := kl_limit(self.config)) is not None:
            buffers.stopped |= stats[APPROX_KL] > limit
        torch.logical_or(buffers.stopped, stats[len(STATS) :] == 0, out=buffers.skip)  # a part may have no row
        buffers.note(stats, self._step(buffers.rate, buffers.skip))

    # --- capturing ---------------------------------------------------------------------------------------------------

    def capture(self, step: Step, start: Step) -> Step:
        """`step`, captured; parameters, gradients, buffers and random numbers are left as they were.

        Raises:
            CaptureError: it cannot be.
        """
        before = self._layout()
        with self._left_alone():
            replay = self._graphs.capture(step, start)
        if self._layout() != before:
            raise CaptureError("calling the policy replaces a parameter, buffer or module of it")
        return replay

    @contextmanager
    def _left_alone(self) -> Iterator[None]:
        kept = [*self.policy.buffers(), self.flat.grad]
        values = [x.clone() for x in kept]
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                yield
        finally:
            with torch.no_grad():
                for x, value in zip(kept, values, strict=True):
                    x.copy_(value)

    def _look(self, rollout: Rollout) -> None:
        """Forget what was captured if it is not of this rollout and of the policy as it is now."""
        self.optimizer.check()
        if (unfit := _unfit(self.policy)) is not None:
            raise CaptureError(unfit)
        bound_to = self._layout(), [_place(x) for x in rollout_tensors(rollout)]
        if bound_to != self._bound_to:
            self._forget()
            self._bound_to = bound_to
        self._rollout = rollout

    def _layout(self) -> Any:
        """Where the policy's tensors lie, and what in it is captured as it is."""
        named = [*self.policy.named_parameters(), *self.policy.named_buffers()]
        own = [self.flat.data, self.flat.grad, self.optimizer.exp_avg, self.optimizer.exp_avg_sq]
        normalizer = getattr(self.policy, "normalizer", None)
        places = [(name, _place(x), x.requires_grad) for name, x in named]
        modules = [(module, module.training) for module in self.policy.modules()]
        return places, modules, [_place(x) for x in own], getattr(normalizer, "clip", None)

    def _forget(self) -> None:
        self._bound_to, self._groups, self._updating = None, {}, None
        self._graphs.forget()

    def _go_on_without(self, error: CaptureError) -> None:
        """From here on as `TorchEngine`, if that is what "auto" may take.

        Raises:
            ValueError: this engine was asked for.
        """
        if self.config.engine == "cuda_graph":
            raise _refusal(f"the policy cannot be captured: {error}") from error
        self._captures = False
        self._forget()
        self.name, self.reason = "torch", f"cuda_graph cannot: the policy cannot be captured: {error}"
        _log.warning(f"the engine is torch from here on, since cuda_graph cannot capture the policy: {error}")


class _Acting:
    """One group's acting, captured: a call fills row t and gives the actions [n, *shape], which the next overwrites."""

    def __init__(self, engine: CudaGraphEngine, rollout: Rollout, t: int, rows: slice) -> None:
        gpu = rollout.actions.is_cuda
        self._t = torch.zeros(1, dtype=torch.int64, device=rollout.device)
        like = rollout.actions[0, rows]
        dtype = engine.flat.data.dtype if like.is_floating_point() else like.dtype
        self._sent = torch.zeros(like.shape, dtype=dtype, pin_memory=gpu)
        self._actions = self._sent.numpy()
        self._done = torch.cuda.Event() if gpu else None
        self._length, self._next = rollout.num_steps, -1
        t_now, sent = self._t, self._sent
        # The trial calls write row t, which the first replay writes anew.
        self._replay = engine.capture(lambda: engine.act_step(rollout, rows, t_now, sent), lambda: t_now.fill_(t))

    def __call__(self, t: int) -> np.ndarray:
        if t != self._next:
            self._t.fill_(t)
        self._replay()
        self._next = (t + 1) % self._length
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self._t.device))
            self._done.synchronize()
        return self._actions


class _Updating:
    """The update of one rollout, captured."""

    def __init__(self, engine: CudaGraphEngine, rollout: Rollout) -> None:
        config = engine.config
        self.buffers = buffers = UpdateBuffers(engine._flatten(rollout), rollout, config)
        self._engine = engine
        self._settings: dict[str, Any] = {}
        self._limited, self._epochs = config.target_kl is not None, config.update_epochs
        self._events = [torch.cuda.Event() for _ in range(self._epochs)] if rollout.actions.is_cuda else []
        self._refresh: Step = lambda: None
        if buffers.computes:  # images are gathered as they are, and an empty graph is warned of
            self._refresh = engine.capture(lambda: buffers.refresh(engine._flatten(rollout)), lambda: None)

    def match(self, schedule: Schedule) -> None:
        """Capture the minibatch step, unless it is there with these coefficients of the loss."""
        settings, engine, buffers = loss_settings(self._engine.config, schedule), self._engine, self.buffers
        if settings != self._settings:
            self._minibatch = engine.capture(lambda: engine.minibatch_step(buffers, schedule), buffers.rehearse)
            self._settings = settings

    def launch(self, rows: Tensor, learning_rate: float, iteration: int) -> None:
        """Everything up to the metrics' copy to the host. Nothing waits for the device, but with a `target_kl` for the
        last epoch but one, so that the update ends soon after it stopped and the device always has an epoch to run."""
        b = self.buffers
        b.begin(rows, learning_rate)
        self._refresh()
        for epoch in range(self._epochs):
            if self._limited and epoch > 1 and self._had_stopped(epoch - 2):
                break
            b.shuffle(len(rows), self._engine._order_seed, iteration, epoch)
            for _ in range(b.num_parts):
                self._minibatch()
            if self._limited:
                b.stops[epoch : epoch + 1].copy_(b.stopped, non_blocking=True)
                self._record(epoch)
        b.log_host.copy_(b.log, non_blocking=True)
        self._record(-1)

    def read(self) -> dict[str, float]:
        """The metrics, once they are there."""
        self._wait(-1)
        stats, norms, applied = self.buffers.log_host.double().split((len(STATS) + 1, 1, 1), dim=1)
        return mean_metrics(stats, norms.squeeze(1), applied.squeeze(1) > 0)

    def _had_stopped(self, epoch: int) -> bool:
        self._wait(epoch)
        return bool(self.buffers.stops[epoch])

    def _record(self, event: int) -> None:
        if self._events:
            self._events[event].record(torch.cuda.current_stream(self.buffers.log.device))

    def _wait(self, event: int) -> None:
        if self._events:
            self._events[event].synchronize()


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def _refusal(reason: str) -> ValueError:
    return ValueError(f"engine is 'cuda_graph'; it must be 'auto' or 'torch', since {reason}")
