"""What a trainer is put together from: its arguments' kinds, the policy, torch's number of threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gymnasium import spaces
from torch import nn

from pyppo.actions import Distribution, stream_seed
from pyppo.config import Config
from pyppo.policy import ActorCriticPolicy, MLPPolicy, RecurrentPolicy, choose_network


@contextmanager
def torch_settings(threads: int) -> Iterator[None]:
    """Run with so many torch threads, on which its results depend, and with gradients, which a caller's `no_grad` or
    `inference_mode` would take from training in silence; then with what there was before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(before)


def check_kinds(config: Any, policy: Any, callbacks: Any) -> None:
    """That a trainer's arguments are what they must be: TypeError."""
    if not isinstance(config, Config):
        must = 'a pyppo.Config, as pyppo.Config.for_env("CartPole-v1") makes one'
        raise TypeError(f"config is {_described(config)}; it must be {must}")
    if policy is not None and not isinstance(policy, nn.Module):
        raise TypeError(f"policy is {_described(policy)}; it must be a torch.nn.Module, an object of such a class")
    if not isinstance(callbacks, Iterable) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks is {_described(callbacks)}; it must be a list of functions of an iteration's row")


def _described(x: Any) -> str:
    return f"the class {x.__name__}" if isinstance(x, type) else f"{x!r} ({type(x).__name__})"


def settle_policy(
    config: Config, obs_space: spaces.Dict, distribution: Distribution, policy: nn.Module | None, *, own_envs: bool
) -> nn.Module:
    """The policy to train: the one given, or the built-in one that the settings describe.

    A given policy of the built-in classes may come from other environments: it acts in these from now on, and is saved
    as theirs.

    Raises:
        ValueError: its actions are of another kind; or as `make_policy`.
    """
    if policy is None:
        policy = make_policy(config, obs_space, distribution)
    if isinstance(policy, ActorCriticPolicy):
        policy.act_in(distribution)
        trained_in = {"env_id": config.env_id, "env_options": config.env_options, "own_envs": own_envs}
        policy.metadata = {**policy.metadata, **trained_in}
    return policy


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
    with torch_settings(config.torch_threads):  # the orthogonal weights come from a QR decomposition
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
            **more,
        )
