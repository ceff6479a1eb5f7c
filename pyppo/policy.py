"""Policies: the protocol the trainer asks for, action distributions, and the built-in MLP actor-critic."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from pyppo import ops
from pyppo.actions import Distribution, log_prob_entropy, stream_seed
from pyppo.features import (
    ACTION_MASK,
    Prepared,
    check_leaves,
    features_of,
    num_features,
    space_from_dict,
    space_to_dict,
)
from pyppo.normalize import ObservationNormalizer

Observation = np.ndarray | Mapping[str, np.ndarray]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


class Minibatch(NamedTuple):
    """What `Policy.auxiliary_loss` gets: B valid rows of the rollout, on the engine's device."""

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


@runtime_checkable
class Policy(Protocol):
    """What the trainer needs of an `nn.Module`. Two methods; everything else is optional.

    Observations reach `evaluate` as a dict of tensors [B, *shape], one entry named "obs" where the environment's
    observation is a plain array, in the storage dtype (float32 for floats, uint8 and integers as they are).

    Optional, found by name:

    * `heads(obs) -> (params, value [B])`: the distribution's parameters, `{"logits": [B, A]}` or `{"mean": [B, D],
      "log_std": [D] or [B, D]}`, plus `"action_mask"` [B, A] if some actions are forbidden. A policy that has it trains
      through the fused loss, and `evaluate` is not called.
    * `prepare(obs) -> Any`: the part of the forward pass without parameters (normalisation, flattening). The engine
      calls it once for a whole rollout and passes rows of the result (a tensor or a dict of tensors) to `heads` or
      `evaluate`.
    * `value(obs) -> [B]`: the critic alone; without it the engine calls `act` and `evaluate` to get a value.
    * `auxiliary_loss(minibatch: Minibatch) -> 0-d tensor`: added to the loss of each minibatch.
    """

    def evaluate(self, obs: Any, actions: Tensor, state: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of `actions`, entropy of the policy and value, each [B], differentiable."""
        ...

    def act(self, obs: Observation, deterministic: bool = False) -> np.ndarray:
        """Actions for observations in the storage dtype, NumPy in and out, a single one or a batch.

        Training and `pyppo.evaluate` hand it plain arrays (dicts where the environment's observations are) in the
        same dtypes as `evaluate`: float32 even where the environment gives float64.

        A policy without `heads` is sampled through this method: what it returns is stored and handed to `evaluate`;
        a copy clipped to the action space's finite bounds is sent to the environment.
        """
        ...


class MLPPolicy(nn.Module):
    """Actor and critic MLPs; a diagonal Gaussian's log-std is one parameter, independent of the state.

    Orthogonal weights of gain sqrt(2), 0.01 for the policy head and 1 for the value head, zero biases (Huang et al.
    2022, "The 37 Implementation Details of Proximal Policy Optimization", core detail 2). The two networks share
    nothing (core detail 13), or with `shared_trunk` all hidden layers; each then has a linear head of its own. The
    observation statistics belong to the policy, so `act` takes raw observations; it never changes them.

    Attributes:
        obs_space, obs_shapes: every observation entry, an action mask included; leaves: those that are features.
        num_features: F, the width of the networks' input.
        masked: whether there is an observation "action_mask".
        trunk: the shared hidden layers, each with its activation; empty where nothing is shared.
        actor, critic: from the trunk's output (the features, where it is empty) to the distribution's parameters
            [B, A] and the value [B, 1].
        log_std: parameter [D] (normal only).

    Args:
        obs_space: the observation entries, one named "obs" for plain arrays: Box, Discrete, MultiDiscrete or
            MultiBinary. The one named "action_mask", MultiBinary(A), forbids actions and is no feature.
        distribution: the action distribution.
        hidden_sizes: widths of the hidden layers, of either network or of the trunk.
        shared_trunk: whether actor and critic share the hidden layers.
        activation: "tanh", "relu", "elu" or "silu".
        log_std_init: initial log standard deviation (normal only).
        norm_obs: normalise float observations by running statistics that belong to the policy.
        clip_obs: limit of normalised observations; None: no limit.
        seed: of the initial weights and of `act`'s own noise; the global generator is left alone.
        metadata: JSON-able facts saved with the policy (`env_id`, `env_options`).
    """

    def __init__(
        self,
        obs_space: spaces.Dict,
        distribution: Distribution,
        *,
        hidden_sizes: Sequence[int] = (64, 64),
        shared_trunk: bool = False,
        activation: str = "tanh",
        log_std_init: float = 0.0,
        norm_obs: bool = False,
        clip_obs: float | None = 10.0,
        seed: int = 1,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(_ACTIVATIONS)}")
        check_leaves(obs_space, distribution.num_params)
        self.obs_space = obs_space
        self.obs_shapes = {key: tuple(space.shape or ()) for key, space in obs_space.items()}
        self.leaves = {key: space for key, space in obs_space.items() if key != ACTION_MASK}
        self.num_features = sum(num_features(space) for space in self.leaves.values())
        self.masked = ACTION_MASK in obs_space.spaces
        self.distribution = distribution
        self.normalizer = ObservationNormalizer(obs_space, clip_obs) if norm_obs else None
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._settings = {
            "hidden_sizes": list(hidden_sizes), "shared_trunk": shared_trunk, "activation": activation,
            "norm_obs": norm_obs, "clip_obs": clip_obs,
        }  # fmt: skip
        self._noise = (stream_seed(seed, "policy.act"), 0)
        generator = torch.Generator().manual_seed(seed)
        shared, own = (hidden_sizes, ()) if shared_trunk else ((), hidden_sizes)
        self.trunk = nn.Sequential(*_hidden(self.num_features, shared, activation, generator))
        width = shared[-1] if shared else self.num_features
        self.actor = _mlp(width, own, distribution.num_params, activation, 0.01, generator)
        self.critic = _mlp(width, own, 1, activation, 1.0, generator)
        if distribution.kind == "normal":
            self.log_std = nn.Parameter(torch.full((distribution.num_params,), float(log_std_init)))

    def prepare(self, obs: Mapping[str, Tensor]) -> Tensor | Prepared:
        """What the networks see: features [B, F] of every leaf in order, `{"features": [B, F], "action_mask": [B, A]}`
        where there is a mask. Float leaves are normalised, uint8 scaled to [0, 1], integers of a finite set one-hot.
        """
        dtype = next(self.critic.parameters()).dtype
        seen = self.normalizer(dict(obs)) if self.normalizer is not None else obs
        parts = [features_of(space, seen[key], dtype) for key, space in self.leaves.items()]
        features = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return Prepared(features=features, action_mask=obs[ACTION_MASK].bool()) if self.masked else features

    def heads(self, obs: Mapping[str, Tensor] | Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Distribution parameters, the action mask among them where there is one, and value [B].

        Args:
            obs: raw observations, or what `prepare` made of them.
        """
        features, params = self._split(obs)
        hidden = self.trunk(features)
        output, value = self.actor(hidden), self.critic(hidden).squeeze(1)
        if self.distribution.kind == "normal":
            return {"mean": output, "log_std": self.log_std, **params}, value
        return {"logits": output, **params}, value

    def value(self, obs: Mapping[str, Tensor] | Tensor) -> Tensor:
        """The critic's value [B]; observations as in `heads`."""
        return self.critic(self.trunk(self._split(obs)[0])).squeeze(1)

    def _split(self, obs: Mapping[str, Tensor] | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features [B, F], and the mask among the distribution's parameters where there is one."""
        prepared = obs if isinstance(obs, (Tensor, Prepared)) else self.prepare(obs)
        if isinstance(prepared, Tensor):
            return prepared, {}
        return prepared["features"], {ACTION_MASK: prepared[ACTION_MASK]}

    def evaluate(
        self, obs: Mapping[str, Tensor] | Tensor, actions: Tensor, state: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of `actions` [B, *shape], entropy and value, each [B], differentiable."""
        params, value = self.heads(obs)
        logp, entropy = log_prob_entropy(self.distribution, params, actions)
        return logp, entropy, value

    @torch.no_grad()
    def act(self, obs: Observation, deterministic: bool = False) -> np.ndarray:
        """Environment-ready actions for one observation or a batch; `deterministic=True` takes the mode.

        Raises:
            ValueError: an observation has neither the trained shape nor that shape with a batch dimension.
        """
        arrays, batched = self._batch(obs)
        device = next(self.critic.parameters()).device
        params, _ = self.heads({key: torch.as_tensor(a, device=device) for key, a in arrays.items()})
        seed, step = self._noise
        sample = ops.sample(
            **self.distribution.kernel_arguments(params),
            seed=seed,
            step=step,
            deterministic=deterministic,
        )
        if not deterministic:
            self._noise = (seed, step + 1)
        actions = self.distribution.to_env(sample.actions.cpu().numpy())
        return actions if batched else actions[0]

    def reseed(self, seed: int, step: int = 0) -> tuple[int, int]:
        """Restart the noise of `act`; returns the (seed, step) that it had."""
        before, self._noise = self._noise, (seed, step)
        return before

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` needs to build the module again (the weights are saved apart). JSON-able."""
        return {
            "obs_space": {key: space_to_dict(space) for key, space in self.obs_space.items()},
            "distribution": self.distribution.to_dict(), "metadata": self.metadata, **self._settings,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> MLPPolicy:
        """The module that `to_dict` described, with fresh weights."""
        settings = {name: spec[name] for name in ("hidden_sizes", "activation", "norm_obs", "clip_obs", "metadata")}
        settings["shared_trunk"] = spec.get("shared_trunk", False)  # recipes did not always have it
        return cls(_obs_space(spec), Distribution.from_dict(spec["distribution"]), **settings)

    def _batch(self, obs: Observation) -> tuple[dict[str, np.ndarray], bool]:
        given = dict(obs) if isinstance(obs, Mapping) else {"obs": np.asarray(obs)}
        if missing := [key for key in self.obs_shapes if key not in given]:
            raise ValueError(f"obs has {sorted(given)}; the policy was trained on {sorted(self.obs_shapes)}: {missing}")
        arrays = {key: np.asarray(given[key]) for key in self.obs_shapes}
        batched = all(arrays[key].ndim == len(shape) + 1 for key, shape in self.obs_shapes.items())
        for key, shape in self.obs_shapes.items():
            if arrays[key].shape[batched:] != shape:
                wanted = f"({', '.join(map(str, ('batch', *shape)))})"
                raise ValueError(f"obs[{key!r}] has shape {arrays[key].shape}; it must be {shape} or {wanted}")
        return (arrays if batched else {key: a[None] for key, a in arrays.items()}), batched


def _obs_space(spec: Mapping[str, Any]) -> spaces.Dict:
    """The observation space of a recipe; early ones have shapes and dtypes of Boxes."""
    leaves = spec.get("obs_space") or {
        key: {"type": "Box", "shape": shape, "dtype": spec["obs_dtypes"][key]}
        for key, shape in spec["obs_shapes"].items()
    }
    # Ordered, since a Dict of a plain dict sorts its keys, and the features are in the order of the keys.
    return spaces.Dict(OrderedDict((key, space_from_dict(leaf)) for key, leaf in leaves.items()))


def _mlp(
    inputs: int, hidden: Sequence[int], outputs: int, activation: str, gain: float, generator: torch.Generator
) -> nn.Sequential:
    layers = _hidden(inputs, hidden, activation, generator)
    return nn.Sequential(*layers, _linear([inputs, *hidden][-1], outputs, gain, generator))


def _hidden(inputs: int, hidden: Sequence[int], activation: str, generator: torch.Generator) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise([inputs, *hidden]):
        layers += [_linear(fan_in, fan_out, math.sqrt(2.0), generator), _ACTIVATIONS[activation]()]
    return layers


def _linear(fan_in: int, fan_out: int, gain: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class FlatParameters:
    """A module's trainable parameters as views into one flat buffer, their gradients into a second one.

    One norm, one optimiser step and one all-reduce then serve the whole module. Offsets are padded to 64 bytes, dense
    strides are kept, tied parameters are stored once under their first name. Frozen parameters (`requires_grad=False`)
    and buffers are left where they are. `.to()`, `copy.deepcopy` and `load_state_dict(assign=True)` give a module new
    storage: `check` notices and binds again.

    Raises:
        TypeError: a trainable parameter is not floating, or of another dtype than the first.
        ValueError: a trainable parameter is on another device than the first, or there is none.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.rebind()

    def rebind(self) -> None:
        """Move the parameters' present values into a new flat buffer and bind them to it."""
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        first = _check_uniform(named)
        padding = max(1, 64 // first.element_size())
        self.names = tuple(named)
        self.parameters = tuple(named.values())
        self.shapes = tuple(p.shape for p in self.parameters)
        self.offsets: tuple[int, ...] = ()
        total = 0
        for p in self.parameters:
            self.offsets += (total,)
            total += -(-p.numel() // padding) * padding
        self.data = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.data)
        self.strides = tuple(torch.empty_like(p).stride() for p in self.parameters)  # contiguous where p is not dense
        with torch.no_grad():
            grads = self._views(self.grad).values()
            for p, view, grad in zip(self.parameters, self._views(self.data).values(), grads, strict=True):
                view.copy_(p)
                p.data = view
                p.grad = grad
        self._layout = self._observed()

    def check(self, *buffers: Tensor) -> tuple[Tensor, ...]:
        """Bind again if a parameter or gradient moved or the trainable set changed.

        Args:
            buffers: further flat buffers in this layout (an optimiser's moments).

        Returns:
            The buffers, in the layout that holds now: themselves if nothing changed, else carried over by name, with
            zeros for parameters that are new.
        """
        if self._observed() == self._layout:
            return buffers
        kept = [self.split(buffer) for buffer in buffers]
        self.rebind()
        carried = tuple(torch.zeros_like(self.data) for _ in buffers)
        for tensors, buffer in zip(kept, carried, strict=True):
            self.join(tensors, buffer)
        return carried

    def written(self) -> None:
        """Tell autograd that native code wrote the parameters, so that a stale saved tensor is an error, not a lie."""
        torch.autograd.graph.increment_version(self.parameters)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat buffer of this layout as one contiguous copy for each parameter, by name."""
        return {name: view.clone(memory_format=torch.contiguous_format) for name, view in self._views(flat).items()}

    def join(self, tensors: Mapping[str, Tensor], flat: Tensor) -> None:
        """The inverse of `split`: fill `flat` from tensors by name; where a name is absent `flat` keeps its values.

        Raises:
            ValueError: a tensor's shape is not its parameter's.
        """
        for name, view in self._views(flat).items():
            if name in tensors:
                if tensors[name].shape != view.shape:
                    raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; it must be {tuple(view.shape)}")
                view.copy_(tensors[name])

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        layout = zip(self.names, self.shapes, self.strides, self.offsets, strict=True)
        return {name: flat.as_strided(shape, stride, offset) for name, shape, stride, offset in layout}

    def _observed(self) -> list[Any]:
        return [
            (name, p.data_ptr(), p.shape, p.stride(), p.dtype, p.grad.data_ptr() if p.grad is not None else None)
            for name, p in self.module.named_parameters()
            if p.requires_grad
        ]


def _check_uniform(named: Mapping[str, nn.Parameter]) -> nn.Parameter:
    if not named:
        raise ValueError("the policy has no trainable parameter; at least one must have requires_grad=True")
    first_name, first = next(iter(named.items()))
    for name, p in named.items():
        if not p.dtype.is_floating_point or p.dtype != first.dtype:
            raise TypeError(f"parameter {name} is {p.dtype}; it must be of {first_name}'s dtype, {first.dtype}")
        if p.device != first.device:
            raise ValueError(f"parameter {name} is on {p.device}; it must be on {first_name}'s device, {first.device}")
    return first
