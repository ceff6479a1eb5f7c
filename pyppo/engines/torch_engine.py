"""The general engine: any `nn.Module` policy, CPU or CUDA, eager torch around the fused kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from pyppo import ops
from pyppo.actions import Distribution, stream_seed
from pyppo.config import Config
from pyppo.engines import Schedule, as_tensors
from pyppo.engines.objective import APPROX_KL, STATS, dist_shapes, kl_limit, loss_settings, mean_metrics
from pyppo.engines.optimizer import OptimizerState
from pyppo.features import Prepared
from pyppo.policy import BUILT_IN, Minibatch
from pyppo.results import Sample
from pyppo.rollout import Rollout

KL_CHUNK = 16384  # rows of one forward pass where the exact KL of the whole batch is wanted


class Batch(NamedTuple):
    """Rows of a rollout: the whole of it flattened to [T * N], or one minibatch."""

    data: Minibatch
    old: dict[str, Tensor]
    """The parameters of the distribution that acted, by name; empty unless the objective wants them."""
    weights: Tensor | None = None
    """[B], which rows count; None: all."""

    def select(self, index: Tensor) -> Batch:
        """The rows of `index`, in its order: one gather for each tensor."""
        return self.map(lambda x: x.index_select(0, index))

    def slice(self, start: int, stop: int) -> Batch:
        """Rows start to stop, as views."""
        return self.map(lambda x: x[start:stop])

    def map(self, rows: Callable[[Tensor], Tensor]) -> Batch:
        """Every tensor changed, but for the weights, which are left out."""
        return Batch(map_minibatch(self.data, rows), {key: rows(x) for key, x in self.old.items()})


def map_obs(obs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What `prepare` gave, a tensor or a dict of tensors, each changed; a `Prepared` stays one."""
    if not isinstance(obs, Mapping):
        return change(obs)
    changed = {key: change(x) for key, x in obs.items()}
    return Prepared(changed) if isinstance(obs, Prepared) else changed


def map_minibatch(data: Minibatch, change: Callable[[Tensor], Tensor]) -> Minibatch:
    """A minibatch whose tensors are changed; what it has of sequences is left out."""
    return Minibatch(map_obs(data.obs, change), *(change(x) for x in data[1:6]))


