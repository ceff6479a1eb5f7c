"""`ops.ppo_loss` and `ops.ppo_loss_grad` against the reference, finite differences, and identities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    FAMILIES,
    METRICS,
    PARAMETERS,
    PLAIN,
    TOLERANCE,
    assert_near,
    assert_same_loss,
    batches,
    cast,
    family_parameters,
    floats,
    generator,
    loss_case,
    loss_options,
    random_mask,
    restride,
    seeds,
    spoil_unweighted,
    to_dict,
    widths,
    with_gradients,
)
from hypothesis import given
from hypothesis import strategies as st

from pyppo import ops, reference

families = st.sampled_from(FAMILIES)
weightings = st.sampled_from([None, "bool", "float"])


def check_against_reference(case: dict[str, Any], dtype: torch.dtype) -> None:
    case = cast(case, dtype)
    actual = with_gradients(ops.ppo_loss, case)
    assert all(gradient.dtype == dtype for gradient in actual[2].values())
    assert_same_loss(actual, with_gradients(reference.ppo_loss, cast(case, torch.float64)), TOLERANCE[dtype])
    loss, metrics, grads = ops.ppo_loss_grad(**case)
    assert torch.equal(loss, actual[0])
    assert to_dict(metrics) == actual[1]
    for name in PARAMETERS:
        gradient = getattr(grads, name)
        assert (gradient is None) == (name not in actual[2])
        assert gradient is None or torch.equal(gradient, actual[2][name])


@given(
    seed=seeds,
    family=families,
    batch=batches,
    width=widths,
    dtype=floats,
    options=loss_options(),
    masked=st.booleans(),
    weights=weightings,
    with_values=st.booleans(),
    denominator=st.sampled_from([None, 3.5]),
)
def test_matches_reference(
    seed: int,
    family: str,
    batch: int,
    width: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    masked: bool,
    weights: str | None,
    with_values: bool,
    denominator: float | None,
) -> None:
    case = loss_case(
        seed,
        family,
        batch,
        width,
        options,
        masked=masked,
        weights=weights,
        with_values=with_values,
        denominator=None if denominator is None else denominator * batch,
    )
    check_against_reference(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", ["clip", "unclipped", "kl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_reference_at_every_family_and_objective(family: str, objective: str, dtype: torch.dtype) -> None:
    options = {**PLAIN, "objective": objective, "kl_coef": 0.5, "value_clip_coef": 0.2, "norm_adv": True}
    case = loss_case(1, family, 193, 6, options, masked=True, weights="float")
    check_against_reference(case, dtype)


@pytest.mark.parametrize("batch", [64, 150])
@pytest.mark.parametrize("width", [*range(1, 13), 18])
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_reference_at_every_narrow_width(family: str, width: int, batch: int) -> None:
    """Whole tiles take other paths than the last, and four columns others than five."""
    check_against_reference(loss_case(3, family, batch, width, {**PLAIN, "norm_adv": True}), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_reference_on_a_large_batch(family: str) -> None:
    """Large enough for several threads."""
    check_against_reference(loss_case(2, family, 40_003, 5, PLAIN, weights="bool"), torch.float32)


@pytest.mark.parametrize("objective", ["clip", "unclipped", "kl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_match_finite_differences(family: str, objective: str) -> None:
    options = {**PLAIN, "objective": objective, "kl_coef": 0.5, "value_clip_coef": 0.2, "dual_clip": 1.4}
    case = loss_case(3, family, 7, 5, options, masked=True, weights="float")
    names = [name for name in PARAMETERS if name in case]

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return ops.ppo_loss(**{**case, **dict(zip(names, leaves, strict=True))})[0]

    assert torch.autograd.gradcheck(loss, [case[name].clone().requires_grad_() for name in names], atol=1e-7)


@pytest.mark.parametrize("name", ["logits", "values"])
def test_only_one_input_requires_grad(name: str) -> None:
    case = loss_case(4, "categorical", 20, 3, PLAIN)
    both = with_gradients(ops.ppo_loss, case)[2]
    assert torch.equal(with_gradients(ops.ppo_loss, case, (name,))[2][name], both[name])


def test_no_input_requires_grad() -> None:
    loss, _ = ops.ppo_loss(**loss_case(4, "categorical", 20, 3, PLAIN))
    assert not loss.requires_grad


def test_upstream_gradient_and_two_losses() -> None:
    case = loss_case(5, "categorical", 20, 3, PLAIN)
    once = with_gradients(ops.ppo_loss, case)[2]["logits"]
    logits = case["logits"].clone().requires_grad_()
    first, _ = ops.ppo_loss(**{**case, "logits": logits})
    second, _ = ops.ppo_loss(**{**case, "logits": logits})
    (3.0 * first - second).backward()
    assert_near(logits.grad, 2.0 * once, 1e-14)


def test_gradient_flows_to_what_made_the_logits() -> None:
    case = loss_case(6, "categorical", 20, 3, PLAIN)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    ops.ppo_loss(**{**case, "logits": case["logits"] + bias})[0].backward()
    assert_near(bias.grad, with_gradients(ops.ppo_loss, case)[2]["logits"].sum(0), 1e-13)


@given(seed=seeds, family=families, dtype=floats, options=loss_options(), weights=st.sampled_from(["bool", "float"]))
def test_rows_of_weight_zero_are_ignored(
    seed: int, family: str, dtype: torch.dtype, options: dict[str, Any], weights: str
) -> None:
    case = cast(loss_case(seed, family, 70, 5, options, masked=True, weights=weights), dtype)
    clean, spoiled = with_gradients(ops.ppo_loss, case), with_gradients(ops.ppo_loss, spoil_unweighted(case))
    assert torch.equal(clean[0], spoiled[0])
    assert clean[1] == spoiled[1]
    for name in clean[2]:
        assert torch.equal(clean[2][name], spoiled[2][name]), name
        if clean[2][name].shape[0] == 70:
            assert not clean[2][name][case["weights"] == 0].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", [torch.zeros(9, dtype=torch.bool), torch.zeros(9, dtype=torch.float64)])
@pytest.mark.parametrize("norm_adv", [False, True])
def test_nothing_counts(family: str, weights: torch.Tensor, norm_adv: bool) -> None:
    case = loss_case(7, family, 9, 4, {**PLAIN, "norm_adv": norm_adv}) | {"weights": weights}
    loss, metrics, grads = with_gradients(ops.ppo_loss, spoil_unweighted(case))
    assert float(loss) == 0.0
    assert not any(metrics.values())
    assert not any(gradient.any() for gradient in grads.values())


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_advantage_normalisation_of_few_rows(rows: int) -> None:
    """Rows of weight 0 are no part of the mean; below two rows the advantages stay as they are."""
    case = loss_case(8, "categorical", 5, 3, {**PLAIN, "ent_coef": 0.0}, with_values=False)
    case |= {"old_logp": reference.Categorical(case["logits"]).log_prob(case["actions"])}  # every ratio is 1
    case |= {"advantages": torch.tensor([4.0, 7.0, 10.0, 1e6, float("nan")], dtype=torch.float64)}
    weights = torch.arange(5) < rows
    loss = ops.ppo_loss(**case | {"weights": weights, "norm_adv": True})[0]
    plain = ops.ppo_loss(**case | {"weights": weights})[0]
    # Two: mean 5.5, deviation 2.1; the normalised ones sum to 0. So do three. One: the advantage itself.
    expected = {0: 0.0, 1: -4.0, 2: 0.0, 3: 0.0}[rows]
    assert float(loss) == pytest.approx(expected, abs=1e-8)
    assert float(plain) == pytest.approx({0: 0.0, 1: -4.0, 2: -5.5, 3: -7.0}[rows], abs=1e-12)
    if rows == 2:
        # -A / 2 with A = -+1.5 / 2.1213 = -+0.70711
        gradient = with_gradients(ops.ppo_loss, case | {"weights": weights, "norm_adv": True}, ("logits",))[2]["logits"]
        chosen = gradient[torch.arange(2), case["actions"][:2]]
        p = case["logits"].softmax(-1)[torch.arange(2), case["actions"][:2]]
        assert (chosen / (1 - p)).tolist() == pytest.approx([0.353553, -0.353553], abs=1e-5)


@given(seed=seeds, family=families, options=loss_options(), weights=weightings)
def test_micro_batches_with_the_whole_denominator_add_up(
    seed: int, family: str, options: dict[str, Any], weights: str | None
) -> None:
    case = loss_case(seed, family, 50, 4, {**options, "norm_adv": False}, weights=weights)
    whole = with_gradients(ops.ppo_loss, case)
    total = torch.tensor(whole[1]["denominator"], dtype=torch.float64)  # a 0-d tensor, as ranks would exchange it
    sums: dict[str, torch.Tensor] = {}
    losses, metrics = 0.0, dict.fromkeys(METRICS, 0.0)
    for part in (slice(0, 13), slice(13, 14), slice(14, 50)):
        piece = {k: v[part] if isinstance(v, torch.Tensor) and v.shape[:1] == (50,) else v for k, v in case.items()}
        loss, some, grads = with_gradients(ops.ppo_loss, {**piece, "denominator": total})
        losses += float(loss)
        metrics = {name: metrics[name] + some[name] for name in METRICS}
        for name, gradient in grads.items():
            shared = gradient.shape == case[name].shape  # log_std [D]
            old = sums.get(name, torch.zeros(0))
            sums[name] = (old + gradient if old.numel() else gradient) if shared else torch.cat([old, gradient])
    assert losses == pytest.approx(float(whole[0]), abs=1e-11)
    for name in METRICS[1:-1]:
        assert metrics[name] == pytest.approx(whole[1][name], abs=1e-11), name
    for name, gradient in whole[2].items():
        assert_near(sums[name], gradient, 1e-12, name)


@given(seed=seeds, family=families, options=loss_options(), dtype=floats)
def test_permuting_rows_permutes_gradients(seed: int, family: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    case = cast(loss_case(seed, family, 67, 3, options, masked=True, weights="float"), dtype)
    order = torch.randperm(67, generator=generator(seed))
    permuted = {k: v[order] if isinstance(v, torch.Tensor) and v.shape[:1] == (67,) else v for k, v in case.items()}
    before, after = with_gradients(ops.ppo_loss, case), with_gradients(ops.ppo_loss, permuted)
    expected = {k: v[order] if v.shape[:1] == (67,) else v for k, v in before[2].items()}
    assert_same_loss(after, (before[0], before[1], expected), 1e-5 if dtype == torch.float32 else 1e-12)


@given(seed=seeds, family=st.sampled_from(FAMILIES[:3]), dtype=floats, objective=st.sampled_from(["clip", "kl"]))
def test_logits_of_minus_infinity_are_masked(seed: int, family: str, dtype: torch.dtype, objective: str) -> None:
    options = {**PLAIN, "objective": objective, "kl_coef": 0.3}
    case = cast(loss_case(seed, family, 66, 7, options, masked=True), dtype)
    infinite = {k: v.masked_fill(~case["action_mask"], -math.inf) for k, v in case.items() if k.endswith("logits")}
    by_mask = with_gradients(ops.ppo_loss, case)
    by_infinity = with_gradients(ops.ppo_loss, {**case, **infinite, "action_mask": None})
    assert_same_loss(by_infinity, by_mask, 1e-6 if dtype == torch.float32 else 1e-13)
    assert not by_mask[2]["logits"][~case["action_mask"]].any()
    assert not by_infinity[2]["logits"][~case["action_mask"]].any()


@given(seed=seeds, family=st.sampled_from(FAMILIES[:3]))
def test_forbidden_logits_may_be_anything(seed: int, family: str) -> None:
    case = loss_case(seed, family, 34, 6, {**PLAIN, "objective": "kl", "kl_coef": 0.3}, masked=True)
    spoiled = {k: v.masked_fill(~case["action_mask"], math.nan) for k, v in case.items() if k.endswith("logits")}
    clean, dirty = with_gradients(ops.ppo_loss, case), with_gradients(ops.ppo_loss, {**case, **spoiled})
    assert torch.equal(clean[0], dirty[0])
    assert clean[1] == dirty[1]
    assert torch.equal(clean[2]["logits"], dirty[2]["logits"])


@given(seed=seeds, family=families, how=st.lists(st.integers(0, 3), min_size=20, max_size=20), dtype=floats)
def test_strides(seed: int, family: str, how: list[int], dtype: torch.dtype) -> None:
    options = {**PLAIN, "objective": "kl", "kl_coef": 0.3, "value_clip_coef": 0.2}
    case = cast(loss_case(seed, family, 35, 6, options, masked=True, weights="float"), dtype)
    tensors = [k for k, v in case.items() if isinstance(v, torch.Tensor)]
    strided = {k: restride(case[k], h) for k, h in zip(tensors, how, strict=False)}
    plain_loss, plain_metrics, plain_grads = ops.ppo_loss_grad(**case)
    loss, metrics, grads = ops.ppo_loss_grad(**{**case, **strided})
    assert torch.equal(loss, plain_loss)
    assert to_dict(metrics) == to_dict(plain_metrics)
    for a, e in zip(grads, plain_grads, strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


def test_transposed_logits_get_their_gradient() -> None:
    case = loss_case(9, "categorical", 33, 4, PLAIN)
    stored = case["logits"].t().contiguous().requires_grad_()
    ops.ppo_loss(**{**case, "logits": stored.t()})[0].backward()
    assert torch.equal(stored.grad.t(), with_gradients(ops.ppo_loss, case)[2]["logits"])


def test_expanded_log_std() -> None:
    case = loss_case(10, "normal", 33, 4, PLAIN)
    case["log_std"] = torch.tensor([-0.5, 0.1, 0.3, -1.0], dtype=torch.float64)
    shared = with_gradients(ops.ppo_loss, case)
    expanded = with_gradients(ops.ppo_loss, {**case, "log_std": case["log_std"].expand(33, 4)})
    assert float(shared[0]) == pytest.approx(float(expanded[0]), abs=1e-13)
    assert_near(expanded[2]["log_std"].sum(0), shared[2]["log_std"], 1e-12)


@pytest.mark.parametrize(
    ("family", "dtypes"),
    [
        ("categorical", [torch.int32, torch.int64]),
        ("multi_categorical", [torch.int32, torch.int64]),
        ("bernoulli", [torch.bool, torch.uint8, torch.int32, torch.int64]),
    ],
)
def test_action_dtypes(family: str, dtypes: list[torch.dtype]) -> None:
    case = loss_case(11, family, 37, 6, PLAIN)
    expected = with_gradients(ops.ppo_loss, case)
    for dtype in dtypes:
        actual = with_gradients(ops.ppo_loss, {**case, "actions": case["actions"].to(dtype)})
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[2]["logits"], expected[2]["logits"])


@pytest.mark.parametrize("name", ["categorical", None])
def test_distribution_is_inferred(name: str | None) -> None:
    case = loss_case(12, "multi_categorical", 9, 7, PLAIN)
    expected = ops.ppo_loss(**case)[0]
    assert torch.equal(ops.ppo_loss(**{**case, "distribution": None})[0], expected)
    single = loss_case(12, "categorical", 9, 7, PLAIN)
    named = ops.ppo_loss(**single)[0]
    assert torch.equal(ops.ppo_loss(**{**single, "distribution": name})[0], named)
    one_component = {"nvec": (7,), "actions": single["actions"].unsqueeze(-1), "distribution": "multi_categorical"}
    assert float(ops.ppo_loss(**{**single, **one_component})[0]) == pytest.approx(float(named), abs=1e-14)


def test_two_actions_and_one_bit_agree() -> None:
    """softmax over (0, l) is sigmoid(l)."""
    case = loss_case(13, "bernoulli", 41, 1, PLAIN)
    pair = torch.cat([torch.zeros_like(case["logits"]), case["logits"]], -1)
    both = {"logits": pair, "actions": case["actions"][:, 0], "distribution": "categorical"}
    bit, categorical = with_gradients(ops.ppo_loss, case), with_gradients(ops.ppo_loss, {**case, **both})
    assert float(bit[0]) == pytest.approx(float(categorical[0]), abs=1e-13)
    assert_near(categorical[2]["logits"][:, 1:], bit[2]["logits"], 1e-12)


@given(seed=seeds, family=families, dtype=floats)
def test_kl_to_itself_is_zero_and_never_negative(seed: int, family: str, dtype: torch.dtype) -> None:
    options = {**PLAIN, "objective": "kl", "kl_coef": 1.0, "ent_coef": 0.0}
    case = cast(loss_case(seed, family, 1, 6, options, with_values=False), dtype)
    names = ("mean", "log_std") if family == "normal" else ("logits",)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    other = reference.ppo_loss(**cast(case, torch.float64))[1]["kl"]  # the old parameters differ
    found = to_dict(ops.ppo_loss(**case)[1])["kl"]
    assert found >= -tolerance
    assert found == pytest.approx(float(other), rel=1e-4, abs=tolerance)
    same = case | {f"old_{name}": case[name].clone() for name in names} | {"advantages": torch.zeros(1, dtype=dtype)}
    _, metrics, grads = with_gradients(ops.ppo_loss, same)
    assert abs(metrics["kl"]) <= tolerance
    assert all(grads[name].abs().max() <= tolerance for name in names)


@pytest.mark.parametrize("actions", [1, 2, 3, 5, 8, 64, 257])
def test_entropy_of_the_uniform_distribution(actions: int) -> None:
    case = loss_case(14, "categorical", 3, actions, PLAIN) | {"logits": torch.full((3, actions), 7.5).double()}
    assert to_dict(ops.ppo_loss(**case)[1])["entropy"] == pytest.approx(math.log(actions), abs=1e-13)
    bits = loss_case(14, "bernoulli", 3, actions, PLAIN) | {"logits": torch.zeros(3, actions).double()}
    assert to_dict(ops.ppo_loss(**bits)[1])["entropy"] == pytest.approx(actions * math.log(2.0), rel=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_minibatch_has_ratio_one(family: str, dtype: torch.dtype) -> None:
    """What `sample` says an action's log-prob is, `ppo_loss` says too."""
    parameters = cast(family_parameters(generator(17), family, 300, 5), dtype)
    actions, logp, entropy = ops.sample(**parameters, seed=1, step=2)
    _, metrics = ops.ppo_loss(
        **parameters, actions=actions, old_logp=logp, advantages=torch.ones(300, dtype=dtype), clip_coef=1e-5
    )
    found = metrics.to_dict()
    assert found["clip_fraction"] == 0.0
    assert abs(found["approx_kl"]) < 1e-9
    assert found["policy_loss"] == pytest.approx(-1.0, abs=1e-5)
    assert found["entropy"] == pytest.approx(float(entropy.double().mean()), rel=1e-6)


