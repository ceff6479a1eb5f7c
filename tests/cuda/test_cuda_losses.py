"""`ops.ppo_loss` and `ops.surrogate_loss` on a GPU against the reference in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    FAMILIES,
    METRICS,
    PARAMETERS,
    PLAIN,
    assert_near,
    cast,
    loss_case,
    spoil_unweighted,
    surrogate_case,
    with_gradients,
)
from gpu_cases import (
    DEVICE,
    GRADIENT_TOLERANCE,
    NETWORK_DTYPES,
    PPO_NETWORK,
    SURROGATE_NETWORK,
    compute_dtype,
    in_network_dtype,
    on_device,
)

from pyppo import ops, reference

METRIC_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
# A thread a row up to 32 columns, a warp beyond; less and more than a tile of rows.
SIZES = [(1, 1), (3, 2), (129, 7), (257, 32), (64, 33), (40, 130), (2, 1021), (4099, 3), (2051, 65)]
OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {},
    "all": {"clip_coef_high": 0.3, "dual_clip": 3.0, "value_clip_coef": 0.2, "norm_adv": True, "weights": "float"},
    "kl": {"objective": "kl", "kl_coef": 0.7, "weights": "bool", "ent_coef": 0.0},
    "unclipped": {"objective": "unclipped", "with_values": False, "denominator": 7.5, "weights": "float"},
}


def check(
    name: str, case: dict[str, Any], network_dtype: torch.dtype, network: tuple[str, ...], leaves: tuple[str, ...]
) -> None:
    typed = in_network_dtype(case, network_dtype, network)
    garbled = spoil_unweighted(typed) if typed.get("weights") is not None else typed
    loss, metrics, grads = with_gradients(getattr(ops, name), on_device(garbled), leaves)
    function: Callable[..., Any] = getattr(reference, name)
    want_loss, want_metrics, want_grads = with_gradients(function, cast(typed, torch.float64), leaves)
    tolerance = METRIC_TOLERANCE[compute_dtype(network_dtype)]
    assert abs(float(loss) - float(want_loss)) <= tolerance * (10 + abs(float(want_loss)))
    for metric in METRICS:
        expected = want_metrics[metric]
        assert abs(metrics[metric] - expected) <= tolerance * (10 + abs(expected)), metric
    for leaf, expected_grad in want_grads.items():
        assert grads[leaf].dtype == network_dtype
        assert_near(grads[leaf].cpu(), expected_grad, GRADIENT_TOLERANCE[network_dtype], f"d loss / d {leaf}")


@pytest.mark.parametrize("network_dtype", NETWORK_DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("batch", "width"), SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_reference(family: str, batch: int, width: int, options: str, network_dtype: torch.dtype) -> None:
    changes = dict(OPTIONS[options])
    names = ("weights", "with_values", "denominator")
    extra = {k: changes.pop(k) for k in names if k in changes}
    seed = 100 * batch + width
    case = loss_case(seed, family, batch, width, {**PLAIN, **changes}, masked=options != "kl", **extra)
    check("ppo_loss", case, network_dtype, PPO_NETWORK, PARAMETERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_reference_on_more_rows_than_blocks(family: str) -> None:
    case = loss_case(3, family, 150_001, 2, {**PLAIN, "norm_adv": True}, weights="bool")
    check("ppo_loss", case, torch.float32, PPO_NETWORK, PARAMETERS)


@pytest.mark.parametrize("network_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "width"), [(3001, 65), (2, 1021), (60_003, 31)])
def test_matches_reference_where_one_block_would_not_do_for_the_sums(
    batch: int, width: int, network_dtype: torch.dtype
) -> None:
    """A log-std that all rows share: its gradient is a sum for each action."""
    case = loss_case(1, "normal", batch, width, PLAIN)
    assert case["log_std"].shape == (width,)
    check("ppo_loss", case, network_dtype, PPO_NETWORK, PARAMETERS)


@pytest.mark.parametrize("width", [183, 187, 191, 193])
@pytest.mark.parametrize("network_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", ["clip", "kl"])
def test_matches_reference_on_the_widest_tiles(options: str, network_dtype: torch.dtype, width: int) -> None:
    """As much shared memory as a block may have, and a little more."""
    changes = {k: v for k, v in OPTIONS[options].items() if k != "weights"}
    case = loss_case(width, "multi_categorical", 67, width, {**PLAIN, **changes})
    check("ppo_loss", case, network_dtype, PPO_NETWORK, PARAMETERS)


def test_matches_reference_on_a_vocabulary() -> None:
    case = loss_case(4, "categorical", 5, 50_257, PLAIN)
    check("ppo_loss", case, torch.bfloat16, PPO_NETWORK, PARAMETERS)


@pytest.mark.parametrize("network_dtype", NETWORK_DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (1021,), pytest.param((3, 200_003), id="large")])
def test_surrogate_matches_reference(shape: tuple[int, ...], options: str, network_dtype: torch.dtype) -> None:
    changes = {k: v for k, v in OPTIONS[options].items() if k not in ("with_values", "denominator")}
    weights = changes.pop("weights", None)
    case = surrogate_case(5, shape, {**PLAIN, **changes}, weights=weights)
    case["denominator"] = 64.0  # a mean over 600,000 has gradients below float16's smallest number
    check("surrogate_loss", case, network_dtype, SURROGATE_NETWORK, ("logp", "entropy", "values"))


@pytest.mark.parametrize("family", FAMILIES)
def test_denominator_on_the_device(family: str) -> None:
    case = on_device(cast(loss_case(6, family, 100, 5, PLAIN, weights="bool"), torch.float32))
    expected = ops.ppo_loss_grad(**{**case, "denominator": 33.0})
    actual = ops.ppo_loss_grad(**{**case, "denominator": torch.tensor(33.0, device=DEVICE)})
    assert torch.equal(actual[1].stats, expected[1].stats)
    nothing = ops.ppo_loss_grad(**{**case, "denominator": torch.tensor(0.0, device=DEVICE)})
    assert float(nothing[0]) == 0
    assert all(not x.any() for x in nothing[2] if x is not None)


def test_no_row_counts() -> None:
    case = cast(loss_case(7, "normal", 100, 5, {**PLAIN, "norm_adv": True}), torch.float32)
    case["weights"] = torch.zeros(100, dtype=torch.bool)
    loss, metrics, grads = ops.ppo_loss_grad(**on_device(spoil_unweighted(case)))
    assert float(loss) == 0
    assert not metrics.stats.any()
    assert all(not x.any() for x in grads if x is not None)


@pytest.mark.parametrize("family", ["categorical", "normal"])
def test_empty(family: str) -> None:
    case = cast(loss_case(8, family, 0, 3, PLAIN), torch.float32)
    loss, metrics, grads = ops.ppo_loss_grad(**on_device(case))
    assert float(loss) == 0
    assert not metrics.stats.any()
    assert all(not x.any() for x in grads if x is not None)


@pytest.mark.parametrize("width", [5, 70])
def test_impossible_rows_are_noted(width: int) -> None:
    case = on_device(cast(loss_case(9, "categorical", 300, width, PLAIN), torch.float32))
    ops.check_errors(DEVICE)
    case["actions"][77], case["actions"][200] = -1, 10**9
    ops.ppo_loss_grad(**case)
    with pytest.raises(ValueError, match="actions.*row 77"):
        ops.check_errors(DEVICE)
    ops.check_errors(DEVICE)
    case["actions"].clamp_(0, width - 1)
    case["action_mask"] = torch.ones(300, width, dtype=torch.bool, device=DEVICE)
    case["action_mask"][150] = False
    case["weights"] = torch.ones(300, device=DEVICE)
    case["weights"][150] = 0
    ops.ppo_loss_grad(**case)
    ops.check_errors(DEVICE)
    case["weights"][150] = 1
    ops.ppo_loss_grad(**case)
    with pytest.raises(ValueError, match="row 150"):
        ops.check_errors(DEVICE)


def test_too_many_parts_are_refused() -> None:
    logits, row = torch.zeros(1, 300, device=DEVICE), torch.zeros(1, device=DEVICE)
    actions = torch.zeros(1, 300, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="nvec has 300 parts"):
        ops.ppo_loss_grad(logits=logits, nvec=[1] * 300, actions=actions, old_logp=row, advantages=row)
