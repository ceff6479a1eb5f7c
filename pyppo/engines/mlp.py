"""An MLPPolicy's networks as `NativeEngine` needs them, read from the modules themselves, or why it cannot."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyppo.actions import Distribution
from pyppo.policy import ActorCriticPolicy
from pyppo.policy.actor_critic import LOG_STD_LIMIT

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.ELU: "elu", nn.SiLU: "silu"}
# A built-in policy's forward pass, which must be its own.
_METHODS = ("heads", "prepare", "value", "evaluate", "_hidden", "_params")
_CHANGES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "forward")
_DTYPES = (torch.float32, torch.float64)


class UnfitError(Exception):
    """Says in one sentence why a policy cannot run natively."""


class Mlp(NamedTuple):
    """A policy's linear layers, in order; every one but the last of actor and of critic is activated."""

    trunk: tuple[nn.Linear, ...]
    actor: tuple[nn.Linear, ...]
    critic: tuple[nn.Linear, ...]
    activation: str
    """"tanh", "relu", "elu" or "silu"; one for all layers."""
    log_std_limit: float | None
    """L, where the actor puts out means and then x, and log-std is L tanh(x / L) of each state."""
    log_std: nn.Parameter | None
    """[D], the deviation that all states share (normal only)."""

    @property
    def layers(self) -> tuple[nn.Linear, ...]:
        """All of them: trunk, actor, critic."""
        return self.trunk + self.actor + self.critic


def read_mlp(policy: nn.Module, distribution: Distribution) -> Mlp:
    """The networks of a policy.

    Raises:
        UnfitError: it is no MLPPolicy that computes what its layers say, or a layer or parameter is of another kind.
    """
    if getattr(policy, "state_shape", None) is not None:
        raise UnfitError("the policy is recurrent")
    if isinstance(policy, ActorCriticPolicy) and policy.encoder is not None:
        raise UnfitError(f"the policy's network is {policy.network}, not an mlp")
    if not isinstance(policy, ActorCriticPolicy):
        raise UnfitError(f"the policy is a {type(policy).__name__}, not an MLPPolicy")
    for name in _METHODS:
        if getattr(type(policy), name) is not getattr(ActorCriticPolicy, name) or name in vars(policy):
            raise UnfitError(f"the policy, a {type(policy).__name__}, has a {name}() of its own")
    if getattr(policy, "auxiliary_loss", None) is not None:
        raise UnfitError("the policy has an auxiliary_loss()")
    if (policy.distribution.kind, policy.distribution.nvec) != (distribution.kind, distribution.nvec):
        raise UnfitError(f"the policy's distribution is {_named(policy.distribution)}, not {_named(distribution)}")
    if policy.masked and distribution.kind == "normal":
        raise UnfitError("the observations have an action mask, and a normal distribution has no actions to forbid")
    activations: dict[str, str] = {}
    trunk, actor, critic = (_read_part(policy, name, activations) for name in ("trunk", "actor", "critic"))
    if len(set(activations.values())) > 1:
        first, other = _two_that_differ(activations)
        raise UnfitError(f"{first} is {activations[first]} and {other} is {activations[other]}, not the same")
    outputs = distribution.num_params * (2 if policy.state_dependent_std else 1)
    _check_widths(policy, trunk, actor, outputs, "actor")
    _check_widths(policy, trunk, critic, 1, "critic")
    log_std = policy.log_std if distribution.kind == "normal" and not policy.state_dependent_std else None
    limit = LOG_STD_LIMIT if policy.state_dependent_std else None
    mlp = Mlp(trunk, actor, critic, next(iter(activations.values()), "tanh"), limit, log_std)
    _check_parameters(mlp, policy, distribution)
    return mlp


def _named(distribution: Distribution) -> str:
    nvec = "" if distribution.nvec is None else f" of {', '.join(map(str, distribution.nvec))}"
    return f"{distribution.kind}{nvec}"


