"""The losses at the edges: nothing to sum, sure choices, ratios beyond the float range, infinite KL."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    FAMILIES,
    PLAIN,
    assert_same_loss,
    cast,
    family_parameters,
    generator,
    loss_case,
    normal,
    random_actions,
    surrogate_case,
    with_gradients,
)

from pyppo import ops, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e5])
def test_extreme_logits(family: str, scale: float, dtype: torch.dtype) -> None:
    """Sure choices: probabilities of exactly 0 and 1, and everything stays finite."""
    g = generator(15)
    parameters = family_parameters(g, family, 40, 6)
    parameters["logits"] = (scale * parameters["logits"].sign() + parameters["logits"]).to(dtype)
    best = parameters["logits"] > 0
    mask = None if family == "bernoulli" else best | (torch.arange(6) % 2 == 0)
    if family == "multi_categorical":
        parameters["nvec"], mask = (6,), best | (torch.arange(6) % 2 == 0)
    actions = best.long() if family == "bernoulli" else random_actions(g, parameters, mask)
    d = reference.make_distribution(
        family, parameters["logits"].double(), nvec=parameters.get("nvec"), action_mask=mask
    )
    case = {
        **parameters,
        "actions": actions,
        "action_mask": mask,
        "ent_coef": 0.1,
        "old_logp": (d.log_prob(actions) + 0.1).to(dtype),
        "advantages": normal(g, 40).to(dtype),
    }
    actual = with_gradients(ops.ppo_loss, case)
    assert all(math.isfinite(x) for x in actual[1].values())
    expected = with_gradients(reference.ppo_loss, cast(case, torch.float64))
    # A log-prob of -2e5 has no digits left in float32 for the ratio: there finite is all.
    if dtype == torch.float64 or scale < 100:
        tolerance = 1e-4 if dtype == torch.float32 else 1e-11
        assert float(actual[0]) == pytest.approx(float(expected[0]), abs=tolerance)
        for name, gradient in expected[2].items():
            torch.testing.assert_close(actual[2][name].double(), gradient, rtol=0, atol=tolerance)
    assert all(torch.isfinite(gradient).all() for gradient in actual[2].values())


@pytest.mark.parametrize("log_std", [-8.0, 0.0, 6.0])
def test_narrow_and_wide_normals(log_std: float) -> None:
    case = loss_case(16, "normal", 50, 3, PLAIN)
    case["log_std"] = torch.full((3,), log_std, dtype=torch.float64)
    case["actions"] = case["mean"] + math.exp(log_std) * normal(generator(1), 50, 3)
    case["old_logp"] = reference.Normal(case["mean"], case["log_std"]).log_prob(case["actions"]) - 0.1
    expected = with_gradients(reference.ppo_loss, case)
    assert_same_loss(with_gradients(ops.ppo_loss, case), expected, 1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_rows_at_all(family: str) -> None:
    case = loss_case(1, family, 5, 3, {**PLAIN, "norm_adv": True})
    if family == "normal":
        case["log_std"] = torch.zeros(3, dtype=torch.float64)
    empty = {k: v[:0] if isinstance(v, torch.Tensor) and k != "log_std" else v for k, v in case.items()}
    loss, metrics, grads = with_gradients(ops.ppo_loss, empty)
    assert float(loss) == 0.0
    assert not any(metrics.values())
    for name, gradient in grads.items():
        assert gradient.shape == empty[name].shape
        assert not gradient.any()


def test_no_elements_and_a_single_number() -> None:
    case = surrogate_case(2, (3,), PLAIN)
    for shape in ((0,), (0, 4), (4, 0)):
        empty = {k: torch.zeros(shape) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
        loss, metrics, _ = with_gradients(ops.surrogate_loss, empty, ("logp",))
        assert float(loss) == 0.0
        assert not any(metrics.values())
    first = {k: v[0] if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    expected = with_gradients(reference.surrogate_loss, first, ("logp", "values"))
    assert_same_loss(with_gradients(ops.surrogate_loss, first, ("logp", "values")), expected, 1e-13)


# The ratio is e^200, beyond float32: (A, dual clip) -> (policy, d policy / d logp)
OVERFLOWS = [(1.0, None, -1.2, 0.0), (-1.0, 3.0, 3.0, 0.0), (-1.0, None, math.inf, math.inf)]


@pytest.mark.parametrize(("advantage", "dual_clip", "policy", "slope"), OVERFLOWS)
def test_ratio_beyond_the_float_range(advantage: float, dual_clip: float | None, policy: float, slope: float) -> None:
    """Where a bound holds, loss and gradient are the bound's, not 0 times infinity."""
    case: dict[str, Any] = {"logp": torch.tensor([0.0]), "old_logp": torch.tensor([-200.0])}
    case |= {"advantages": torch.tensor([advantage]), "dual_clip": dual_clip}
    loss, metrics, grads = with_gradients(ops.surrogate_loss, case, ("logp",))
    assert float(loss) == pytest.approx(policy)
    assert metrics["clip_fraction"] == 1.0
    assert grads["logp"].item() == slope


