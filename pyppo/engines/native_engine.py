"""The engine for small networks: an MLP policy on the CPU, acting and the whole update in C++."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyppo import ops
from pyppo.actions import Distribution, stream_seed
from pyppo.config import Config
from pyppo.engines import Schedule, as_tensors
from pyppo.engines.mlp import Mlp, UnfitError, read_mlp
from pyppo.engines.objective import STATS, dist_shapes, kl_limit, loss_settings, mean_metrics
from pyppo.engines.optimizer import OptimizerState
from pyppo.masks import MASK
from pyppo.normalize import ObservationNormalizer
from pyppo.policy import MLPPolicy
from pyppo.rollout import Rollout

_COLUMNS = ("actions", "logp", "values", "advantages", "returns", "steps")  # of a rollout, read and written in place
_ACTION_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "float32", "float64")


def why_not(policy: nn.Module, device: torch.device, distribution: Distribution, precision: str = "fp32") -> str | None:
    """Why `NativeEngine` cannot run a policy there, in one sentence; None: it can."""
    if device.type != "cpu":
        return f"the device is {device}, not the CPU"
    if precision != "fp32":
        return f"precision is {precision!r}, and it computes in the parameters' own"
    if distribution.dtype not in _ACTION_DTYPES:
        return f"the environment's actions are {distribution.dtype}, not one of {', '.join(_ACTION_DTYPES)}"
    try:
        read_mlp(policy, distribution)
    except UnfitError as reason:
        return str(reason)
    return None


class NativeEngine:
    """Runs an `MLPPolicy` in C++: forward, sampling, loss, backward, clipping and Adam, without torch in between.

    The policy stays an ordinary module: its parameters are views of the flat buffer that C++ reads and writes. Its
    networks are read from its modules, so an `actor` of your own serves too if it is made of the same parts.

    Results do not depend, to the bit, on the number of threads, on which rows act together, or on the grouping. While
    parameters stand, a row's log-probability is the same to the bit in `act` and in `update`.

    Args:
        policy: the policy, on the CPU.
        config: the run's settings.
        device: the CPU.
        distribution: the action space's family.

    Raises:
        ValueError: the policy cannot run here (see `why_not`).
    """

    name = "native"
    state_shape: tuple[int, ...] | None = None

    def __init__(self, policy: nn.Module, config: Config, device: torch.device, distribution: Distribution) -> None:
        if (reason := why_not(policy, device, distribution, config.precision)) is not None:
            raise ValueError(f"engine is 'native'; it must be 'auto' or 'torch', since {reason}")
        self.policy: Any = policy
        self.config, self.device, self.distribution, self.reason = config, device, distribution, ""
        self.dist_shapes = dist_shapes(config, distribution, has_heads=True)
        self.optimizer = OptimizerState(policy, device)
        self.flat, self.step = self.optimizer.flat, self.optimizer.step
        self._noise_seed = stream_seed(config.seed, "act")
        self._order_seed = stream_seed(config.seed, "minibatches")
        self._rollout: Rollout | None = None
        self._native: Any = None
        self._params: Tensor | None = None
        self._bound_to: tuple[Any, ...] = ()
        self._inputs: _Inputs
        self._act: Callable[[int, int, int], None]
        self._sent: np.ndarray  # [N, *action shape], what C++ writes the environments' actions to

    # --- acting ------------------------------------------------------------------------------------------------------

    def act(self, rollout: Rollout, t: int, rows: slice) -> np.ndarray:
        """Fill row `t` of `rows` with action, log-prob and value; return the environment's actions [n, *shape]."""
        if rollout is not self._rollout or (t == 0 and rows.start == 0):
            self._ready(rollout, look=True)
        if self._inputs.prepared:
            self._inputs.fill((t, rows))
        self._act(t, rows.start, rows.stop - rows.start)
        return self._sent[rows].copy()

    def value(self, obs: Mapping[str, np.ndarray | Tensor], state: Tensor | None = None) -> Tensor:
        """Values [n] of observations that are not in the rollout."""
        tensors = as_tensors(obs, self.device)
        if self._rollout is None:  # nothing to bind to before the first rollout
            with torch.no_grad():
                return self.policy.value(tensors).float()
        self._ready(self._rollout)
        return self._native.value(self._inputs.of(tensors))

    def bootstrap(self, rollout: Rollout) -> None:
        """Write the value of the observation after the last step to `rollout.values[T]`."""
        self._ready(rollout)
        if self._inputs.prepared:
            self._inputs.fill((rollout.num_steps, slice(None)))
        self._native.bootstrap()

    # --- updating ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, schedule: Schedule, iteration: int) -> dict[str, float]:
        """All epochs over one rollout whose advantages and returns are set; the metrics, means over its rows."""
        self._ready(rollout)
        if self._inputs.prepared:
            self._inputs.fill_steps()
        rows = rollout.valid_rows()
        table = self._minibatches(rows, schedule, iteration) if len(rows) else torch.zeros(0, len(STATS) + 3).double()
        stats, grad_norms, applied = table.split((len(STATS) + 1, 1, 1), dim=1)
        metrics = mean_metrics(stats, grad_norms.squeeze(1), applied.squeeze(1) > 0)
        wanted = self.dist_shapes is not None and len(rows) > 0
        metrics["kl"] = self._native.exact_kl(rows) if wanted else math.nan
        return metrics

    def _minibatches(self, rows: Tensor, schedule: Schedule, iteration: int) -> Tensor:
        """Every minibatch's step; float64 [M, 10]: loss statistics, gradient norm, whether the step was taken."""
        self.flat.grad.zero_()  # gaps and parameters that no layer uses have no gradient, whatever was there
        try:
            return self._native.update(
                rows,
                iteration,
                self.config.update_epochs,
                self.config.num_minibatches,
                **loss_settings(self.config, schedule),
                learning_rate=schedule.learning_rate,
                eps=self.config.adam_eps,
                max_grad_norm=self.config.max_grad_norm,
                kl_limit=kl_limit(self.config),
            )
        finally:
            self.flat.written()

    # --- binding -----------------------------------------------------------------------------------------------------

    def _ready(self, rollout: Rollout, look: bool = False) -> None:
        """Bind to this rollout and to the parameters where they are now; `look` at the modules even if none moved.

        Raises:
            ValueError: the policy was changed into what cannot run here.
        """
        self.optimizer.check()
        moved = rollout is not self._rollout or self._params is not self.flat.data
        if moved or look:
            try:
                mlp = read_mlp(self.policy, self.distribution)
            except UnfitError as reason:
                raise ValueError(f"the policy was changed so that engine 'native' cannot run it: {reason}") from reason
            normalizer = self.policy.normalizer
            # Without log_std, which cannot change and leave the flat buffer where it is.
            bound_to = (*mlp[:-1], normalizer, None if normalizer is None else normalizer.clip)
            if moved or bound_to != self._bound_to:
                self._bind(rollout, mlp)
                self._params, self._bound_to = self.flat.data, bound_to
        self._inputs.refresh()

    def _bind(self, rollout: Rollout, mlp: Mlp) -> None:
        family, dist = self.distribution, rollout.dist_params or {}
        self._inputs = _Inputs(self.policy, rollout)
        sent = torch.zeros((rollout.num_envs, *family.shape), dtype=getattr(torch, family.dtype))
        self._native = ops.MlpEngine(
            params=self.flat.data,
            grads=self.flat.grad,
            exp_avg=self.optimizer.exp_avg,
            exp_avg_sq=self.optimizer.exp_avg_sq,
            step=self.step,
            **self._networks(mlp),
            distribution=family.kind,
            nvec=family.nvec if family.kind == "multi_categorical" else None,
            **self._inputs.arguments(),
            **{name: getattr(rollout, name) for name in _COLUMNS},
            old_params=dist.get("mean" if family.kind == "normal" else "logits"),
            old_log_std=dist.get("log_std"),
            env_actions=sent,
            action_start=None if family.start is None else torch.tensor(family.start, dtype=torch.int64),
            action_low=_bounds(family.low),
            action_high=_bounds(family.high),
            rescale=family.action_bounds == "rescale",
            noise_seed=self._noise_seed,
            order_seed=self._order_seed,
        )
        self._act, self._sent, self._rollout = self._native.act, sent.numpy(), rollout

    def _networks(self, mlp: Mlp) -> dict[str, Any]:
        """Where the layers' parameters lie in the flat buffer."""
        offsets = {id(p): offset for p, offset in zip(self.flat.parameters, self.flat.offsets, strict=True)}
        return {
            "layers": [(*x.weight.shape[::-1], offsets[id(x.weight)], offsets[id(x.bias)]) for x in mlp.layers],
            "num_trunk": len(mlp.trunk),
            "num_actor": len(mlp.actor),
            "num_critic": len(mlp.critic),
            "activation": mlp.activation,
            "log_std_offset": None if mlp.log_std is None else offsets[id(mlp.log_std)],
            "log_std_limit": mlp.log_std_limit,
        }

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The optimiser: `step` [1] and the moments as `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, of any engine."""
        self.optimizer.load_state_dict(state)


class _Inputs:
    """What the networks see of a rollout, `obs` float32 [T+1, N, F].

    One entry of floats is read where it lies, and C++ normalises it by `mean` and `scale`, float32 [F]. Whatever else
    there may be, the policy prepares: `fill` writes its features to a buffer. An action mask is always read where it
    lies.
    """

    def __init__(self, policy: MLPPolicy, rollout: Rollout) -> None:
        self._policy, self._rollout = policy, rollout
        self._entry = _only_entry(policy, rollout)
        self.prepared = self._entry is None
        self.mean: Tensor | None = None
        self.scale: Tensor | None = None
        self.clip: float | None = None
        rows, features = (rollout.num_steps + 1, rollout.num_envs), policy.num_features
        if self._entry is None:
            self.obs = torch.zeros(*rows, features, dtype=torch.float32)
            return
        self.obs = rollout.obs[self._entry].view(*rows, features)
        if policy.normalizer is not None:
            self.mean = torch.zeros(features, dtype=torch.float32)
            self.scale = torch.ones(features, dtype=torch.float32)
            self.clip = policy.normalizer.clip

    def arguments(self) -> dict[str, Any]:
        """The native engine's arguments of these names."""
        mask = self._rollout.obs[MASK] if self._policy.masked else None
        return {
            "obs": self.obs, "action_mask": mask, "obs_mean": self.mean, "obs_scale": self.scale, "obs_clip": self.clip,
        }  # fmt: skip

    def refresh(self) -> None:
        """Take the policy's observation statistics as they are now."""
        normalizer = self._policy.normalizer
        if self._entry is None or normalizer is None:
            return
        for kept, now in zip((self.mean, self.scale), normalizer.mean_and_scale(self._entry), strict=True):
            assert kept is not None
            kept.copy_(now.flatten())

    def fill(self, index: tuple[int, slice]) -> None:
        """The features of these rows of one step."""
        self.obs[index] = self._features({key: x[index] for key, x in self._rollout.obs.items()})

    def fill_steps(self) -> None:
        """The features of all steps, the one after the last left out."""
        steps = self.obs[:-1]
        features = self._features({key: x[:-1].flatten(0, 1) for key, x in self._rollout.obs.items()})
        steps.copy_(features.view_as(steps))

    def of(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Other observations as `obs` holds the rollout's: float32 [n, F]."""
        if self._entry is not None:
            return obs[self._entry].reshape(-1, self.obs.shape[2]).contiguous()
        return self._features(obs).float().contiguous()

    @torch.no_grad()
    def _features(self, obs: Mapping[str, Tensor]) -> Tensor:
        prepared = self._policy.prepare(obs)
        return prepared if isinstance(prepared, Tensor) else prepared["features"]


def _only_entry(policy: MLPPolicy, rollout: Rollout) -> str | None:
    """The observation entry that is all the policy sees, if it is of floats and what it does with it is known."""
    names = list(policy.leaves)
    if len(names) > 1 or rollout.obs[names[0]].dtype != torch.float32:
        return None
    return names[0] if policy.normalizer is None or type(policy.normalizer) is ObservationNormalizer else None


def _bounds(bound: np.ndarray | None) -> Tensor | None:
    return None if bound is None else torch.from_numpy(bound.astype(np.float64).ravel())