def test_metrics_object() -> None:
    case = cast(loss_case(18, "categorical", 10, 3, PLAIN), torch.float32)
    loss, metrics = ops.ppo_loss(**case)
    assert tuple(metrics.keys()) == METRICS
    assert dict(metrics).keys() == set(METRICS)
    assert metrics.stats.shape == (8,)
    assert not metrics.stats.requires_grad
    for i, name in enumerate(METRICS):
        assert getattr(metrics, name).shape == ()
        assert isinstance(metrics[name], torch.Tensor)
        assert float(getattr(metrics, name)) == float(metrics[name]) == float(metrics.stats[i])
    assert metrics.to_dict() == {name: float(metrics[name]) for name in METRICS}
    assert all(type(x) is float for x in metrics.to_dict().values())
    assert metrics.to_dict()["loss"] == float(loss)
    with pytest.raises(KeyError):
        metrics["reward"]
    assert not hasattr(metrics, "reward")


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_left_alone(family: str) -> None:
    case = loss_case(19, family, 70, 5, {**PLAIN, "norm_adv": True}, masked=True, weights="float")
    before = {k: v.clone() for k, v in case.items() if isinstance(v, torch.Tensor)}
    with_gradients(ops.ppo_loss, case)
    assert all(torch.equal(case[name], x) for name, x in before.items())


def test_random_mask_allows_something() -> None:
    """The cases' own promise, without which the masked tests would test errors."""
    for family, nvec in (("categorical", None), ("multi_categorical", (2, 1, 4))):
        mask = random_mask(generator(20), family, nvec, 500, 7)
        assert all(part.any(-1).all() for part in mask.split(list(nvec or (7,)), -1))
        assert not mask.all()
