"""Policies: the protocol the trainer asks for, the built-in actor-critics, and a module's parameters as one buffer."""

from pyppo.policy.actor_critic import ActorCriticPolicy, MLPPolicy
from pyppo.policy.encoders import choose_network
from pyppo.policy.flat_parameters import FlatParameters
from pyppo.policy.memory import Memory, zero_where
from pyppo.policy.protocol import Minibatch, Observation, Policy, StatefulPolicy
from pyppo.policy.recipes import BUILT_IN, describe_policy, policy_from_recipe
from pyppo.policy.recurrent import RecurrentPolicy

__all__ = [
    "BUILT_IN", "ActorCriticPolicy", "FlatParameters", "MLPPolicy", "Memory", "Minibatch", "Observation", "Policy",
    "RecurrentPolicy", "StatefulPolicy", "choose_network", "describe_policy", "policy_from_recipe", "zero_where",
]  # fmt: skip
