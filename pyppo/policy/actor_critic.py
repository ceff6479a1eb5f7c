"""The built-in actor-critics: from observations through an encoder and hidden layers to distribution and value."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from pyppo import ops
from pyppo.actions import Distribution, log_prob_entropy, stream_seed
from pyppo.features import (
    IMAGE_SCALE,
    Prepared,
    check_leaves,
    features_of,
    has_symbols,
    is_image,
    num_features,
    space_from_dict,
    space_to_dict,
)
from pyppo.masks import MASK
from pyppo.normalize import ObservationNormalizer
from pyppo.policy.encoders import FEATURES, Encoder, choose_network, image_key
from pyppo.policy.networks import ACTIVATIONS, hidden_layers, mlp
from pyppo.policy.protocol import Observation

__all__ = ["LOG_STD_LIMIT", "ActorCriticPolicy", "MLPPolicy"]

LOG_STD_LIMIT = 5.0
"""A state-dependent log-std is L * tanh(x / L) of the network's output x.

One parameter for all states moves with every sample; a network's output at a state that is seldom seen may be anything,
and its exponential then overflows, or makes the action certain and its log-probability infinite. Within this limit the
deviation is between 0.007 and 148, nearly x itself where |x| < 2, and the gradient never dies as it would in a clamp.
"""

Inputs = Mapping[str, Tensor] | Tensor
"""Raw observations (a dict), or what `prepare` made of them."""


class ActorCriticPolicy(nn.Module):
    """Actor and critic on any observations; a diagonal Gaussian's log-std is one parameter, or an output.

    Orthogonal weights of gain sqrt(2), 0.01 for the policy head and 1 for the value head, zero biases (Huang et al.
    2022, "The 37 Implementation Details of Proximal Policy Optimization", core detail 2). The observation statistics
    belong to the policy, so `act` takes raw observations; it never changes them.

    The networks: "mlp", hidden layers on flat features; actor and critic share nothing (core detail 13), or with
    `shared_trunk` all hidden layers, and each then has a linear head of its own. "nature_cnn", "small_cnn":
    convolutions that both share, then linear heads. "combined": a network for each image, whose outputs are joined with
    the features of everything else and go through hidden layers as in "mlp".

    Attributes:
        network: which it is; never "auto".
        obs_space, obs_shapes: every observation entry, an action mask included; leaves: those that are features.
        masked: whether there is an observation "action_mask".
        encoder: the networks of images and what joins them; None for "mlp".
        num_features: F, the width of what the encoder gives, or of the flat features.
        trunk: the shared hidden layers, each with its activation; empty where nothing is shared.
        actor, critic: from the trunk's output (the features, where it is empty) to the distribution's parameters
            [B, A] and the value [B, 1].
        log_std: parameter [D] (normal only, where it does not depend on the state).

    Args:
        obs_space: the observation entries, one named "obs" for plain arrays: Box, Discrete, MultiDiscrete or
            MultiBinary. The one named "action_mask", MultiBinary(A), forbids actions and is no feature.
        distribution: the action distribution.
        network: "auto" (see `pyppo.policy.encoders.choose_network`), "mlp", "nature_cnn", "small_cnn" or "combined".
        hidden_sizes: widths of the hidden layers, of either network or of the trunk ("mlp" and "combined").
        shared_trunk: whether actor and critic share the hidden layers.
        activation: "tanh", "relu", "elu" or "silu", of the hidden layers.
        log_std_init: initial log standard deviation (normal only).
        state_dependent_std: the actor puts out the log standard deviations too, kept within `LOG_STD_LIMIT`.
        image_scale: what uint8 images are divided by; other uint8 observations are divided by 255.
        image_symbols: how many symbols, 0 and up, images of integers have, which are then one-hot; None: they are
            numbers.
        norm_obs: normalise float observations by running statistics that belong to the policy.
        clip_obs: limit of normalised observations; None: no limit.
        seed: of the initial weights and of `act`'s own noise; the global generator is left alone.
        metadata: JSON-able facts saved with the policy (`env_id`, `env_options`, and `own_envs`: whether it was trained
            in environments of the user's own).

    Raises:
        TypeError, ValueError: an observation entry, the network or a setting is not one of these.
    """

    def __init__(
        self,
        obs_space: spaces.Dict,
        distribution: Distribution,
        *,
        network: str = "auto",
        hidden_sizes: Sequence[int] = (64, 64),
        shared_trunk: bool = False,
        activation: str = "tanh",
        log_std_init: float = 0.0,
        state_dependent_std: bool = False,
        image_scale: float = IMAGE_SCALE,
        image_symbols: int | None = None,
        norm_obs: bool = False,
        clip_obs: float | None = 10.0,
        seed: int = 1,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        check_leaves(obs_space, distribution.num_params)
        self.obs_space = obs_space
        self.obs_shapes = {key: tuple(space.shape or ()) for key, space in obs_space.items()}
        self.leaves = {key: space for key, space in obs_space.items() if key != MASK}
        self.masked = MASK in obs_space.spaces
        self.network = choose_network(network, obs_space)
        self.image_scale, self.image_symbols = float(image_scale), image_symbols
        if image_symbols is not None and not any(map(has_symbols, self.leaves.values())):
            raise ValueError(f"image_symbols is {image_symbols}; it must be None, since there is no image of integers")
        self.distribution = distribution
        self.state_dependent_std = state_dependent_std and distribution.kind == "normal"
        self.log_std_init = float(log_std_init)
        self.normalizer = ObservationNormalizer(obs_space, clip_obs) if norm_obs else None
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._settings: dict[str, Any] = {
            "network": self.network, "hidden_sizes": list(hidden_sizes), "shared_trunk": shared_trunk,
            "activation": activation, "state_dependent_std": state_dependent_std, "image_scale": self.image_scale,
            "image_symbols": image_symbols, "norm_obs": norm_obs, "clip_obs": clip_obs,
        }  # fmt: skip
        self._noise = (stream_seed(seed, "policy.act"), 0)
        generator = torch.Generator().manual_seed(seed)
        self.encoder: Encoder | None = None
        if self.network != "mlp":
            self.encoder = Encoder(self.network, self.leaves, self.image_scale, generator, image_symbols)
            self.num_features = self.encoder.width
        else:
            self.num_features = sum(num_features(space, image_symbols) for space in self.leaves.values())
        hidden = tuple(hidden_sizes) if self.network in ("mlp", "combined") else ()
        shared, own = (hidden, ()) if shared_trunk else ((), hidden)
        self.trunk = nn.Sequential(*hidden_layers(self.num_features, shared, activation, generator))
        self._make_heads(shared[-1] if shared else self.num_features, own, activation, generator)

    def _make_heads(self, width: int, hidden: Sequence[int], activation: str, generator: torch.Generator) -> None:
        family = self.distribution
        outputs = family.num_params * (2 if self.state_dependent_std else 1)
        self.actor = mlp(width, hidden, outputs, activation, 0.01, generator)
        self.critic = mlp(width, hidden, 1, activation, 1.0, generator)
        if self.state_dependent_std:
            self._start_at_log_std()
        elif family.kind == "normal":
            self.log_std = nn.Parameter(torch.full((family.num_params,), self.log_std_init, dtype=torch.float32))

    def _start_at_log_std(self) -> None:
        if not abs(self.log_std_init) < LOG_STD_LIMIT:
            limit = f"between {-LOG_STD_LIMIT} and {LOG_STD_LIMIT} where state_dependent_std is True"
            raise ValueError(f"log_std_init is {self.log_std_init}; it must be {limit}")
        output = LOG_STD_LIMIT * math.atanh(self.log_std_init / LOG_STD_LIMIT)
        head = self.actor[-1]
        assert isinstance(head, nn.Linear)
        nn.init.constant_(head.bias[self.distribution.num_params :], output)

    # --- forward -----------------------------------------------------------------------------------------------------

    def prepare(self, obs: Mapping[str, Tensor]) -> Tensor | Prepared:
        """The part of the forward pass without parameters.

        Float leaves are normalised, uint8 ones scaled, integers of a finite set one-hot, all flattened and joined in
        the order of the space. Images that a convolution takes stay as they are.

        Returns:
            Features [B, F]; with a mask or images `{"features": [B, F], "image:<name>": [B, *shape], "action_mask":
            bool [B, A]}`, of which what there is none of is left out.
        """
        dtype = next(self.critic.parameters()).dtype
        seen = self.normalizer(dict(obs)) if self.normalizer is not None else obs
        images = self.encoder.images if self.encoder is not None else ()
        parts = [
            features_of(
                space, seen[key], dtype, self.image_scale if is_image(space) else IMAGE_SCALE, self.image_symbols
            )
            for key, space in self.leaves.items()
            if key not in images
        ]
        prepared = Prepared({image_key(name): seen[name] for name in images})
        if parts:
            prepared[FEATURES] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.masked:
            prepared[MASK] = obs[MASK].bool()
        return prepared[FEATURES] if list(prepared) == [FEATURES] else prepared

    def heads(self, obs: Inputs) -> tuple[dict[str, Tensor], Tensor]:
        """Distribution parameters, the action mask among them where there is one, and value [B].

        Args:
            obs: raw observations, or what `prepare` made of them.
        """
        hidden, mask = self._hidden(obs)
        return self._params(self.actor(hidden), mask), self.critic(hidden).squeeze(1)

    def value(self, obs: Inputs) -> Tensor:
        """The critic's value [B]; observations as in `heads`."""
        return self.critic(self._hidden(obs)[0]).squeeze(1)

    def evaluate(self, obs: Inputs, actions: Tensor, state: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of `actions` [B, *shape], entropy and value, each [B], differentiable."""
        params, value = self.heads(obs)
        logp, entropy = log_prob_entropy(self.distribution, params, actions)
        return logp, entropy, value

    def _hidden(self, obs: Inputs) -> tuple[Tensor, Tensor | None]:
        """What the trunk makes of the observations [B, *], and the mask."""
        prepared = obs if isinstance(obs, (Tensor, Prepared)) else self.prepare(obs)
        if isinstance(prepared, Tensor):
            return self.trunk(prepared), None
        features = prepared[FEATURES] if self.encoder is None else self.encoder(prepared)
        return self.trunk(features), prepared.get(MASK)

    def _params(self, output: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The distribution's parameters by name, from the actor's output."""
        if self.distribution.kind != "normal":
            return {"logits": output} if mask is None else {"logits": output, MASK: mask}
        if not self.state_dependent_std:
            return {"mean": output, "log_std": self.log_std}
        mean, log_std = output.chunk(2, dim=-1)
        return {"mean": mean, "log_std": LOG_STD_LIMIT * torch.tanh(log_std / LOG_STD_LIMIT)}

    # --- acting ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Observation, deterministic: bool = False) -> np.ndarray:
        """Environment-ready actions for one observation or a batch; `deterministic=True` takes the mode.

        Raises:
            ValueError: an observation has neither the trained shape nor that shape with a batch dimension, or is not
                finite.
        """
        tensors, batched = self._batch(obs)
        try:
            actions = self._sample(self.heads(tensors)[0], deterministic)
        except ValueError as error:
            for name, x in tensors.items():
                if x.is_floating_point() and not bool(x.isfinite().all()):
                    wrong = float(x[~x.isfinite()][0])
                    raise ValueError(f"obs[{name!r}] has {wrong}; every number must be finite") from error
            raise
        return actions if batched else actions[0]

    def _sample(self, params: Mapping[str, Tensor], deterministic: bool) -> np.ndarray:
        seed, step = self._noise
        arguments = self.distribution.kernel_arguments(params)
        sample = ops.sample(**arguments, seed=seed, step=step, deterministic=deterministic)
        if not deterministic:
            self._noise = (seed, step + 1)
        return self.distribution.to_env(sample.actions.cpu().numpy())

    def act_in(self, distribution: Distribution) -> None:
        """Act in environments with other bounds, another first action or another `action_bounds` from now on.

        Raises:
            ValueError: it is of another kind, or of another shape.
        """
        ours, theirs = ((x.kind, x.shape, x.nvec) for x in (self.distribution, distribution))
        if ours != theirs:
            both = (self.distribution, distribution)
            given, wanted = (f"{x.kind} of shape {x.shape} with {x.num_params} parameters" for x in both)
            raise ValueError(f"policy has actions that are {given}; they must be {wanted}, as the environments'")
        self.distribution = distribution

    def reseed(self, seed: int, step: int = 0) -> tuple[int, int]:
        """Restart the noise of `act`; returns the (seed, step) that it had."""
        before, self._noise = self._noise, (seed, step)
        return before

    def _batch(self, obs: Observation) -> tuple[dict[str, Tensor], bool]:
        """Observations as tensors with a batch dimension, and whether they had one."""
        given = dict(obs) if isinstance(obs, Mapping) else {"obs": np.asarray(obs)}
        if missing := [key for key in self.obs_shapes if key not in given]:
            raise ValueError(f"obs has {sorted(given)}; it must have {missing} too, which the policy was trained on")
        arrays = {key: np.asarray(given[key]) for key in self.obs_shapes}
        batched = all(arrays[key].ndim == len(shape) + 1 for key, shape in self.obs_shapes.items())
        for key, shape in self.obs_shapes.items():
            if arrays[key].shape[batched:] != shape:
                wanted = f"({', '.join(map(str, ('batch', *shape)))})"
                raise ValueError(f"obs[{key!r}] has shape {arrays[key].shape}; it must be {shape} or {wanted}")
        device = next(self.critic.parameters()).device
        rows = arrays if batched else {key: a[None] for key, a in arrays.items()}
        return {key: torch.as_tensor(a, device=device) for key, a in rows.items()}, batched

    # --- recipe ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` needs to build the module again (the weights are saved apart). JSON-able."""
        return {
            "obs_space": {key: space_to_dict(space) for key, space in self.obs_space.items()},
            "distribution": self.distribution.to_dict(), "metadata": self.metadata, **self._settings,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> Self:
        """The module that `to_dict` described, with fresh weights."""
        names = [name for name in cls._SETTINGS if name in spec]  # early recipes do not have all of them
        settings = {name: spec[name] for name in names}
        return cls(_obs_space(spec), Distribution.from_dict(spec["distribution"]), **settings)

    _SETTINGS: tuple[str, ...] = (
        "network", "hidden_sizes", "shared_trunk", "activation", "state_dependent_std", "image_scale",
        "image_symbols", "norm_obs", "clip_obs", "metadata",
    )  # fmt: skip


class MLPPolicy(ActorCriticPolicy):
    """The actor-critic whose network is "mlp": hidden layers on flat features. `NativeEngine` can run it.

    The arguments are those of `ActorCriticPolicy`, without `network`.
    """

    def __init__(self, obs_space: spaces.Dict, distribution: Distribution, **settings: Any) -> None:
        network = settings.pop("network", "mlp")
        if network != "mlp":
            raise ValueError(f"network is {network!r}; it must be 'mlp', or the policy an ActorCriticPolicy")
        super().__init__(obs_space, distribution, network="mlp", **settings)


def _obs_space(spec: Mapping[str, Any]) -> spaces.Dict:
    """The observation space of a recipe; early ones have shapes and dtypes of Boxes."""
    leaves = spec.get("obs_space") or {
        key: {"type": "Box", "shape": shape, "dtype": spec["obs_dtypes"][key]}
        for key, shape in spec["obs_shapes"].items()
    }
    # Ordered, since a Dict of a plain dict sorts its keys, and the features are in the order of the keys.
    return spaces.Dict(OrderedDict((key, space_from_dict(leaf)) for key, leaf in leaves.items()))
