"""Layers with the initial weights that PPO wants, and what they are put together to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyppo.features import one_hot_symbols

__all__ = ["ACTIVATIONS", "ImageNetwork", "generator_untouched", "hidden_layers", "linear", "mlp"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}
_GAIN = math.sqrt(2.0)  # of hidden layers (Huang et al. 2022, core detail 2)


def mlp(
    inputs: int, hidden: Sequence[int], outputs: int, activation: str, gain: float, generator: torch.Generator
) -> nn.Sequential:
    """Hidden layers and a linear one, of weights of `gain`."""
    layers = hidden_layers(inputs, hidden, activation, generator)
    return nn.Sequential(*layers, linear([inputs, *hidden][-1], outputs, gain, generator))


def hidden_layers(inputs: int, hidden: Sequence[int], activation: str, generator: torch.Generator) -> list[nn.Module]:
    """Linear layers of these widths, each with its activation."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise([inputs, *hidden]):
        layers += [linear(fan_in, fan_out, _GAIN, generator), ACTIVATIONS[activation]()]
    return layers


def linear(fan_in: int, fan_out: int, gain: float, generator: torch.Generator) -> nn.Linear:
    """A layer of orthogonal weights and zero biases."""
    with generator_untouched():
        layer = nn.Linear(fan_in, fan_out, device="cpu", dtype=torch.float32)
    _initialize(layer, gain, generator)
    return layer


def _convolution(channels: int, filters: int, size: int, stride: int, generator: torch.Generator) -> nn.Conv2d:
    with generator_untouched():
        layer = nn.Conv2d(channels, filters, size, stride=stride, device="cpu", dtype=torch.float32)
    _initialize(layer, _GAIN, generator)
    return layer


def generator_untouched() -> AbstractContextManager[None]:
    """While torch draws its own initial weights, which are not kept. The meta device would draw none, but for it torch
    imports SymPy, which takes 0.8 s. Other threads must not draw from torch's default generator meanwhile."""
    return torch.random.fork_rng(devices=[])


def _initialize(layer: nn.Linear | nn.Conv2d, gain: float, generator: torch.Generator) -> None:
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


# --- images ---------------------------------------------------------------------------------------------------------

_LAYERS = {  # filters, size and stride of each convolution, and the width of the layer after them
    "nature_cnn": (((32, 8, 4), (64, 4, 2), (64, 3, 1)), 512),
    "small_cnn": (((16, 3, 1), (32, 3, 1)), 128),
}


class ImageNetwork(nn.Module):
    """Convolutions and one linear layer, each with ReLU, from images of one shape to a vector.

    "nature_cnn" is that of Mnih et al. 2015 ("Human-level control through deep reinforcement learning", Methods): 32
    filters of 8 x 8 at stride 4, 64 of 4 x 4 at stride 2, 64 of 3 x 3, 512 units. "small_cnn" has 16 and 32 filters of
    3 x 3 and 128 units, for grids of ten cells or so.

    Args:
        kind: "nature_cnn" or "small_cnn".
        shape: [C, H, W] or [H, W, C], the channels where the shorter of the two ends is (the last, if they are equal);
            or [H, W], of one channel.
        scale: what uint8 is divided by.
        generator: of the weights, orthogonal of gain sqrt(2).
        symbols: how many different integers the images have, from 0; each channel is so many one-hot planes then. None:
            they are numbers.

    Attributes:
        width: length of the vector.

    Raises:
        ValueError: the images are too small for the convolutions, or of another rank.
    """

    def __init__(
        self,
        kind: str,
        shape: Sequence[int],
        scale: float,
        generator: torch.Generator,
        symbols: int | None = None,
    ) -> None:
        super().__init__()
        if len(shape) not in (2, 3):
            raise ValueError(f"an image of {kind} has shape {tuple(shape)}; it must be [C, H, W], [H, W, C] or [H, W]")
        self.shape, self.scale, self.symbols = tuple(shape), scale, symbols
        channels, height, width = channels_first(shape)
        channels *= symbols or 1
        convolutions, self.width = _LAYERS[kind]
        layers: list[nn.Module] = []
        for filters, size, stride in convolutions:
            if min(height, width) < size:
                least = smallest_side(kind)
                raise ValueError(f"an image of {kind} has shape {self.shape}; its sides must be at least {least}")
            layers += [_convolution(channels, filters, size, stride, generator), nn.ReLU()]
            channels, height, width = filters, (height - size) // stride + 1, (width - size) // stride + 1
        inputs = channels * height * width
        self.layers = nn.Sequential(*layers, nn.Flatten(), linear(inputs, self.width, _GAIN, generator), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """[B, width] of images [B, *shape] of any dtype."""
        dtype = next(self.parameters()).dtype
        x = images
        if len(self.shape) == 2:
            x = x.unsqueeze(1)
        elif not _is_channels_first(self.shape):
            x = x.permute(0, 3, 1, 2)
        if self.symbols is not None:
            x = one_hot_symbols(x, self.symbols, dtype).movedim(-1, 2).flatten(1, 2)
        else:
            x = x.to(dtype) / self.scale if x.dtype == torch.uint8 else x.to(dtype)
        return self.layers(x)


def _is_channels_first(shape: Sequence[int]) -> bool:
    return shape[0] < shape[2]


def channels_first(shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width of images of this shape, [H, W] or of rank 3."""
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    first = _is_channels_first(shape)
    return (shape[0], shape[1], shape[2]) if first else (shape[2], shape[0], shape[1])


def smallest_side(kind: str) -> int:
    """Height and width that the convolutions need at least."""
    side = 1
    for _, size, stride in reversed(_LAYERS[kind][0]):
        side = (side - 1) * stride + size
    return side