def test_ratio_of_zero() -> None:
    case = {"logp": torch.tensor([-500.0]), "old_logp": torch.zeros(1), "advantages": torch.ones(1)}
    loss, metrics, grads = with_gradients(ops.surrogate_loss, case, ("logp",))
    assert float(loss) == 0.0
    assert grads["logp"].item() == 0.0
    assert metrics["approx_kl"] == pytest.approx(499.0)


@pytest.mark.parametrize("objective", ["clip", "unclipped"])
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_infinite_kl_that_only_monitors(family: str, objective: str) -> None:
    """An action that the old policy could take and the new one cannot: KL is infinite, and no part of this loss."""
    case = loss_case(3, family, 20, 6, {**PLAIN, "objective": objective})
    case["old_logits"] = case["logits"].clone()
    case["actions"] = torch.zeros_like(case["actions"])
    case["logits"] = case["logits"].clone()
    case["nvec"] = (6,) if family == "multi_categorical" else None
    if family == "multi_categorical":
        case["actions"] = case["actions"][:, :1]
    case["logits"][:, 5] = -math.inf
    with_kl, without = (with_gradients(ops.ppo_loss, {**case, "old_logits": x}) for x in (case["old_logits"], None))
    assert with_kl[1]["kl"] == math.inf
    assert math.isfinite(float(without[0]))
    assert torch.equal(with_kl[0], without[0])
    assert torch.equal(with_kl[2]["logits"], without[2]["logits"])


def test_infinite_kl_given_to_the_surrogate_loss() -> None:
    case = surrogate_case(4, (9,), PLAIN)
    expected = ops.surrogate_loss(**case)[0]
    assert torch.equal(ops.surrogate_loss(**case, kl=torch.full((9,), math.inf).double())[0], expected)


def test_nan_that_counts_is_not_hidden() -> None:
    """A NaN in a row that counts must reach the loss: silence would train on it."""
    for name in ("logits", "old_logp", "advantages", "values", "returns"):
        case = loss_case(5, "categorical", 30, 4, PLAIN)
        case[name].view(30, -1)[17, 0] = math.nan
        loss, _ = ops.ppo_loss(**case)
        assert loss.isnan(), name


