"""What the kernels of ``ops`` return besides tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

METRICS = ("loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "kl", "denominator")


class LossMetrics:
    """What a loss measured, as 0-d tensors read from one tensor ``stats`` [8] without a host synchronisation.

    ``metrics.approx_kl``, ``metrics["approx_kl"]`` and ``dict(metrics)`` give tensors, ``to_dict()`` floats. All but
    ``denominator`` are weighted sums over the denominator.
    """

    __slots__ = ("stats",)

    def __init__(self, stats: Tensor) -> None:
        self.stats = stats

    def __getitem__(self, name: str) -> Tensor:
        return self.stats[METRICS.index(name)] if name in METRICS else _unknown_metric(name)

    def keys(self) -> Iterator[str]:
        """The metrics' names."""
        return iter(METRICS)

    def to_dict(self) -> dict[str, float]:
        """All metrics as floats; one copy from the device."""
        return dict(zip(METRICS, self.stats.tolist(), strict=True))

    @property
    def loss(self) -> Tensor:
        """The loss itself."""
        return self.stats[0]

    @property
    def policy_loss(self) -> Tensor:
        """The policy objective, negated; with the KL penalty, if any."""
        return self.stats[1]

    @property
    def value_loss(self) -> Tensor:
        """Half the squared error of the values, clipped where asked for."""
        return self.stats[2]

    @property
    def entropy(self) -> Tensor:
        """The mean entropy."""
        return self.stats[3]

    @property
    def approx_kl(self) -> Tensor:
        """(ratio - 1) - log ratio, the estimator "k3" of KL(old || new)."""
        return self.stats[4]

    @property
    def clip_fraction(self) -> Tensor:
        """The share of ratios outside [1 - clip_coef, 1 + clip_coef_high]."""
        return self.stats[5]

    @property
    def kl(self) -> Tensor:
        """The exact KL(old || new) where the old distribution was given, else 0."""
        return self.stats[6]

    @property
    def denominator(self) -> Tensor:
        """What sums were divided by."""
        return self.stats[7]

    def __repr__(self) -> str:
        return f"LossMetrics({', '.join(f'{k}={v:.6g}' for k, v in self.to_dict().items())})"


def _unknown_metric(name: str) -> Tensor:
    raise KeyError(f"{name!r} is no metric; the metrics are {', '.join(METRICS)}")


class LossGrads(NamedTuple):
    """The loss's gradients in the network's outputs, each shaped as its input; None for an input not given."""

    logits: Tensor | None
    mean: Tensor | None
    log_std: Tensor | None
    values: Tensor | None


class Sample(NamedTuple):
    """Drawn actions with their log-probs [B] and the distributions' entropies [B]."""

    actions: Tensor
    logp: Tensor
    entropy: Tensor