def _read_part(policy: ActorCriticPolicy, name: str, activations: dict[str, str]) -> tuple[nn.Linear, ...]:
    """The linear layers of `policy.<name>`; its activations are noted by where they stand."""
    part = getattr(policy, name)
    _check_plain(part, f"policy.{name}")
    modules = list(part) if type(part) is nn.Sequential else [part]
    layers: list[nn.Linear] = []
    for i, module in enumerate(modules):
        place = f"policy.{name}[{i}]" if type(part) is nn.Sequential else f"policy.{name}"
        _check_plain(module, place)
        if i % 2 == 0:
            if type(module) is not nn.Linear:
                raise UnfitError(f"{place} is a {type(module).__name__}, not a Linear")
            layers.append(module)
        else:
            activations[place] = _read_activation(module, place)
    if name == "trunk" and len(modules) % 2 == 1:
        raise UnfitError("policy.trunk ends with a Linear, not with an activation")
    if name != "trunk" and len(modules) % 2 == 0:
        raise UnfitError(f"policy.{name} {'ends with an activation' if modules else 'is empty'}, not with a Linear")
    return tuple(layers)


def _read_activation(module: nn.Module, place: str) -> str:
    name = _ACTIVATIONS.get(type(module))
    if name is None:
        raise UnfitError(f"{place} is a {type(module).__name__}, not a Tanh, ReLU, ELU or SiLU")
    if isinstance(module, nn.ELU) and module.alpha != 1.0:
        raise UnfitError(f"{place} is an ELU of alpha {module.alpha}, not 1")
    return name


def _two_that_differ(activations: dict[str, str]) -> tuple[str, str]:
    first = next(iter(activations))
    return first, next(place for place, name in activations.items() if name != activations[first])


def _check_plain(module: nn.Module, place: str) -> None:
    own = vars(module)  # read straight: every rollout and update comes here, and a module's attributes are slow
    if any(map(own.get, _CHANGES)):
        raise UnfitError(f"{place} has {'a forward() of its own' if 'forward' in own else 'hooks'}")


def _check_widths(
    policy: ActorCriticPolicy, trunk: tuple[nn.Linear, ...], head: tuple[nn.Linear, ...], outputs: int, name: str
) -> None:
    width = policy.num_features
    for layer in trunk + head:
        outs, ins = layer.weight.shape
        if ins != width:
            raise UnfitError(f"a layer on the way through policy.{name} takes {ins} inputs and gets {width}")
        if layer.bias is None or layer.bias.shape != (outs,):
            raise UnfitError(f"a layer on the way through policy.{name} has no bias of shape [{outs}]")
        width = outs
    if width != outputs:
        raise UnfitError(f"policy.{name} has {width} outputs, not {outputs}")


def _check_parameters(mlp: Mlp, policy: ActorCriticPolicy, distribution: Distribution) -> None:
    used: list[Tensor] = [p for layer in mlp.layers for p in (layer.weight, layer.bias)]
    if mlp.log_std is not None:
        if not isinstance(mlp.log_std, nn.Parameter) or mlp.log_std.shape != (distribution.num_params,):
            raise UnfitError(f"policy.log_std is not a parameter of shape [{distribution.num_params}]")
        used.append(mlp.log_std)
    if len({id(p) for p in used}) < len(used):
        raise UnfitError("two layers share a parameter")
    for p in used:
        if (wrong := _unfit_parameter(p, used[0].dtype)) is not None:
            name = next((name for name, q in policy.named_parameters() if q is p), "of a layer")
            raise UnfitError(f"parameter {name} {wrong}")


def _unfit_parameter(p: Tensor, dtype: torch.dtype) -> str | None:
    if p.device.type != "cpu":
        return f"is on {p.device}, not on the CPU"
    if p.dtype not in _DTYPES:
        return f"is {p.dtype}, not float32 or float64"
    if p.dtype != dtype:
        return f"is {p.dtype}, not {dtype} as the first"
    if not p.requires_grad:
        return "is frozen"
    if not p.is_contiguous():
        return "is not contiguous"
    if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
        return "has hooks"
    return None