@pytest.mark.parametrize("fused", [True, False])
def test_no_second_derivative(fused: bool) -> None:
    """There is none; asking for it is an error rather than a wrong number, whatever the incoming gradient is."""
    case = loss_case(6, "categorical", 10, 3, PLAIN)
    logits = case["logits"]

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        if fused:
            return ops.ppo_loss(**{**case, "logits": logits})[0]
        logp = logits.log_softmax(1).gather(1, case["actions"].long()[:, None])[:, 0]
        return ops.surrogate_loss(logp=logp, old_logp=case["old_logp"], advantages=case["advantages"])[0]

    said = "first derivative only"
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.functional.hessian(loss_of, logits)
    for scale in (lambda x: 1.0, torch.Tensor.sum):
        leaf = logits.clone().requires_grad_()
        loss = loss_of(leaf) * scale(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (again,) = torch.autograd.grad(loss_of(leaf) * scale(leaf), leaf)
        assert torch.equal(gradient, again)  # as long as nobody goes through it
        with pytest.raises(RuntimeError, match=said):
            (loss + gradient.square().sum()).backward()


def test_sure_bits_keep_the_digits_of_their_gradient() -> None:
    """1 - sigmoid(l) is sigmoid(-l): by subtraction it would have none left from l = 37 on."""
    logits = torch.tensor([[5.0, 20.0, 32.0, 40.0]], dtype=torch.float64)
    case = {"logits": logits, "distribution": "bernoulli", "actions": torch.ones(1, 4, dtype=torch.int64)}
    case |= {"old_logp": reference.Bernoulli(logits).log_prob(torch.ones(1, 4)), "advantages": -torch.ones(1).double()}
    gradient = ops.ppo_loss_grad(**case)[2].logits
    torch.testing.assert_close(gradient, torch.sigmoid(-logits), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("old", "new"), [(16.0, 300.0), (17.0, 5000.0), (-16.0, -300.0), (3.0, -40.0), (0.1, 0.2)])
def test_bernoulli_kl_at_large_logits(old: float, new: float) -> None:
    """q1 (log q1 - log p1) + q0 (log q0 - log p0): float32 keeps the small second term."""
    kl = _bernoulli_kl(torch.tensor([[old]]), torch.tensor([[new]]))
    q = torch.sigmoid(torch.tensor([old, -old], dtype=torch.float64))
    log = torch.nn.functional.logsigmoid
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    exact = (q * (log(old * signs) - log(new * signs))).sum()
    assert kl.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("new", "exact"), [(math.inf, 0.0), (1.0, math.log1p(math.exp(-1.0)))])
def test_bernoulli_kl_from_a_sure_bit(new: float, exact: float) -> None:
    """The old bit was surely 1: KL = -log p(1)."""
    kl = _bernoulli_kl(torch.tensor([[math.inf]]), torch.tensor([[new]]))
    assert kl.item() == pytest.approx(exact, rel=1e-6)


def _bernoulli_kl(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    _, metrics, _ = ops.ppo_loss_grad(
        logits=new,
        old_logits=old,
        distribution="bernoulli",
        actions=torch.ones(1, 1, dtype=torch.int64),
        old_logp=torch.zeros(1),
        advantages=torch.ones(1),
    )
    return metrics.kl


def test_normalised_advantages_with_a_large_mean() -> None:
    """Advantages of 1e4 +- 1e-2: the mean is subtracted in double, or the deviations drown."""
    advantages = (1e4 + 1e-2 * torch.randn(1000, generator=torch.Generator().manual_seed(1))).float()
    exact = advantages.double()
    exact = -((exact - exact.mean()) / (exact.std() + 1e-8)).mean()
    zeros = torch.zeros(1000)
    loss, _ = ops.surrogate_loss(logp=zeros, old_logp=zeros, advantages=advantages, norm_adv=True)
    assert loss.item() == pytest.approx(exact.item(), abs=1e-7)


def test_a_graph_is_freed_by_its_backward() -> None:
    """As any other of torch's: the gradients go with it, unless it is retained."""
    logits = torch.randn(5, 3, requires_grad=True)
    actions, zeros = torch.zeros(5, dtype=torch.int64), torch.zeros(5)
    loss, _ = ops.ppo_loss(logits=logits, actions=actions, old_logp=zeros, advantages=torch.randn(5))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_upstream_gradients_may_come_in_a_batch() -> None:
    """Under vmap an upstream gradient has no one value to look at."""
    case = loss_case(6, "categorical", 10, 3, PLAIN)
    logits = case["logits"].requires_grad_()
    loss, _ = ops.ppo_loss(**case)
    by = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    (batch,) = torch.autograd.grad(loss, logits, by, retain_graph=True, is_grads_batched=True)
    (once,) = torch.autograd.grad(loss, logits)
    assert torch.equal(batch, by[:, None, None] * once)


def test_a_kept_gradient_is_not_written_by_a_second_backward() -> None:
    """backward() hands out its own buffers where the upstream gradient is 1; accumulation must not reach into them."""
    logits = torch.randn(5, 3, requires_grad=True)
    loss, _ = ops.ppo_loss(
        logits=logits, actions=torch.zeros(5, dtype=torch.int64), old_logp=torch.zeros(5), advantages=torch.randn(5)
    )
    once = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 3 * once)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, logits)[0], 2 * once)
