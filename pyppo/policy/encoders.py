"""From observations to the vector that hidden layers start from: which network for which space."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gymnasium import spaces
from torch import Tensor, nn

from pyppo.features import has_symbols, is_image, num_features
from pyppo.masks import MASK
from pyppo.policy.networks import ImageNetwork, channels_first, smallest_side

__all__ = ["FEATURES", "NETWORKS", "Encoder", "choose_network", "image_key"]

NETWORKS = ("auto", "mlp", "nature_cnn", "small_cnn", "combined")
FEATURES = "features"
"""Entry of the prepared observations with everything that is no image."""


def image_key(name: str) -> str:
    """Entry of the prepared observations with the images of one leaf."""
    return f"image:{name}"


def choose_network(network: str, obs_space: spaces.Dict) -> str:
    """What "auto" means for these observations; any other name, if they fit it.

    "auto" is "mlp" without an image, "nature_cnn" or "small_cnn" where an image is all there is, else "combined".

    Raises:
        ValueError: there is no such network, or it takes other observations.
    """
    leaves = {name: space for name, space in obs_space.items() if name != MASK}
    images = [name for name, space in leaves.items() if is_image(space) and _network_of(space) is not None]
    if network not in NETWORKS:
        raise ValueError(f"network is {network!r}; it must be one of {', '.join(NETWORKS)}")
    if network == "auto":
        if not images:
            return "mlp"
        only = _network_of(leaves[images[0]])
        return only if len(leaves) == 1 and only is not None else "combined"
    if network == "combined" and not images:
        raise ValueError(f"network is 'combined'; it must be 'mlp' or 'auto', since {_listed(leaves)} has no image")
    if network in ("nature_cnn", "small_cnn"):
        only_space = next(iter(leaves.values()))
        if len(leaves) > 1 or not isinstance(only_space, spaces.Box) or len(only_space.shape) not in (2, 3):
            raise ValueError(f"network is {network!r}; it must be 'auto', since {_listed(leaves)} is not one image")
        if min(channels_first(only_space.shape)[1:]) < smallest_side(network):
            least = smallest_side(network)
            raise ValueError(f"network is {network!r}; it takes images of at least {least} x {least}, not {only_space}")
    return network


def _network_of(space: spaces.Space) -> str | None:
    """The convolutions that fit an image; None: it is too small for any."""
    assert space.shape is not None
    side = min(channels_first(space.shape)[1:])
    return next((kind for kind in ("nature_cnn", "small_cnn") if side >= smallest_side(kind)), None)


def _listed(leaves: Mapping[str, spaces.Space]) -> str:
    return ", ".join(f"{name}: {space}" for name, space in leaves.items())


class Encoder(nn.Module):
    """A network for each image, what they give joined with the features of everything else.

    Args:
        network: "nature_cnn" or "small_cnn", for the one image there is; "combined": whichever fits each image.
        leaves: the observation entries.
        image_scale: what uint8 images are divided by.
        generator: of the weights.
        symbols: how many symbols the images of integers have, which are then one-hot; None: they are numbers.

    Attributes:
        images: names of the entries that are images.
        width: length of the joined vector.
    """

    def __init__(
        self,
        network: str,
        leaves: Mapping[str, spaces.Space],
        image_scale: float,
        generator: torch.Generator,
        symbols: int | None = None,
    ) -> None:
        super().__init__()
        kinds = _kinds(network, leaves)
        self.images = tuple(kinds)
        networks = []
        for name, kind in kinds.items():
            count = symbols if has_symbols(leaves[name]) else None
            networks.append(ImageNetwork(kind, leaves[name].shape or (), image_scale, generator, count))
        self.networks = nn.ModuleList(networks)
        self.num_features = sum(num_features(space) for name, space in leaves.items() if name not in kinds)
        self.width = self.num_features + sum(network.width for network in networks)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """[B, width] of prepared observations: entries `image:<name>` [B, *shape], and `features` [B, F] if any."""
        parts = [net(obs[image_key(name)]) for name, net in zip(self.images, self.networks, strict=True)]
        if self.num_features:
            parts.append(obs[FEATURES])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _kinds(network: str, leaves: Mapping[str, spaces.Space]) -> dict[str, str]:
    """The kind of network for each entry that is an image, by name."""
    if network != "combined":
        return {next(iter(leaves)): network}
    fitting = {name: _network_of(space) for name, space in leaves.items() if is_image(space)}
    return {name: kind for name, kind in fitting.items() if kind is not None}
