"""A module's trainable parameters as one flat buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

__all__ = ["FlatParameters"]


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
    for name, p in named.items():
        if isinstance(p, UninitializedParameter):
            raise ValueError(
                f"parameter {name} has no shape yet (a lazy module); call the policy once on an observation first"
            )
    first_name, first = next(iter(named.items()))
    for name, p in named.items():
        if not p.dtype.is_floating_point or p.dtype != first.dtype:
            raise TypeError(f"parameter {name} is {p.dtype}; it must be of {first_name}'s dtype, {first.dtype}")
        if p.device != first.device:
            raise ValueError(f"parameter {name} is on {p.device}; it must be on {first_name}'s device, {first.device}")
    return first
