"""`ops.surrogate_loss`, the PPO loss from given log-probs, in any one shape."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    METRICS,
    TOLERANCE,
    assert_near,
    assert_same_loss,
    batches,
    cast,
    floats,
    loss_case,
    loss_options,
    normal,
    restride,
    seeds,
    spoil_unweighted,
    surrogate_case,
    with_gradients,
)
from hypothesis import given
from hypothesis import strategies as st

from pyppo import ops, reference

INPUTS = ("logp", "entropy", "values", "kl")
shapes = st.one_of(
    st.tuples(batches),
    st.tuples(st.integers(1, 9), st.sampled_from([1, 7, 16, 33])),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 17)),
)
weightings = st.sampled_from([None, "bool", "float"])


def test_hand_worked() -> None:
    """Three tokens, one masked. Ratios 1.5 (A = 2, clipped at 1.2: -2.4) and 0.9 (A = -1: 0.9), weights 1 and 3.

    loss = (1 * (-2.4 - 0.1 * 0.5) + 3 * (0.9 - 0.1 * 0.7)) / 4 = 0.01; d / d logp = 0, 3 * 0.9 / 4;
    d / d entropy = -0.1 / 4, -0.3 / 4.
    """
    case = {
        "logp": torch.tensor([[0.0, 9.0, 0.0]], dtype=torch.float64),
        "old_logp": -torch.tensor([[1.5, 1.0, 0.9]], dtype=torch.float64).log(),
        "advantages": torch.tensor([[2.0, 99.0, -1.0]], dtype=torch.float64),
        "entropy": torch.tensor([[0.5, 99.0, 0.7]], dtype=torch.float64),
        "weights": torch.tensor([[1.0, 0.0, 3.0]], dtype=torch.float64),
    }
    loss, metrics, grads = with_gradients(ops.surrogate_loss, {**case, "ent_coef": 0.1}, INPUTS)
    assert float(loss) == pytest.approx(0.01, abs=1e-14)
    assert grads["logp"].tolist() == [[0.0, 0.0, pytest.approx(0.675, abs=1e-14)]]
    assert grads["entropy"][0].tolist() == pytest.approx([-0.025, 0.0, -0.075], abs=1e-14)
    assert metrics["clip_fraction"] == pytest.approx(0.25)
    assert metrics["denominator"] == 4.0
    expected = (1.5 - 1 - math.log(1.5) + 3 * (0.9 - 1 - math.log(0.9))) / 4
    assert metrics["approx_kl"] == pytest.approx(expected, abs=1e-14)


@given(seed=seeds, shape=shapes, dtype=floats, options=loss_options(), weights=weightings)
def test_matches_reference(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], weights: str | None
) -> None:
    case = cast(surrogate_case(seed, shape, options, weights=weights), dtype)
    actual = with_gradients(ops.surrogate_loss, case, INPUTS)
    assert all(gradient.dtype == dtype for gradient in actual[2].values())
    expected = with_gradients(reference.surrogate_loss, cast(case, torch.float64), INPUTS)
    assert_same_loss(actual, expected, TOLERANCE[dtype])


@given(seed=seeds, options=loss_options(), absent=st.sets(st.sampled_from(["entropy", "values", "old_values"])))
def test_matches_reference_with_parts_missing(seed: int, options: dict[str, Any], absent: set[str]) -> None:
    case = surrogate_case(seed, (37,), {**options, "value_clip_coef": None if absent else options["value_clip_coef"]})
    case |= dict.fromkeys(absent) | ({"returns": None} if "values" in absent else {})
    case |= {"old_values": None} if "values" in absent else {}
    case |= {"ent_coef": 0.0} if "entropy" in absent else {}
    actual = with_gradients(ops.surrogate_loss, case, INPUTS)
    assert_same_loss(actual, with_gradients(reference.surrogate_loss, case, INPUTS), 1e-11)


@pytest.mark.parametrize("family", ["categorical", "normal"])
@pytest.mark.parametrize("objective", ["clip", "unclipped", "kl"])
def test_agrees_with_ppo_loss(family: str, objective: str) -> None:
    """Fed the reference's log-prob, entropy and KL of a distribution, it is `ppo_loss` of that distribution."""
    options = {"objective": objective, "clip_coef": 0.2, "clip_coef_high": 0.3, "dual_clip": 2.0, "kl_coef": 0.4}
    options |= {"value_clip_coef": 0.2, "ent_coef": 0.02, "vf_coef": 0.7, "norm_adv": True}
    case = loss_case(1, family, 83, 5, options, weights="float")
    expected = with_gradients(ops.ppo_loss, case)
    keys = ("logits", "mean", "log_std", "nvec", "action_mask")

    def composed(**k: Any) -> Any:
        d = reference.make_distribution(family, **{key: k.pop(key, None) for key in keys})
        old = {key: k.pop(f"old_{key}", None) for key in keys[:3]}
        k.pop("distribution", None)
        kl = reference.make_distribution(family, **old).kl(d) if objective == "kl" else None
        return ops.surrogate_loss(logp=d.log_prob(k.pop("actions")), entropy=d.entropy(), kl=kl, **k)

    assert_same_loss(with_gradients(composed, case), expected, 1e-11)


