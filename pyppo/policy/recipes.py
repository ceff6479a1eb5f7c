"""Built-in policies by name, as checkpoints name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyppo.policy.actor_critic import ActorCriticPolicy, MLPPolicy
from pyppo.policy.recurrent import RecurrentPolicy

__all__ = ["BUILT_IN", "describe_policy", "policy_from_recipe"]

BUILT_IN: dict[str, type[ActorCriticPolicy]] = {
    policy.__name__: policy for policy in (MLPPolicy, ActorCriticPolicy, RecurrentPolicy)
}


def policy_from_recipe(recipe: Mapping[str, Any]) -> ActorCriticPolicy | None:
    """The built-in policy of a recipe, its `to_dict` and its "class", with fresh weights; None: it is of another."""
    kind = BUILT_IN.get(recipe["class"])
    return None if kind is None else kind.from_dict(recipe)


def describe_policy(policy: object) -> str:
    """A policy in a few words, for a log."""
    if not isinstance(policy, ActorCriticPolicy):
        return type(policy).__name__
    name = policy.network if type(policy) in BUILT_IN.values() else f"{type(policy).__name__}, {policy.network}"
    return f"{name} and a {policy.memory.kind} of {policy.memory.size}" if isinstance(policy, RecurrentPolicy) else name
