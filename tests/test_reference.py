"""The reference itself: the same signatures as `ops`, and torch.distributions' numbers."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from cases import generator, integers, normal, random_mask
from torch import distributions

from pyppo import ops, reference


@pytest.mark.parametrize("name", ["gae", "ppo_loss", "surrogate_loss", "adam", "gather_minibatch", "normalize"])
def test_signatures(name: str) -> None:
    """Names, kinds and defaults; `ops` may annotate more than the reference."""

    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(getattr(ops, name)) == parameters(getattr(reference, name))


def both(family: str, seed: int) -> tuple[Any, Any]:
    """The reference's distribution and torch's, from the same parameters."""
    g = generator(seed)
    logits, log_std = 2.0 * normal(g, 50, 7), 0.5 * normal(g, 50, 7)
    if family == "normal":
        torchs = distributions.Normal(logits, log_std.exp())
        return reference.Normal(logits, log_std), distributions.Independent(torchs, 1)
    if family == "bernoulli":
        return reference.Bernoulli(logits), distributions.Independent(distributions.Bernoulli(logits=logits), 1)
    return reference.Categorical(logits), distributions.Categorical(logits=logits)


@pytest.mark.parametrize("family", ["categorical", "bernoulli", "normal"])
def test_distributions(family: str) -> None:
    ours, torchs = both(family, 1)
    new, new_torchs = both(family, 2)
    actions = torchs.sample()
    torch.testing.assert_close(ours.log_prob(actions), torchs.log_prob(actions))
    torch.testing.assert_close(ours.entropy(), torchs.entropy())
    torch.testing.assert_close(ours.kl(new), distributions.kl_divergence(torchs, new_torchs))


def test_multi_categorical_is_a_sum() -> None:
    g = generator(3)
    nvec, logits, old_logits = (3, 1, 4), normal(g, 20, 8), normal(g, 20, 8)
    actions = torch.stack([integers(g, n, 20) for n in nvec], -1)
    parts = [distributions.Categorical(logits=part) for part in logits.split(list(nvec), -1)]
    olds = [distributions.Categorical(logits=part) for part in old_logits.split(list(nvec), -1)]
    ours, old = reference.MultiCategorical(logits, nvec), reference.MultiCategorical(old_logits, nvec)
    torch.testing.assert_close(
        ours.log_prob(actions), sum(p.log_prob(a) for p, a in zip(parts, actions.T, strict=True))
    )
    torch.testing.assert_close(ours.entropy(), sum(p.entropy() for p in parts))
    kl = sum(distributions.kl_divergence(o, p) for o, p in zip(olds, parts, strict=True))
    torch.testing.assert_close(old.kl(ours), kl)


def test_masks_leave_a_smaller_distribution() -> None:
    g = generator(4)
    logits, mask = normal(g, 30, 6), random_mask(g, "categorical", None, 30, 6)
    for row in range(30):
        kept = distributions.Categorical(logits=logits[row, mask[row]])
        masked = reference.Categorical(logits[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(masked.log_probs()[0, mask[row]], kept.logits)
        torch.testing.assert_close(masked.entropy()[0], kept.entropy())
        assert (masked.log_probs()[0, ~mask[row]] == -math.inf).all()


@pytest.mark.parametrize("kind", [reference.Categorical, reference.Bernoulli])
def test_gradients_pass_by_what_is_forbidden(kind: Any) -> None:
    """Forbidden logits, be they -inf or NaN, get the gradient 0 and spoil no other."""
    g = generator(5)
    mask = random_mask(g, "categorical", None, 10, 4)
    logits = normal(g, 10, 4).masked_fill(~mask, math.nan).requires_grad_()
    d = kind(logits, mask)
    (d.entropy() + kind(normal(g, 10, 4), mask).kl(d)).sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[~mask].any()