@pytest.mark.parametrize("objective", ["clip", "unclipped", "kl"])
def test_gradients_match_finite_differences(objective: str) -> None:
    options = {"objective": objective, "clip_coef": 0.2, "clip_coef_high": None, "dual_clip": 1.4, "kl_coef": 0.4}
    options |= {"value_clip_coef": 0.2, "ent_coef": 0.02, "vf_coef": 0.7, "norm_adv": False}
    case = surrogate_case(2, (3, 7), options, weights="float")
    names = [name for name in INPUTS if name in case]

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return ops.surrogate_loss(**{**case, **dict(zip(names, leaves, strict=True))})[0]

    assert torch.autograd.gradcheck(loss, [case[name].clone().requires_grad_() for name in names], atol=1e-7)


@given(seed=seeds, dtype=floats, options=loss_options(), weights=st.sampled_from(["bool", "float"]))
def test_elements_of_weight_zero_are_ignored(
    seed: int, dtype: torch.dtype, options: dict[str, Any], weights: str
) -> None:
    case = cast(surrogate_case(seed, (11, 9), options, weights=weights), dtype)
    clean = with_gradients(ops.surrogate_loss, case, INPUTS)
    spoiled = with_gradients(ops.surrogate_loss, spoil_unweighted(case), INPUTS)
    assert torch.equal(clean[0], spoiled[0])
    assert clean[1] == spoiled[1]
    for name, gradient in clean[2].items():
        assert torch.equal(gradient, spoiled[2][name]), name
        assert not gradient[case["weights"] == 0].any()


@pytest.mark.parametrize("weights", [torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.float64)])
def test_nothing_counts(weights: torch.Tensor) -> None:
    case = {name: torch.full((2, 3), math.nan, dtype=torch.float64) for name in ("logp", "old_logp", "advantages")}
    loss, metrics, grads = with_gradients(ops.surrogate_loss, {**case, "weights": weights}, INPUTS)
    assert float(loss) == 0.0
    assert not any(metrics.values())
    assert not grads["logp"].any()


@given(seed=seeds, options=loss_options(), as_tensor=st.booleans())
def test_micro_batches_with_the_whole_denominator_add_up(seed: int, options: dict[str, Any], as_tensor: bool) -> None:
    case = surrogate_case(seed, (12, 5), {**options, "norm_adv": False}, weights="float")
    whole = with_gradients(ops.surrogate_loss, case, INPUTS)
    total: Any = whole[1]["denominator"]
    if as_tensor:
        total = torch.tensor(total, dtype=torch.float64)
    loss, metrics, pieces = 0.0, dict.fromkeys(METRICS, 0.0), []
    for part in (slice(0, 1), slice(1, 8), slice(8, 12)):
        piece = {k: v[part] if isinstance(v, torch.Tensor) else v for k, v in case.items()}
        one = with_gradients(ops.surrogate_loss, {**piece, "denominator": total}, INPUTS)
        loss += float(one[0])
        metrics = {name: metrics[name] + one[1][name] for name in METRICS}
        pieces.append(one[2])
    assert loss == pytest.approx(float(whole[0]), abs=1e-11)
    for name in METRICS[1:-1]:
        assert metrics[name] == pytest.approx(whole[1][name], abs=1e-11), name
    for name, gradient in whole[2].items():
        assert_near(torch.cat([piece[name] for piece in pieces]), gradient, 1e-12, name)


@given(seed=seeds, dtype=floats, how=st.lists(st.integers(0, 3), min_size=9, max_size=9))
def test_strides(seed: int, dtype: torch.dtype, how: list[int]) -> None:
    options = {"objective": "kl", "clip_coef": 0.2, "clip_coef_high": None, "dual_clip": None, "kl_coef": 0.4}
    options |= {"value_clip_coef": 0.2, "ent_coef": 0.02, "vf_coef": 0.7, "norm_adv": True}
    case = cast(surrogate_case(seed, (6, 11), options, weights="bool"), dtype)
    tensors = [k for k, v in case.items() if isinstance(v, torch.Tensor)]
    expected = with_gradients(ops.surrogate_loss, case, INPUTS)
    leaves = {k: case[k].clone().requires_grad_() for k in INPUTS}
    strided = {k: restride(leaves.get(k, case[k]), h) for k, h in zip(tensors, how, strict=True)}
    loss, _metrics = ops.surrogate_loss(**{**case, **strided})
    loss.backward()
    assert torch.equal(loss, expected[0])
    for name in INPUTS:
        assert torch.equal(leaves[name].grad, expected[2][name]), name


def test_expanded_advantages() -> None:
    """One advantage for all tokens of a conversation."""
    logp, old = normal(torch.Generator().manual_seed(1), 4, 6), normal(torch.Generator().manual_seed(2), 4, 6)
    advantages = torch.tensor([[1.0], [-2.0], [0.5], [3.0]], dtype=torch.float64).expand(4, 6)
    case = {"logp": logp, "old_logp": old, "objective": "unclipped"}
    loss, _, grads = with_gradients(ops.surrogate_loss, {**case, "advantages": advantages}, INPUTS)
    expected = -(logp - old).exp() * advantages
    assert float(loss) == pytest.approx(float(expected.mean()), abs=1e-13)
    assert_near(grads["logp"], expected / 24, 1e-13)


def test_upstream_gradient() -> None:
    case = surrogate_case(3, (10,), {"objective": "clip", "clip_coef": 0.2, "clip_coef_high": None, "dual_clip": None,
                                     "value_clip_coef": None, "kl_coef": 0.0, "norm_adv": False})  # fmt: skip
    once = with_gradients(ops.surrogate_loss, case, INPUTS)[2]["logp"]
    logp = case["logp"].clone().requires_grad_()
    (-5.0 * ops.surrogate_loss(**{**case, "logp": logp})[0]).backward()
    assert_near(logp.grad, -5.0 * once, 1e-14)
