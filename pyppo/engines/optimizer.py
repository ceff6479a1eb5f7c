"""Adam's state over a module's flat parameters, which every engine keeps and saves alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyppo.policy import FlatParameters

_MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerState:
    """The parameters of a module as one flat buffer, Adam's moments beside it, and the steps applied so far.

    Args:
        policy: the module, already on `device`.
        device: where the module has to stay.

    Attributes:
        flat: the parameters and their gradients.
        exp_avg, exp_avg_sq: [P], as `flat.data`; replaced by `check` where the parameters moved.
        step: int64 [1], the same tensor always.
    """

    def __init__(self, policy: nn.Module, device: torch.device) -> None:
        self.device = device
        self.flat = FlatParameters(policy)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.flat.data), torch.zeros_like(self.flat.data)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)

    def check(self) -> None:
        """Bind again if the parameters moved (see `FlatParameters.check`).

        Raises:
            ValueError: they moved to another device.
        """
        self.exp_avg, self.exp_avg_sq = self.flat.check(self.exp_avg, self.exp_avg_sq)
        if self.flat.data.device != self.device:
            raise ValueError(f"the policy was moved to {self.flat.data.device}; this run's device is {self.device}")

    def state_dict(self) -> dict[str, Tensor]:
        """Copies: `step` [1] and the moments as `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`."""
        self.check()
        moments = {kind: self.flat.split(getattr(self, kind)) for kind in _MOMENTS}
        named = {f"{kind}.{name}": x for kind, tensors in moments.items() for name, x in tensors.items()}
        return {"step": self.step.clone(), **named}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, of any engine.

        Raises:
            ValueError: a parameter's moments are missing or of another shape.
        """
        self.check()
        wanted = {"step", *(f"{kind}.{name}" for kind in _MOMENTS for name in self.flat.names)}
        if missing := sorted(wanted - set(state)):
            raise ValueError(f"the optimiser state lacks {', '.join(missing)}; it must name every trainable parameter")
        self.step.copy_(state["step"])
        for kind in _MOMENTS:
            self.flat.join({name: state[f"{kind}.{name}"] for name in self.flat.names}, getattr(self, kind))