def widened(x: Any, dtype: torch.dtype) -> Any:
    """What a policy gave, a tensor or tuples and dicts of them, its floating tensors in `dtype`."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, Mapping):
        return {key: widened(entry, dtype) for key, entry in x.items()}
    return tuple(widened(entry, dtype) for entry in x)


class TorchEngine:
    """Runs the policy with torch's autograd; loss, sampling and optimiser are `pyppo.ops`. The definition of right.

    With `precision="bf16"` the policy's forward pass (and so its backward pass) is under torch's autocast; what it
    gives is widened to float32, and so are loss, optimiser and parameters. On a GPU, convolutions are channels-last.

    Args:
        policy: a module with `pyppo.policy.Policy`'s methods; it is moved to `device`.
        config: the run's settings.
        device: where policy and rollouts live.
        distribution: the action space's family.

    Raises:
        ValueError: a KL objective or schedule, or `action_bounds="rescale"`, is asked of a policy without `heads`; or
            `precision="bf16"` of one whose parameters are not float32.
    """

    name = "torch"

    def __init__(self, policy: nn.Module, config: Config, device: torch.device, distribution: Distribution) -> None:
        self.policy: Any = policy.to(device)
        if device.type == "cuda":
            for module in policy.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config, self.device, self.distribution, self.reason = config, device, distribution, ""
        self.fused = hasattr(policy, "heads")
        if not self.fused and distribution.action_bounds == "rescale":
            raise ValueError(
                "action_bounds is 'rescale'; it must be 'clip': a policy without heads() acts in the environment's "
                "own coordinates"
            )
        self.dist_shapes = dist_shapes(config, distribution, self.fused)
        self.state_shape: tuple[int, ...] | None = None
        self.optimizer = OptimizerState(policy, device)
        self.flat, self.step = self.optimizer.flat, self.optimizer.step
        self._bf16 = config.precision == "bf16"
        if self._bf16 and self.flat.data.dtype != torch.float32:
            raise ValueError(
                f"precision is 'bf16'; it must be 'fp32', since the policy's parameters are {self.flat.data.dtype}"
            )
        # A module of the user's own may keep a tensor for later; one of inference mode could not be trained with.
        self._no_gradients = torch.inference_mode if type(policy) in BUILT_IN.values() else torch.no_grad
        self._noise_seed = stream_seed(config.seed, "act")
        self._order_seed = stream_seed(config.seed, "minibatches")

    # --- acting ------------------------------------------------------------------------------------------------------

    def act(self, rollout: Rollout, t: int, rows: slice) -> np.ndarray:
        """Fill row `t` of `rows` with action, log-prob and value; return the environment's actions [n, *shape]."""
        obs = {key: x[t, rows] for key, x in rollout.obs.items()}
        if not self.fused:
            return self._act_by_policy(rollout, t, rows, obs)
        with self._no_gradients():
            params, value = self._call(self.policy.heads, self._prepare(obs))
            return self._store(rollout, t, rows, params, value)

    def _draw(self, rollout: Rollout, rows: slice, params: dict[str, Tensor]) -> Sample:
        """Actions for the rows' distributions, with the noise that is due."""
        return ops.sample(
            **self.distribution.kernel_arguments(params),
            seed=self._noise_seed,
            step=rollout.steps[rows],
            row_offset=rows.start,
        )

    def _store(self, rollout: Rollout, t: int, rows: slice, params: dict[str, Tensor], value: Tensor) -> np.ndarray:
        """Draw from what the heads gave, and write it to row `t`; the environment's actions [n, *shape]."""
        sample = self._draw(rollout, rows, params)
        rollout.actions[t, rows] = sample.actions.view_as(rollout.actions[t, rows])
        rollout.logp[t, rows], rollout.values[t, rows] = sample.logp, value
        for key, kept in (rollout.dist_params or {}).items():
            kept[t, rows] = params[key]
        return self.distribution.to_env(sample.actions.cpu().numpy())

    def _call(self, method: Callable[..., Any], *given: Any) -> Any:
        """What a method of the policy gives, computed in the precision that the settings name."""
        if not self._bf16:
            return method(*given)
        # Without a cache: what is cached within a captured graph would lie in the graph's memory.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            result = method(*given)
        return widened(result, self.flat.data.dtype)

    @torch.no_grad()
    def _act_by_policy(self, rollout: Rollout, t: int, rows: slice, obs: dict[str, Tensor]) -> np.ndarray:
        actions = self._policy_actions(obs)
        rollout.actions[t, rows] = torch.as_tensor(actions).to(rollout.actions)
        logp, _, value = self._call(self.policy.evaluate, self._prepare(obs), rollout.actions[t, rows])
        rollout.logp[t, rows], rollout.values[t, rows] = logp, value
        return self.distribution.clip(actions)

    def _as_stored(self, actions: np.ndarray) -> Tensor:
        """What `act` gave, in the dtype that a rollout keeps and that `evaluate` sees in training."""
        kind = torch.float32 if self.distribution.kind == "normal" else torch.int64
        return torch.as_tensor(actions, device=self.device).to(kind)

    def _policy_actions(self, obs: dict[str, Tensor]) -> np.ndarray:
        return np.asarray(self.policy.act(self._arrays(obs)))

    def _arrays(self, obs: dict[str, Tensor]) -> Any:
        """Stored observations as `policy.act` takes them: an array, or a dict of arrays."""
        arrays = {key: x.cpu().numpy() for key, x in obs.items()}
        return arrays["obs"] if list(arrays) == ["obs"] else arrays

    @torch.no_grad()
    def value(self, obs: Mapping[str, np.ndarray | Tensor], state: Tensor | None = None) -> Tensor:
        """Values [n] of observations that are not in the rollout."""
        tensors = as_tensors(obs, self.device)
        prepared = self._prepare(tensors)
        if hasattr(self.policy, "value"):
            return cast("Tensor", self._call(self.policy.value, prepared))
        if self.fused:
            return cast("Tensor", self._call(self.policy.heads, prepared)[1])
        actions = self._as_stored(self._policy_actions(tensors))
        return cast("Tensor", self._call(self.policy.evaluate, prepared, actions)[2])

    def bootstrap(self, rollout: Rollout) -> None:
        """Write the value of the observation after the last step to `rollout.values[T]`."""
        last = rollout.values.shape[0] - 1
        rollout.values[last] = self.value({key: x[last] for key, x in rollout.obs.items()})

    def _prepare(self, obs: dict[str, Tensor]) -> Any:
        return self.policy.prepare(obs) if hasattr(self.policy, "prepare") else obs

    # --- updating ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, schedule: Schedule, iteration: int) -> dict[str, float]:
        """All epochs over one rollout whose advantages and returns are set; the metrics, means over its rows."""
        self.optimizer.check()
        batch = self._flatten(rollout)
        rows = rollout.valid_rows()
        limit = kl_limit(self.config)
        stopped = None if limit is None else torch.zeros(1, dtype=torch.bool, device=self.device)
        log = _MetricsLog()
        for minibatch in self._minibatches(batch, self._units(rows, rollout), iteration, stopped):
            stats = self._backward(minibatch, schedule)
            if stopped is not None and limit is not None:
                stopped |= stats[APPROX_KL] > limit
            log.add(stats, self._step(schedule.learning_rate, stopped), stopped)
        metrics = log.read()
        if self.device.type == "cuda":
            ops.check_errors(self.device)  # what the kernels found there, now that the metrics have been waited for
        wanted = self.dist_shapes is not None and len(rows) > 0
        metrics["kl"] = self._exact_kl(batch, rows, schedule) if wanted else math.nan
        return metrics

    def _minibatches(self, batch: Any, units: Tensor, iteration: int, stopped: Tensor | None) -> Iterator[Any]:
        """Each epoch's permutation of the units in near-equal parts; ends where `stopped` is seen to be set.

        On a GPU that is seen once an epoch only: until then the steps are skipped on the device, without waiting.
        """
        count = len(units)
        bounds = [count * part // self.config.num_minibatches for part in range(self.config.num_minibatches + 1)]
        for epoch in range(self.config.update_epochs if count else 0):
            order = ops.permutation(count, seed=self._order_seed, iteration=iteration, epoch=epoch, device=self.device)
            shuffled = batch.select(units.index_select(0, order))
            for start, stop in pairwise(bounds):
                if stop > start and len((minibatch := shuffled.slice(start, stop)).data.logp):
                    yield minibatch
                if stopped is not None and self.device.type == "cpu" and stopped:
                    return
            if stopped is not None and stopped:
                return

    def _flatten(self, rollout: Rollout) -> Any:
        """The whole rollout as [T * N] rows, observations prepared: statistics stand still during an update."""
        length, dtype = rollout.actions.shape[0], self.flat.data.dtype
        with torch.no_grad():
            obs = self._prepare({key: x[:length].flatten(0, 1) for key, x in rollout.obs.items()})
        columns = (rollout.logp, rollout.advantages, rollout.returns, rollout.values[:length])
        old = {key: x.flatten(0, 1).to(dtype) for key, x in (rollout.dist_params or {}).items()}
        actions = rollout.actions.flatten(0, 1)
        actions = actions.to(dtype) if actions.dtype.is_floating_point else actions
        return Batch(Minibatch(obs, actions, *(x.reshape(-1).to(dtype) for x in columns)), old)

    def _backward(self, minibatch: Any, schedule: Schedule) -> Tensor:
        """Gradients of the minibatch's loss into the flat buffer; its statistics, still on the device."""
        self.flat.grad.zero_()
        auxiliary_loss = getattr(self.policy, "auxiliary_loss", None)
        if self.fused:
            stats, tensors, grads = self._fused_loss(minibatch, schedule, *self._heads(minibatch))
        else:
            loss, stats = self._surrogate_loss(minibatch, schedule)
            tensors, grads = [loss], [None]
        if auxiliary_loss is not None:
            auxiliary = self._call(auxiliary_loss, self._shown(minibatch))
            if auxiliary.requires_grad:
                tensors, grads = [*tensors, auxiliary], [*grads, None]
        torch.autograd.backward(tensors, grads)
        return stats

    # What a policy with a state does otherwise (`SequenceEngine`).

    def _units(self, rows: Tensor, rollout: Rollout) -> Tensor:
        """What minibatches are made of: the valid rows of [T * N], or environments."""
        return rows

    def _heads(self, minibatch: Any) -> tuple[dict[str, Tensor], Tensor]:
        params, value = self._call(self.policy.heads, minibatch.data.obs)
        return params, value

    def _evaluate(self, minibatch: Any) -> tuple[Tensor, Tensor, Tensor]:
        logp, entropy, value = self._call(self.policy.evaluate, minibatch.data.obs, minibatch.data.actions)
        return logp, entropy, value

    def _shown(self, minibatch: Any) -> Minibatch:
        """What `auxiliary_loss` sees."""
        return minibatch.data

    def _chunks(self, batch: Any, rows: Tensor) -> Iterator[Any]:
        """The valid rows in order, as many at a time as one forward pass may have."""
        return (batch.select(index) for index in rows.split(KL_CHUNK))

    def _fused_loss(
        self, minibatch: Any, schedule: Schedule, params: dict[str, Tensor], value: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        data, family = minibatch.data, self.distribution
        actions = data.actions if family.kind == "categorical" else data.actions.flatten(1)
        old: dict[str, Any] = {f"old_{key}": x for key, x in minibatch.old.items()}
        if "old_log_std" in old and params["log_std"].dim() == 1:
            old["old_log_std"] = old["old_log_std"][0]  # one for all rows while the policy was fixed
        _, metrics, grads = ops.ppo_loss_grad(
            **family.kernel_arguments(params),
            **old,
            **self._loss_arguments(data, schedule),
            actions=actions,
            values=value.detach(),
            weights=minibatch.weights,
        )
        pairs = [(x, getattr(grads, key)) for key, x in params.items() if x.requires_grad]
        if value.requires_grad:
            pairs.append((value, grads.values))
        return metrics.stats, [x for x, _ in pairs], [grad for _, grad in pairs]

    def _surrogate_loss(self, minibatch: Any, schedule: Schedule) -> tuple[Tensor, Tensor]:
        data = minibatch.data
        logp, entropy, value = self._evaluate(minibatch)
        loss, metrics = ops.surrogate_loss(
            logp=logp, entropy=entropy, values=value, **self._loss_arguments(data, schedule)
        )
        return loss, metrics.stats

    def _loss_arguments(self, data: Minibatch, schedule: Schedule) -> dict[str, Any]:
        return {
            "old_logp": data.logp,
            "advantages": data.advantages,
            "old_values": data.values if self.config.clip_vloss else None,
            "returns": data.returns,
            **loss_settings(self.config, schedule),
        }

    def _step(self, learning_rate: float | Tensor, skip: Tensor | None) -> Tensor:
        """Clip and apply the gradient in one call; the norm that it had."""
        norm = ops.adam(
            self.flat.data,
            self.flat.grad,
            self.optimizer.exp_avg,
            self.optimizer.exp_avg_sq,
            self.step,
            learning_rate=learning_rate,
            eps=self.config.adam_eps,
            max_grad_norm=self.config.max_grad_norm,
            skip=skip,
        )
        self.flat.written()
        return norm

    @torch.no_grad()
    def _exact_kl(self, batch: Any, rows: Tensor, schedule: Schedule) -> float:
        """Mean KL(old || new) over the valid rows with the parameters as they are now."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for chunk in self._chunks(batch, rows):
            stats, _, _ = self._fused_loss(chunk, schedule, *self._heads(chunk))
            total += stats[STATS.index("kl")] * len(chunk.data.logp)
        return float(total) / len(rows)

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The optimiser: `step` [1] and the moments as `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, of any engine."""
        self.optimizer.load_state_dict(state)


class _MetricsLog:
    """Each minibatch's statistics, on the device until they are read, once."""

    def __init__(self) -> None:
        self._stats: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._skipped: list[Tensor] = []

    def add(self, stats: Tensor, grad_norm: Tensor, skipped: Tensor | None) -> None:
        """Note one minibatch; `skipped` says on the device whether its step was left out."""
        self._stats.append(stats.detach())
        self._norms.append(grad_norm)
        if skipped is not None:
            self._skipped.append(skipped.clone())

    def read(self) -> dict[str, float]:
        """Means over the rows of the minibatches that were applied."""
        if not self._stats:
            nothing = torch.zeros(0)
            return mean_metrics(nothing, nothing, nothing)
        stats, norms = torch.stack(self._stats).double(), torch.stack(self._norms).double()
        applied = ~torch.cat(self._skipped) if self._skipped else torch.ones_like(norms, dtype=torch.bool)
        return mean_metrics(stats, norms, applied)
