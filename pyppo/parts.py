"""What a trainer is put together from: the built-in policy, torch's number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gymnasium import spaces

from pyppo.actions import Distribution, stream_seed
from pyppo.config import Config
from pyppo.policy import ActorCriticPolicy, MLPPolicy, RecurrentPolicy, choose_network


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with `count` torch threads, then with as many as before: its results depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_policy(config: Config, obs_space: spaces.Dict, distribution: Distribution) -> ActorCriticPolicy:
    """The built-in policy for these spaces, as the settings have it.

    Raises:
        ValueError: the network does not take these observations, or a setting does not fit it.
    """
    network = choose_network(config.network, obs_space)
    kind: type[ActorCriticPolicy] = ActorCriticPolicy
    more: dict[str, Any] = {}
    if config.recurrent != "none":
        kind, more = RecurrentPolicy, {"recurrent": config.recurrent, "recurrent_size": config.recurrent_size}
    elif network == "mlp":
        kind = MLPPolicy
    with torch_threads(config.torch_threads):  # the orthogonal weights come from a QR decomposition
        return kind(
            obs_space,
            distribution,
            network=network,
            hidden_sizes=config.hidden_sizes,
            shared_trunk=config.shared_trunk,
            activation=config.activation,
            log_std_init=config.log_std_init,
            state_dependent_std=config.state_dependent_std,
            image_scale=config.image_scale,
            image_symbols=config.image_symbols,
            norm_obs=config.norm_obs,
            clip_obs=config.clip_obs,
            seed=stream_seed(config.seed, "policy"),
            metadata={"env_id": config.env_id, "env_options": config.env_options},
            **more,
        )
